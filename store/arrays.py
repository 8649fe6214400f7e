"""How rows of an array are read in the fastest way possible, wherever its shards are.

A local, uncompressed array is read as one memory map over all its shard files (`MappedArray`): their data regions are mapped
back to back into one reserved address range (MAP_FIXED), so the whole array is one numpy array and a gather is one
`np.take`. No file stays open, and nothing is read before it is used. Where a shard's size is not a multiple of the page
size, or outside Linux, each shard has its own map and rows are taken shard by shard.

Compressed arrays are read through zarr (`ZarrArray`). zarr treats a missing shard as full of fill values, so the existence
of each shard is checked before its first use. The shards of a remote array come to this machine first (mirror.py).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from store.errors import StoreError
from store.metadata import read_json
from store.shards import Layout, open_shard

PROT_NONE, MAP_FIXED, MAP_NORESERVE, MADV_WILLNEED = 0, 0x10, 0x4000, 3
FAILED = ctypes.c_void_p(-1).value


class RowArray(Protocol):
    """One array of a split, read by row, wherever its shards are."""

    layout: Layout

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out[i] = array[rows[i]]. Rows must be checked before."""

    def slice(self, start: int, stop: int) -> np.ndarray:
        """array[start:stop], a view where that is possible."""

    def prefetch(self, rows: np.ndarray) -> None:
        """Ask the system to read these rows soon. Returns at once."""


def open_array(path: str, split: str, name: str, metadata: dict[str, Any]) -> RowArray:
    """The fastest way to an array of a local store: memory maps for an uncompressed one, else zarr."""
    layout = Layout.from_metadata(metadata, f"{path}/{split}/{name}")
    if layout.codec != "none":
        return ZarrArray(f"{path}/{split}/{name}", layout)
    return MappedArray(Path(path) / split / name, layout)


# -- memory maps --------------------------------------------------------------------------------------


class MappedArray:
    """Read-only view of one array. Safe to fork, to share between threads and to pickle (without the maps).

    `filled`: every shard is there; otherwise rows of a shard can be read after `add`. `one_map`: where possible; with a
    map for each shard, single shards can be dropped again.
    """

    def __init__(self, folder: Path, layout: Layout, *, filled: bool = True, one_map: bool = True) -> None:
        self.folder, self.layout, self.filled, self.one_map = folder, layout, filled, one_map
        self._maps: _OneMap | _ShardMaps | None = None

    @classmethod
    def open(cls, split: Path, name: str) -> MappedArray:
        """Raises StoreError when the array is missing or its metadata is not of this format."""
        path = split / name / "zarr.json"
        if not path.exists():
            raise StoreError(f"{split}: no array {name!r}")
        return cls(split / name, Layout.from_metadata(read_json(path), f"{split}/{name}"))

    def __len__(self) -> int:
        return self.layout.rows

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out[i] = array[rows[i]]. Rows must be checked: a wrong one is clipped, not refused."""
        self.maps.take(rows, out)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """array[start:stop], a view where that is possible."""
        return self.maps.slice(start, min(stop, len(self)))

    def prefetch(self, rows: np.ndarray) -> None:
        """Ask the system to read these rows' pages soon. Returns at once."""
        self.maps.prefetch(rows)

    @property
    def maps(self) -> _OneMap | _ShardMaps:
        maps = self._maps
        if maps is None:  # Two threads may both map; one of the two is dropped again.
            whole = (
                self.one_map
                and sys.platform == "linux"
                and (self.layout.shards <= 1 or self.layout.shard_bytes % mmap.PAGESIZE == 0)
            )
            maps = _OneMap(self.folder, self.layout) if whole else _ShardMaps(self.folder, self.layout)
            for shard in range(self.layout.shards if self.filled else 0):
                maps.add(shard)
            self._maps = maps
        return maps

    def add(self, shard: int) -> None:
        """Map a shard that is there now."""
        self.maps.add(shard)

    def drop(self, shard: int) -> None:
        """Unmap a shard as soon as no view of it is in use; only without `one_map`."""
        maps = self.maps
        assert isinstance(maps, _ShardMaps)
        maps.parts.pop(shard, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}


