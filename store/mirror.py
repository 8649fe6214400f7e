"""A remote store's shards on this machine: downloaded when they are first needed, checked, and shared by all processes.

    <cache>/<store>/               a folder a store, named after its address and the content of its zarr.json
        <split>/<array>/c/…        shard files, as in the store
        .commits/…                 the checksums, as in the store
        .locks/…                   who is downloading which shard

Reading then has the speed of a local store. The cache is bounded: the shards that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from files.cache import cache_folder
from files.locking import locked
from store.arrays import MappedArray, ZarrArray
from store.errors import StoreError, disk_errors
from store.metadata import ZARR_JSON, recorded_checksum, to_json
from store.remote import FIRST_PAUSES_S, RemoteFiles
from store.shards import PARTIAL, Layout, crc32c

if TYPE_CHECKING:
    from store.reader import Split

CACHE_VARIABLE, CACHE_GB_VARIABLE = "QWEN_DISTILL_CACHE", "QWEN_DISTILL_CACHE_GB"
FREE_SHARE = 0.8  # of the disk's free space that the cache may take where no limit is given
LOCKS = ".locks"
AHEAD = 2  # files that are downloaded ahead at the same time, so that the line has no pauses between them
READS = 5  # of rows whose shards another process deleted meanwhile
DOWNLOADS = 3  # of a shard whose bytes are not what they should be

Value = TypeVar("Value")
log = logging.getLogger(__name__)


def use_cache(folder: Path | None, gigabytes: float | None) -> None:
    """Choose the cache of this process and of those that it starts; None leaves what the environment says."""
    if folder is not None:
        os.environ[CACHE_VARIABLE] = os.path.abspath(folder)
    if gigabytes is not None:
        os.environ[CACHE_GB_VARIABLE] = str(gigabytes)


def cache_limit(folder: Path) -> int:
    """Bytes that the cache may hold: `$QWEN_DISTILL_CACHE_GB`, else four fifths of what it has and the disk has free."""
    if chosen := os.environ.get(CACHE_GB_VARIABLE):
        try:
            limit = float(chosen)
        except ValueError:
            limit = -1
        if not limit > 0:
            raise StoreError(f"{CACHE_GB_VARIABLE}: expected a number of gigabytes above 0, got {chosen!r}")
        return int(limit * 1e9)
    return int(
        FREE_SHARE * (shutil.disk_usage(folder).free + sum(size for _, size, _ in cached_files(folder)))
    )


def cached_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of the shard files in the cache."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):  # another process made room
                status = path.stat()
                yield status.st_mtime, status.st_size, path


class Mirror:
    """The local part of one remote store. Safe to share between threads and processes, to fork and to pickle."""

    def __init__(self, url: str) -> None:
        """Read the store's zarr.json. Raises StoreError when there is no store or it cannot be read."""
        self.url, self.remote = url, RemoteFiles(url)
        if "***" in url:
            raise StoreError(
                f"{url}: the password was left out when this address was recorded: give the address again"
            )
        try:
            content = self.remote.read(ZARR_JSON, FIRST_PAUSES_S)
        except FileNotFoundError as error:
            raise StoreError(f"{url}: no such store (no zarr.json at this address)") from error
        try:
            self.root: dict[str, Any] = json.loads(content)
        except ValueError as error:
            raise StoreError(f"{url}/{ZARR_JSON}: not valid JSON ({error})") from error
        if not isinstance(self.root, dict):
            raise StoreError(f"{url}/{ZARR_JSON}: not a Zarr group")
        self.cache = cache_folder("stores", CACHE_VARIABLE)
        self.folder = self.cache / blake2b(url.encode() + b"\0" + content, digest_size=12).hexdigest()

    @cached_property
    def limit(self) -> int:
        """Bytes of the whole cache."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            return cache_limit(self.cache)

    @cached_property
    def fits(self) -> bool:
        """Whether the whole store fits into the cache; else shards are dropped while others come."""
        nodes = self.root.get("consolidated_metadata", {}).get("metadata", {})
        arrays = (node for node in nodes.values() if node["node_type"] == "array")
        layouts = [Layout.from_metadata(node, self.url) for node in arrays]
        return sum(layout.rows * layout.row_bytes for layout in layouts) <= self.limit

    def open_array(self, split: str, name: str, metadata: dict[str, Any]) -> MirroredArray:
        """An array with the metadata of its zarr.json."""
        array = f"{split}/{name}"
        layout = Layout.from_metadata(metadata, f"{self.url}/{array}")
        if layout.codec != "none":  # zarr reads it from the mirror
            with disk_errors(self.folder):
                replace_here(self.folder / array / ZARR_JSON, to_json(metadata))
        return MirroredArray(self, array, layout)

    def path_of(self, array: str, layout: Layout, shard: int) -> Path:
        return self.folder / array / layout.shard_key(shard)

    def fetch(self, array: str, layout: Layout, shard: int) -> None:
        """Have the shard here; one process downloads it while others that need it wait. Raises StoreError."""
        path = self.path_of(array, layout, shard)
        with disk_errors(path):
            lock = self.folder / LOCKS / f"{array.replace('/', '-')}-{shard}"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with locked(lock):
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._download(array, layout, shard, path)
            self.touch(path)

    def touch(self, path: Path) -> None:
        """Note that a shard is in use."""
        with contextlib.suppress(FileNotFoundError):  # another process made room
            os.utime(path)

    def check(self, array: str, layout: Layout, shard: int) -> None:
        """Read the shard at its address, also when it is here, and compare it. Raises StoreError."""
        if self.path_of(array, layout, shard).exists():
            self._receive(array, layout, shard, Path(os.devnull))
        else:
            self.fetch(array, layout, shard)

    def _download(self, array: str, layout: Layout, shard: int, path: Path) -> None:
        partial = path.with_name(path.name + PARTIAL)
        expected = recorded_checksum(self._record, array, shard)
        self._make_room(expected[0] if expected else layout.data_bytes(layout.rows_in(shard)))
        try:
            self._receive(array, layout, shard, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _receive(self, array: str, layout: Layout, shard: int, target: Path) -> None:
        """Write the shard's bytes to `target`, again where they are not those of the store. Raises StoreError."""
        key = f"{array}/{layout.shard_key(shard)}"
        first = shard * layout.shard_rows
        where = f"{self.url}/{key} (rows {first}:{first + layout.rows_in(shard)})"
        expected = recorded_checksum(self._record, array, shard)
        got = (0, 0)
        for _ in range(DOWNLOADS):
            got = (0, 0)
            try:
                with target.open("wb") as file:
                    for block in self.remote.blocks(key, expected[0] if expected else None):
                        file.write(block)
                        got = (got[0] + len(block), crc32c(block, got[1]))
            except FileNotFoundError as error:
                raise StoreError(
                    f"{where}: shard is missing; copy the store again, or extract again with --overwrite"
                ) from error
            if expected is None or got == expected:
                return
            log.warning(
                "%s: %d bytes arrived that are not those of the store; downloading it again", where, got[0]
            )
        assert expected is not None
        raise StoreError(
            f"{where}: the shard is damaged: got {got[0]} bytes with crc32c {got[1]:08x}, expected {expected[0]} bytes "
            f"with {expected[1]:08x}; copy the store again"
        )

    def _record(self, file: str) -> Mapping[str, Any]:
        """The checksums of a split's arrays, kept here once they are read."""
        path = self.folder / file
        if not path.exists():
            try:
                content = self.remote.read(file)
            except FileNotFoundError:  # many web servers hide names that begin with a dot
                log.warning("%s: no checksums at %s: downloads are not compared", self.url, file)
                content = b"{}"
            replace_here(path, content)
        record: Mapping[str, Any] = json.loads(path.read_bytes())
        return record

    def _make_room(self, size: int) -> None:
        """Delete the shards that were not used for longest, of any store, until `size` bytes more fit."""
        with locked(self.cache / ".lock"):
            files = sorted(cached_files(self.cache))
            used = sum(size for _, size, _ in files)
            for _, bytes_, path in files:
                if used + size <= self.limit:
                    return
                path.unlink(missing_ok=True)  # a process that has mapped it keeps it until it is done
                used -= bytes_


