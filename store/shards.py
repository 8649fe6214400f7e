"""Arrays in shards: where a row is stored, and how shard files are written and opened.

Uncompressed chunks follow one another in a shard file, so a row's place is a multiplication:

    data of all chunks (last one zero-padded) | index: (offset, length) uint64 a chunk | crc32c

Absent chunks have offset and length 2^64 - 1. zarr-python and tensorstore read this bit-exactly.

A shard file is written under a temporary name, and published when it is full.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from files.writing import publish
from store.errors import StoreError
from store.format import ArraySpec

PARTIAL = ".partial"
BLOCK_BYTES = 32 * 1024 * 1024  # what is read or written at a time where a whole array is
CHECKSUM_BYTES = 4 << 20
ABSENT = 2**64 - 1
DIRECT_CHUNK_BYTES = 256 * 1024
DIRECT_SHARD_BYTES = 160 * 1024 * 1024
SMALL_CHUNK_BYTES = 32 * 1024
SMALL_SHARD_BYTES = 32 * 1024 * 1024
MIN_SHARD_ROWS, MAX_SHARD_ROWS = 1024, 65_536
MIN_SMALL_SHARD_ROWS = 4096  # keeps shards a multiple of the page size whatever the row's bytes
ZSTD_LEVEL = 3


def power_of_two_below(value: int) -> int:
    """The largest power of two that is at most `value`; 1 for anything smaller."""
    return 1 << (max(1, value).bit_length() - 1)


def choose_shard_rows(specs: list[ArraySpec]) -> int:
    """Rows a shard, one number for all direct arrays, so that a shard is a unit of work."""
    largest = max((spec.row_bytes for spec in specs if spec.direct), default=1)
    rows = power_of_two_below(DIRECT_SHARD_BYTES // max(1, largest))
    return min(MAX_SHARD_ROWS, max(MIN_SHARD_ROWS, rows))


@dataclass(frozen=True)
class Layout:
    """One array's geometry. `rows` is the length of the first axis (entries for ragged arrays)."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    shard_rows: int
    codec: str = "none"

    @classmethod
    def of(cls, spec: ArraySpec, rows: int, shard_rows: int) -> Layout:
        """The layout of a new array. `shard_rows` counts for direct arrays only."""
        row_bytes = max(1, spec.row_bytes)
        if spec.direct:
            chunk_rows = min(shard_rows, power_of_two_below(DIRECT_CHUNK_BYTES // row_bytes))
        else:
            chunk_rows = power_of_two_below(SMALL_CHUNK_BYTES // row_bytes)
            shard_rows = max(MIN_SMALL_SHARD_ROWS, power_of_two_below(SMALL_SHARD_BYTES // row_bytes))
        return cls(rows, spec.row_shape, np.dtype(spec.dtype), chunk_rows, shard_rows, spec.codec)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], name: str) -> Layout:
        """Read back what `metadata` made. Raises StoreError for an array that is not ours."""
        try:
            sharding = metadata["codecs"][0]
            inner = sharding["configuration"]
            codecs = [codec["name"] for codec in inner["codecs"]]
            grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            shape = metadata["shape"]
            layout = cls(
                rows=shape[0],
                row_shape=tuple(shape[1:]),
                dtype=np.dtype(metadata["data_type"]),
                chunk_rows=inner["chunk_shape"][0],
                shard_rows=grid[0],
                codec="zstd" if "zstd" in codecs else "none",
            )
        except (KeyError, IndexError, TypeError) as error:
            raise StoreError(f"{name}: array metadata is not of this format ({error!r})") from error
        return layout

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.row_shape)

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.row_shape, dtype=np.int64))

    @property
    def shard_bytes(self) -> int:
        """Bytes of a full shard's data, index excluded."""
        return self.shard_rows * self.row_bytes

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def rows_in(self, shard: int) -> int:
        """Rows that shard number `shard` holds."""
        return min(self.rows, (shard + 1) * self.shard_rows) - shard * self.shard_rows

    def data_bytes(self, rows: int) -> int:
        """Bytes of the data region of a shard with `rows` rows: whole chunks."""
        return -(-rows // self.chunk_rows) * self.chunk_rows * self.row_bytes

    def shard_key(self, shard: int) -> str:
        """The shard's file, relative to the array's folder."""
        return "/".join(["c", str(shard), *["0"] * len(self.row_shape)])

    def metadata(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """The array's zarr.json (Zarr v3, sharding_indexed, little-endian bytes)."""
        little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        values = little if self.dtype.itemsize > 1 else {"name": "bytes"}
        zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.row_shape],
            "codecs": [values, zstd] if self.codec == "zstd" else [values],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        regular = {"chunk_shape": [self.shard_rows, *self.row_shape]}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": regular},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # Not 0: zarr drops chunks that are all fill value, and a hole should look like one.
            "fill_value": "NaN" if self.dtype.kind == "f" else (False if self.dtype.kind == "b" else 0),
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": attributes,
            "storage_transformers": [],
        }


