"""One shard file while it is written: appended to under a temporary name, published when full."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from store.errors import StoreError
from store.files import PARTIAL, crc32c, publish, write_all
from store.layout import ZSTD_LEVEL, Layout, encode_index, linear_index

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
            path = self.partial  # a final compressed file says nothing about the rows' bytes
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

    def append(self, rows: np.ndarray) -> None:
        """Append rows [b, ...] of the layout's dtype, C-contiguous."""
        self._write(rows)

    def sync(self) -> None:
        os.fsync(self.fd)

    def finish(self, rows: int) -> tuple[int, int]:
        """Pad to whole chunks, add the index, publish. Returns (bytes, crc32c) of the whole file."""
        self._write(bytes(self.layout.data_bytes(rows) - self.written))
        if self.layout.codec == "zstd":
            return self._finish_compressed()
        self._write(linear_index(self.layout, rows))
        self.sync()
        self.close()
        publish(self.partial, self.final)
        return self.written, self.crc

    def discard_partial(self) -> None:
        """Once the shard's last commit is recorded, nothing needs its uncompressed rows."""
        self.partial.unlink(missing_ok=True)

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
            target._write(packed)
            lengths.append(len(packed))
        target._write(encode_index(lengths, self.layout.chunks_per_shard))
        target.sync()
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

    def _write(self, data: bytes | np.ndarray) -> None:
        write_all(self.fd, data)
        self.crc = crc32c(data, self.crc)
        self.written += data.nbytes if isinstance(data, np.ndarray) else len(data)


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
            self._file._write(bytes(view[:room]))
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