class _Region:
    """An address range that numpy can look into; unmapped with the last array over it."""

    libc: Any = None

    def __init__(self, size: int, fd: int | None = None) -> None:
        """Reserve `size` bytes, or map that much of a file."""
        if _Region.libc is None:
            _Region.libc = _libc()
        reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sys.platform == "linux" else 0)
        if fd is None:
            self.address = self._mmap(None, size, PROT_NONE, reserve, -1)
        else:
            self.address = self._mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd)
        self.size = size
        weakref.finalize(self, self.libc.munmap, self.address, size).atexit = False

    def place(self, fd: int, offset: int, length: int) -> None:
        """Map the first `length` bytes of a file at `offset` of the range."""
        self._mmap(self.address + offset, length, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, fd)

    def will_need(self, start: int, stop: int) -> None:
        first = start - start % mmap.PAGESIZE
        self.libc.madvise(self.address + first, stop - first, MADV_WILLNEED)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        interface = {"version": 3, "shape": shape, "typestr": dtype.str, "data": (self.address, True)}
        return np.asarray(_Exposed(self, interface))

    def _mmap(self, address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
        got = self.libc.mmap(address, size, protection, flags, fd, 0)
        if got == FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise StoreError(f"cannot map {size} bytes: {reason}; raise vm.max_map_count or free memory")
        return int(got)


class _Exposed:
    """What numpy keeps as the owner of an array's memory."""

    def __init__(self, region: _Region, interface: dict[str, Any]) -> None:
        self.region, self.__array_interface__ = region, interface


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class _OneMap:
    """Every shard in one address range. Reading rows of a shard that was not added ends the process."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.row_bytes = layout.row_bytes
        self.region: _Region | None = None
        self.array = np.empty((0, *layout.row_shape), layout.dtype)
        if layout.rows == 0 or layout.row_bytes == 0:
            return
        last = layout.shards - 1
        self.region = _Region(last * layout.shard_bytes + layout.data_bytes(layout.rows_in(last)))
        self.array = self.region.array(layout.shape, layout.dtype)

    def add(self, shard: int) -> None:
        """Map the shard's file to its place. Raises StoreError when it is missing or damaged."""
        if self.region is None:
            return
        layout = self.layout
        fd = open_shard(self.folder, layout, shard)
        try:
            self.region.place(fd, shard * layout.shard_bytes, layout.data_bytes(layout.rows_in(shard)))
        finally:
            os.close(fd)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        # mode="raise" would gather into a buffer first and cost up to three quarters of the speed.
        self.array.take(rows, axis=0, out=out, mode="clip")

    def slice(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def prefetch(self, rows: np.ndarray) -> None:
        if self.region is not None:
            for start, stop in _runs(rows):
                self.region.will_need(start * self.row_bytes, stop * self.row_bytes)


class _ShardMaps:
    """A map for each shard, made when it is first touched."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.parts: dict[int, _OneMap] = {}

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        shards = rows // self.layout.shard_rows
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            out[here] = self._part(shard).array[rows[here] - shard * self.layout.shard_rows]

    def slice(self, start: int, stop: int) -> np.ndarray:
        size = self.layout.shard_rows
        parts = [
            self._part(shard).array[max(0, start - shard * size) : stop - shard * size]
            for shard in range(start // size, -(-stop // size))
        ]
        if not parts:
            return np.empty((0, *self.layout.row_shape), self.layout.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def prefetch(self, rows: np.ndarray) -> None:
        shards = rows // self.layout.shard_rows
        for shard in np.unique(shards).tolist():
            self._part(shard).prefetch(rows[shards == shard] - shard * self.layout.shard_rows)

    def add(self, shard: int) -> None:
        """Nothing to do: a shard is mapped when it is first touched."""

    def _part(self, shard: int) -> _OneMap:
        part = self.parts.get(shard)
        if part is None:
            fd = open_shard(self.folder, self.layout, shard)
            try:
                part = _FileMap(fd, self.layout, self.layout.rows_in(shard))
            finally:
                os.close(fd)
            part = self.parts.setdefault(shard, part)
        return part


class _FileMap(_OneMap):
    """One shard file."""

    def __init__(self, fd: int, layout: Layout, rows: int) -> None:
        self.row_bytes = layout.row_bytes
        region = _Region(layout.data_bytes(rows), fd)
        self.region, self.array = region, region.array((rows, *layout.row_shape), layout.dtype)


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Sorted rows as runs of neighbors (first, end)."""
    ordered = np.unique(rows)
    if not len(ordered):
        return []
    breaks = np.flatnonzero(np.diff(ordered) > 1)
    starts = ordered[np.concatenate([[0], breaks + 1])]
    ends = ordered[np.concatenate([breaks, [len(ordered) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


# -- compressed arrays --------------------------------------------------------------------------------


class ZarrArray:
    """The same interface as MappedArray, for a compressed array. Opened again after a fork."""

    def __init__(self, location: str, layout: Layout) -> None:
        self.location, self.layout = location, layout
        self._opened: tuple[int, Any] | None = None
        self._found: set[int] = set()  # shards that are there

    def __len__(self) -> int:
        return self.layout.rows

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out[i] = array[rows[i]]; every chunk is fetched once."""
        if not len(rows):
            return
        once, place = np.unique(rows, return_inverse=True)
        values = self._read(np.unique(once // self.layout.shard_rows), lambda: self.zarr.oindex[once])
        np.take(values, place, axis=0, out=out, mode="clip")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """array[start:stop] in memory."""
        stop = min(stop, len(self))
        if start >= stop:
            return np.empty((0, *self.layout.row_shape), self.layout.dtype)
        shards = np.arange(start // self.layout.shard_rows, (stop - 1) // self.layout.shard_rows + 1)
        return np.asarray(self._read(shards, lambda: self.zarr[start:stop]))

    def prefetch(self, rows: np.ndarray) -> None:
        """Nothing to do: chunks have to be decompressed."""

    @property
    def zarr(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            import zarr

            try:
                self._opened = os.getpid(), zarr.open_array(self.location, mode="r")
            except (FileNotFoundError, ValueError) as error:
                raise StoreError(f"{self.location}: cannot open the array: {error}") from error
        return self._opened[1]

    def _read(self, shards: np.ndarray, read: Callable[[], np.ndarray]) -> np.ndarray:
        """What `read` returns. Raises StoreError naming a shard that is missing or cannot be read."""
        for shard in shards.tolist():
            if shard not in self._found:
                if not os.path.exists(f"{self.location}/{self.layout.shard_key(shard)}"):
                    raise StoreError(
                        f"{self._where(shard)}: shard is missing; restore it, or extract again with --overwrite"
                    )
                self._found.add(shard)
        try:
            return read()
        except Exception as error:  # zarr, codecs and file systems each raise what they like
            for shard in shards.tolist():
                try:
                    self.zarr[shard * self.layout.shard_rows : (shard + 1) * self.layout.shard_rows]
                except Exception as cause:
                    raise StoreError(
                        f"{self._where(shard)}: cannot be read ({cause}); the shard is truncated or damaged: "
                        "restore it, or extract again with --overwrite"
                    ) from cause
            raise StoreError(f"{self.location}: cannot be read: {error}") from error

    def _where(self, shard: int) -> str:
        first = shard * self.layout.shard_rows
        rows = f"rows {first}:{first + self.layout.rows_in(shard)}"
        return f"{self.location}/{self.layout.shard_key(shard)} ({rows})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