def blocks(first: int, end: int, row_bytes: int, most: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """The rows [first, end) in ranges of about `most` bytes."""
    step = max(1, most // max(1, row_bytes))
    for start in range(first, end, step):
        yield start, min(end, start + step)


def encode_index(lengths: list[int], chunks_per_shard: int) -> bytes:
    """The index of chunks that follow one another, with its crc32c."""
    index = np.full((chunks_per_shard, 2), ABSENT, dtype="<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if lengths else 0
    data = index.tobytes()
    return data + struct.pack("<I", crc32c(data))


def linear_index(layout: Layout, rows: int) -> bytes:
    """The index of an uncompressed shard with `rows` rows."""
    chunks = -(-rows // layout.chunk_rows)
    return encode_index([layout.chunk_rows * layout.row_bytes] * chunks, layout.chunks_per_shard)


READ_BLOCK = 8 * 1024 * 1024


class ShardFile:
    """Appends rows to one shard. `written` and `crc` always describe the file's bytes so far."""

    def __init__(self, folder: Path, layout: Layout, shard: int) -> None:
        self.layout, self.shard = layout, shard
        self.final = folder / layout.shard_key(shard)
        self.partial = self.final.with_name(self.final.name + PARTIAL)
        self.written, self.crc = 0, 0
        self._fd: int | None = None

    def checksums(self, lengths: list[int]) -> list[int | None]:
        """crc32c of the first so many bytes, for ascending lengths; None beyond the file's end."""
        path = self.partial if self.partial.exists() else self.final
        if self.layout.codec != "none" or not path.exists():
            path = self.partial  # the checksum of a final compressed file is not that of the rows' bytes
        sums: list[int | None] = []
        position, crc = 0, 0
        with path.open("rb") if path.exists() else BytesIO() as file:
            for length in lengths:
                while position < length and (data := file.read(min(READ_BLOCK, length - position))):
                    position, crc = position + len(data), crc32c(data, crc)
                sums.append(crc if position == length else None)
        return sums

    def resume(self, written: int, crc: int) -> None:
        """Take up a file of which `written` bytes with checksum `crc` are committed; the rest is dropped."""
        if self.layout.codec == "none" and self.final.exists() and not self.partial.exists():
            # Killed between the rename and the record of it.
            os.replace(self.final, self.partial)
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._fd, written)
        os.lseek(self._fd, written, os.SEEK_SET)
        self.written, self.crc = written, crc

    def append(self, data: bytes | np.ndarray) -> None:
        """Append bytes, or rows [b, ...] of the layout's dtype, C-contiguous."""
        write_all(self.fd, data)
        self.crc = crc32c(data, self.crc)
        self.written += data.nbytes if isinstance(data, np.ndarray) else len(data)

    def sync(self) -> None:
        os.fsync(self.fd)

    def finish(self, rows: int) -> tuple[int, int]:
        """Pad to whole chunks, add the index, publish. Returns (bytes, crc32c) of the whole file."""
        self.append(bytes(self.layout.data_bytes(rows) - self.written))
        if self.layout.codec == "zstd":
            return self._finish_compressed()
        self.append(linear_index(self.layout, rows))
        self.close()
        publish(self.partial, self.final)
        return self.written, self.crc

    def _finish_compressed(self) -> tuple[int, int]:
        """Compress chunk by chunk into a second file. The partial one stays until the commit is recorded."""
        from numcodecs.zstd import Zstd

        codec = Zstd(level=ZSTD_LEVEL)
        chunk = self.layout.chunk_rows * self.layout.row_bytes
        target = ShardFile(self.final.parent, self.layout, self.shard)
        target.final, target.partial = self.final, self.final.with_name(self.final.name + ".zstd" + PARTIAL)
        lengths = []
        for start in range(0, self.written, chunk):
            packed = bytes(codec.encode(os.pread(self.fd, chunk, start)))
            target.append(packed)
            lengths.append(len(packed))
        target.append(encode_index(lengths, self.layout.chunks_per_shard))
        target.close()
        self.close()
        publish(target.partial, self.final)
        return target.written, target.crc

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def fd(self) -> int:
        if self._fd is None:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self._fd


def checksum_of(fd: int, length: int) -> int:
    """crc32c of the first `length` bytes of a file."""
    crc, position = 0, 0
    while position < length:
        block = os.pread(fd, min(READ_BLOCK, length - position), position)
        if not block:
            break
        crc = crc32c(block, crc)
        position += len(block)
    return crc


def read_data(folder: Path, layout: Layout, start: int, stop: int) -> Iterator[bytes]:
    """Bytes start:stop of an uncompressed array's values, in blocks, straight from the shard files."""
    position = start
    while position < stop:
        shard, offset = divmod(position, layout.shard_bytes)
        path = folder / layout.shard_key(shard)
        length = min(READ_BLOCK, stop - position, layout.shard_bytes - offset)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            raise StoreError(f"{path}: truncated: {len(data)} bytes at {offset}, expected {length}")
        yield data
        position += length


class ArrayWriter:
    """Writes a whole array of any length front to back, shard after shard, bytes as they come."""

    def __init__(self, folder: Path, layout: Layout, finished: Sequence[tuple[int, int]] = ()) -> None:
        """finished: (bytes, crc32c) of full shards that are there already."""
        self.folder, self.layout = folder, layout
        self.finished = [(size, crc) for size, crc in finished]
        self._file: ShardFile | None = None

    def append(self, data: bytes) -> None:
        """Append bytes of consecutive entries; they may end anywhere."""
        view = memoryview(data)
        while view:
            if self._file is None:
                self._file = ShardFile(self.folder, self.layout, len(self.finished))
            room = self.layout.shard_bytes - self._file.written
            self._file.append(bytes(view[:room]))
            view = view[room:]
            if self._file.written == self.layout.shard_bytes:
                self._finish(self.layout.shard_rows)

    def close(self) -> list[tuple[int, int]]:
        """Finish the last shard. Returns (bytes, crc32c) of every shard file."""
        if self._file is not None:
            self._finish(self.layout.rows_in(len(self.finished)))
        return self.finished

    def _finish(self, rows: int) -> None:
        assert self._file is not None
        self.finished.append(self._file.finish(rows))
        self._file = None


def crc32c(data: bytes | np.ndarray, start: int = 0) -> int:
    """crc32c of `data`, continuing from `start`. Arrays must be C-contiguous.

    The library holds the interpreter's lock while it computes: in pieces, other threads get their turn.
    """
    view = np.frombuffer(byte_view(data), np.uint8)
    for first in range(0, len(view), CHECKSUM_BYTES):
        start = int(google_crc32c.extend(start, view[first : first + CHECKSUM_BYTES]))
    return start


def byte_view(data: bytes | np.ndarray) -> memoryview:
    """The bytes of C-contiguous data, without a copy."""
    buffer: Any = data
    size = data.nbytes if isinstance(data, np.ndarray) else len(data)
    return memoryview(buffer).cast("B") if size else memoryview(b"")


def write_all(fd: int, data: bytes | np.ndarray) -> None:
    """`os.write` until everything is written."""
    view = byte_view(data)
    while view:
        view = view[os.write(fd, view) :]


def open_shard(folder: Path, layout: Layout, shard: int) -> int:
    """An open file descriptor of a shard whose index is what it must be. Raises StoreError otherwise."""
    path = folder / layout.shard_key(shard)
    rows = layout.rows_in(shard)
    where = f"{path} (rows {shard * layout.shard_rows}:{shard * layout.shard_rows + rows})"
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise StoreError(
            f"{where}: shard is missing; restore it, or extract again with --overwrite"
        ) from error
    index, data = linear_index(layout, rows), layout.data_bytes(rows)
    size = os.fstat(fd).st_size
    problem = None
    if size != data + len(index):
        problem = f"{size} bytes, expected {data + len(index)}; the shard is truncated or damaged"
    elif os.pread(fd, len(index), data) != index:
        problem = "the shard's index is damaged"
    if problem:
        os.close(fd)
        raise StoreError(f"{where}: {problem}; restore it, or extract again with --overwrite")
    return fd
