"""The files behind a table: which there are, their columns, their rows one after the other, their image cells."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from extract.sources.base import AnnotationError, SourceError
from extract.sources.splitting import SPLIT_NAMES
from files.reading import open_regular
from imaging.errors import ImageError

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
BATCH_ROWS = 4096
MAX_FIELD = 1 << 24


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The bytes in one cell: row `row` of row group `group`; `number` counts from the file's start."""

    file: str
    column: str
    group: int
    row: int
    number: int

    def read(self) -> bytes:
        try:
            changed_ns = os.stat(self.file).st_mtime_ns
            value = _read_group(self.file, self.column, self.group, os.getpid(), changed_ns)[self.row].as_py()
        except (OSError, ValueError, IndexError) as error:
            raise ImageError(f"row {self.number} cannot be read: {error}") from None
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ImageError("no image bytes in this row")
        return value


Row = tuple[str, Mapping[str, Any], ParquetCell | None]  # place for messages, values, image bytes


class TableFile(Protocol):
    """A table's `path` and `columns`; `rows(image)` yields every row, image bytes only as a cell."""

    path: Path
    columns: list[str]

    def rows(self, image: str) -> Iterator[Row]: ...


class CsvTable:
    """CSV (`,` or `;`) or TSV with a header line. A row's place is its line number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            header = file.readline()
        self.delimiter = (
            "\t"
            if path.suffix.lower() == ".tsv" or "\t" in header
            else ";"
            if ";" in header and "," not in header
            else ","
        )
        self.columns = next(csv.reader([header], delimiter=self.delimiter), [])
        if not any(self.columns):
            raise SourceError(f"{path}: no header line with column names")

    def rows(self, image: str) -> Iterator[Row]:
        csv.field_size_limit(MAX_FIELD)  # the boxes of a crowded image are longer than the default allows
        with self._open() as file:
            reader = csv.DictReader(file, delimiter=self.delimiter, strict=True)
            try:
                for values in reader:
                    if None in values or None in values.values():
                        raise AnnotationError(
                            f"{self.path}:{reader.line_num}: expected {len(self.columns)} columns, "
                            f"found {'more' if None in values else 'fewer'}"
                        )
                    yield str(reader.line_num), values, None
            except (csv.Error, UnicodeDecodeError) as error:
                raise AnnotationError(f"{self.path}:{reader.line_num}: {error}") from None

    def _open(self) -> Any:
        try:
            return io.TextIOWrapper(open_regular(self.path), encoding="utf-8-sig", newline="")
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}") from None


class ParquetTable:
    """Parquet. A row's place is its number from 0. Image bytes stay in the file while rows are listed."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            open_regular(path).close()
            self.file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
        self.columns = list(self.file.schema_arrow.names)

    def rows(self, image: str) -> Iterator[Row]:
        import pyarrow.types as types

        kind = self.file.schema_arrow.field(image).type
        stored = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        columns = [name for name in self.columns if name != image or not stored]
        number = 0
        for group in range(self.file.num_row_groups):
            count = self.file.metadata.row_group(group).num_rows
            values = self._group_rows(group, columns, count)
            for row, record in enumerate(values):
                cell = ParquetCell(str(self.path), image, group, row, number) if stored else None
                yield f"row {number}", record, cell
                number += 1

    def _group_rows(self, group: int, columns: list[str], count: int) -> Iterator[Mapping[str, Any]]:
        if not columns:
            yield from ({} for _ in range(count))
            return
        for batch in self.file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
            yield from batch.to_pylist()


def open_table(file: Path) -> TableFile:
    return ParquetTable(file) if file.suffix.lower() == ".parquet" else CsvTable(file)


def list_tables(path: Path) -> list[tuple[Path, str | None]]:
    """The table files and the split that their names speak of; None: the rows say it.

    Raises SourceError when a folder holds several tables that are not splits.
    """
    if not path.is_dir():
        return [(path, split_of_name(path) if path.suffix.lower() == ".parquet" else None)]
    files = sorted(
        f for folder in (path, path / "data") for f in folder.glob("*") if f.suffix.lower() in TABLE_SUFFIXES
    )
    if not files:
        raise SourceError(f"no table in {path}: looked for {', '.join(TABLE_SUFFIXES)}")
    if len(files) == 1:
        return [(files[0], split_of_name(files[0]))]
    splits = {file: split_of_name(file) for file in files}
    odd = [file.name for file, split in splits.items() if split is None]
    if odd:
        raise SourceError(
            f"{path} holds several tables, and {', '.join(odd)} name no split: give the path of one"
        )
    return list(splits.items())


def split_of_name(file: Path) -> str | None:
    """`train-00000-of-00002.parquet` and `train.csv` → `train`."""
    first = re.split(r"[^a-z]+", file.stem.lower(), maxsplit=1)[0]
    return SPLIT_NAMES.get(first)


@lru_cache(maxsize=2)
def _read_group(file: str, column: str, group: int, process: int, changed_ns: int) -> Any:
    """One column of a row group: neighbouring rows are read one after the other."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column]).column(column)
