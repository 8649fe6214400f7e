"""Embeddings on disk: one `.npy` matrix, and the same rows with their keys as Parquet, written as they are made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from files.writing import whole_file, writing

MATRIX_FILE, TABLE_FILE = "embeddings.npy", "embeddings.parquet"
HEADER_BYTES = 128
ROWS_AT_ONCE = 1024


class EmbeddingFiles:
    """`embeddings.npy` float32 [N, D] and `embeddings.parquet` (key, embedding), rows in the same order.

    Both appear when the context ends well; memory holds `ROWS_AT_ONCE` rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows, self.width = 0, 0
        self.keys: list[str] = []
        self.pending: list[NDArray[np.float32]] = []
        self.matrix: Any = None
        self.table: Any = None
        self.stack = contextlib.ExitStack()

    def add(self, key: str, embedding: NDArray[np.float32]) -> int:
        """Append a row [D]; returns its number."""
        self.keys.append(key)
        self.pending.append(np.ascontiguousarray(embedding, np.float32))
        self.rows += 1
        if len(self.pending) >= ROWS_AT_ONCE:
            self.flush()
        return self.rows - 1

    def open_files(self, width: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        matrix = self.stack.enter_context(whole_file(self.folder / MATRIX_FILE))
        table = self.stack.enter_context(whole_file(self.folder / TABLE_FILE))
        self.matrix = self.stack.enter_context(matrix.open("wb"))
        self.matrix.write(npy_header(0, width))
        schema = pa.schema([("key", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
        self.table = self.stack.enter_context(pq.ParquetWriter(table, schema))

    def flush(self) -> None:
        import pyarrow as pa

        if not self.pending:
            return
        rows = np.stack(self.pending)
        with writing(self.folder):
            if self.matrix is None:
                self.width = rows.shape[1]
                self.open_files(self.width)
            self.matrix.write(rows.tobytes())
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), self.width)
            self.table.write_table(pa.table([pa.array(self.keys), column], schema=self.table.schema))
        self.keys, self.pending = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            try:
                self.flush()
                if self.matrix is not None:
                    with writing(self.folder / MATRIX_FILE):
                        self.matrix.seek(0)
                        self.matrix.write(npy_header(self.rows, self.width))
            except BaseException as problem:
                self.stack.__exit__(type(problem), problem, problem.__traceback__)
                raise
        return self.stack.__exit__(*error)


def npy_header(rows: int, width: int) -> bytes:
    """The header of a float32 matrix [rows, width] in NumPy's format 1.0, padded to a fixed size to be rewritten."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    body = text.ljust(HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode("ascii")