def download_ahead(split: Split, names: Sequence[str], rows: np.ndarray, shard_rows: int) -> None:
    """Begin to download what `rows` need of these arrays, in their order; returns at once.

    Does nothing where not all fits into the cache. An error is left to the reader that meets it again.
    """
    if split.mirror is None or not split.mirror.fits:
        return
    shards = rows // shard_rows
    first = np.unique(shards, return_index=True)[1]

    def download(shard: int, name: str) -> None:
        download_rows(split, name, shard * shard_rows, min(len(split), (shard + 1) * shard_rows))

    def download_all() -> None:
        order = shards[np.sort(first)].tolist()
        # All of the line is for the first shard, with which the training starts.
        with ThreadPoolExecutor(AHEAD, "store-download-ahead") as pool, contextlib.suppress(StoreError):
            for part in (order[:1], order[1:]):
                for _ in pool.map(download, *zip(*product(part, names), strict=True)) if part else ():
                    pass

    threading.Thread(target=download_all, name="store-download-ahead", daemon=True).start()


def download_rows(split: Split, name: str, start: int, stop: int) -> None:
    """Have the shards with the rows start:stop of an array in the cache. Raises StoreError."""
    array = split.array(name)
    assert isinstance(array, MirroredArray)
    if name in split.specs and split.specs[name].ragged:
        offsets = split.array(split.specs[name].offsets_name).slice(start, stop + 1)
        start, stop = int(offsets[0]), int(offsets[-1])
    if start < stop:
        size = array.layout.shard_rows
        array.download(range(start // size, -(-stop // size)))


def replace_here(path: Path, content: bytes) -> None:
    """Write a small file of the cache, whole, while others may do the same. It can be downloaded again: no fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    partial.write_bytes(content)
    os.replace(partial, path)


class MirroredArray:
    """The interface of `MappedArray` over a remote array, whose shards come when rows of them are first asked for."""

    def __init__(self, mirror: Mirror, array: str, layout: Layout) -> None:
        self.mirror, self.array, self.layout = mirror, array, layout
        folder = mirror.folder / array
        self.local: MappedArray | ZarrArray
        if layout.codec == "none":
            self.local = MappedArray(folder, layout, filled=False, one_map=mirror.fits)
        else:
            self.local = ZarrArray(str(folder), layout)
        # Whether a shard that was opened can be read from then on: its map outlives the file.
        self.stays = layout.codec == "none" and mirror.fits
        self._here = np.zeros(max(1, layout.shards), bool)  # shards that this process has opened
        self._all_here = False  # and they stay: from then on, reading costs what it costs of a local store
        self._lock_here = os.getpid(), threading.RLock()

    @property
    def _lock(self) -> threading.RLock:
        """One of its own after a fork: the parent's may be held by a thread that the child does not have."""
        if self._lock_here[0] != os.getpid():
            self._lock_here = os.getpid(), threading.RLock()
        return self._lock_here[1]

    def __len__(self) -> int:
        return self.layout.rows

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out[i] = array[rows[i]]."""
        if self._all_here:
            self.local.take(rows, out)
            return
        shards = rows // self.layout.shard_rows
        if self.stays and self._here[shards].all():
            self.local.take(rows, out)
        else:
            self._read(np.unique(shards).tolist(), lambda: self.local.take(rows, out))

    def slice(self, start: int, stop: int) -> np.ndarray:
        """array[start:stop], a view where that is possible."""
        if self._all_here:
            return self.local.slice(start, stop)
        stop = min(stop, len(self))
        if start >= stop:
            return self.local.slice(start, stop)
        first, last = start // self.layout.shard_rows, (stop - 1) // self.layout.shard_rows
        if self.stays and self._here[first : last + 1].all():
            return self.local.slice(start, stop)
        return self._read(list(range(first, last + 1)), lambda: self.local.slice(start, stop))

    def prefetch(self, rows: np.ndarray) -> None:
        """As of a local array, for the shards that are here."""
        here = rows if self._all_here else rows[self._here[rows // self.layout.shard_rows]]
        if len(here):
            self.local.prefetch(here)

    def download(self, shards: Sequence[int]) -> None:
        """Have these shards in the cache, for a thread that does not read them itself. Raises StoreError."""
        for shard in shards:
            if not self._here[shard]:
                self.mirror.fetch(self.array, self.layout, shard)

    def fetch(self, shards: Sequence[int]) -> None:
        """Have these shards here and open them. Raises StoreError."""
        with self._lock:
            for shard in shards:
                path = self.mirror.path_of(self.array, self.layout, shard)
                if self._here[shard] and (self.stays or path.exists()):
                    continue
                self.mirror.fetch(self.array, self.layout, shard)
                self._forget_deleted(shards)
                if isinstance(self.local, MappedArray):
                    self.local.add(shard)
                self._here[shard] = True
            self._all_here = self.stays and bool(self._here.all())

    def _read(self, shards: Sequence[int], read: Callable[[], Value]) -> Value:
        """`read` with these shards here. Another process may make room at any moment: zarr would make values up."""
        with self._lock:
            for _ in range(READS):
                self.fetch(shards)
                value = read()
                paths = [self.mirror.path_of(self.array, self.layout, shard) for shard in shards]
                for path in paths:
                    self.mirror.touch(path)
                if isinstance(self.local, MappedArray) or all(path.exists() for path in paths):
                    return value
        raise StoreError(
            f"{self.mirror.cache}: too small for what is read at once: raise {CACHE_GB_VARIABLE} or free some space"
        )

    def _forget_deleted(self, kept: Sequence[int]) -> None:
        """Where not all shards fit: drop the maps of deleted files, which keep their space."""
        if self.stays:
            return
        for shard in np.flatnonzero(self._here).tolist():
            if shard not in kept and not self.mirror.path_of(self.array, self.layout, shard).exists():
                if isinstance(self.local, MappedArray):
                    self.local.drop(shard)
                self._here[shard] = False

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_here": np.zeros_like(self._here), "_all_here": False}
        del state["_lock_here"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock_here=(0, threading.RLock()))
