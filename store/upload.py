"""Send the shards of a store that is being written to a URL, in the background, and make room for the next ones.

The store is written to a staging folder by the same writer as any other. Here, a shard whose commit log is finished is

1. compared with the checksums in its log, sent, and compared with what has arrived;
2. recorded, with what the end of the extraction needs of it (`Sent`), in `<shard>.sent` beside its log;
3. committed in the bucket: its log is sent, after its files and its record;
4. deleted here, with the exception of the log, which holds the rows of all small arrays.

After a kill between any two of these steps the next run finds which were done: a shard counts as committed when its log
is in the bucket and its files are as recorded (`is_committed`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from files.writing import replace_file
from store.arrays import MappedArray, RowArray, ZarrArray
from store.errors import StoreError
from store.format import VALID
from store.job import Job, log_path, read_commits, read_parts
from store.remote import LONG_PAUSES_S, Entry, RemoteFiles
from store.shards import PARTIAL, Layout, crc32c
from store.statistics import Moments, moments_of

UPLOADS = 4  # shards at the same time
POLL_S = 0.2

Shard = tuple[str, int]  # split, number
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What is known of a shard whose files are in the bucket, by name of the array."""

    files: Mapping[str, Entry]
    moments: Mapping[str, Moments]

    def to_json(self) -> bytes:
        moments = {name: item.to_json() for name, item in self.moments.items()}
        return json.dumps({"files": self.files, "moments": moments}).encode()

    @classmethod
    def read(cls, path: Path) -> Sent | None:
        """None where there is no record, or a damaged one."""
        try:
            return cls.from_json(path.read_bytes())
        except (FileNotFoundError, StoreError):
            return None

    @classmethod
    def from_json(cls, data: bytes) -> Sent:
        """Raises StoreError for anything but such a record."""
        try:
            values: dict[str, Any] = json.loads(data)
            files = {name: Entry(*item) for name, item in values["files"].items()}
            return cls(files, {name: Moments.from_json(item) for name, item in values["moments"].items()})
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"record of an uploaded shard is damaged ({error!r})") from error


def sent_path(store: Path, job: Job, shard: Shard) -> Path:
    return log_path(store, job, *shard).with_suffix(".sent")


def uploaded_shards(store: Path, job: Job) -> int:
    """How many shards of a staging store are in the bucket."""
    shards = [(split, first // job.shard_rows) for split, first, _ in job.units()]
    return sum(sent_path(store, job, shard).exists() for shard in shards)


def shard_files(job: Job, shard: Shard) -> dict[str, str]:
    """Array → key of the shard's file, of the arrays that are written as shards."""
    split, number = shard
    rows = job.splits[split].rows
    return {
        spec.name: f"{split}/{spec.name}/{job.layout(spec, rows).shard_key(number)}" for spec in job.direct
    }


def is_full(store: Path, job: Job, shard: Shard) -> bool:
    """Whether all rows of a shard are written here; its files get their names a little later."""
    commits = read_commits(log_path(store, job, *shard))
    return bool(commits) and commits[-1].stop == job.shard_range(*shard)[1]


def is_finished(store: Path, job: Job, shard: Shard) -> bool:
    """Whether all rows of a shard are committed here and its files have their names."""
    commits = read_commits(log_path(store, job, *shard))
    return bool(commits) and commits[-1].finished is not None


def is_committed(job: Job, shard: Shard, sent: Sent, found: Mapping[str, Entry]) -> bool:
    """Whether the files in the bucket, as a listing has them, are those that were recorded."""
    keys = shard_files(job, shard)
    return sent.files.keys() == keys.keys() and all(
        found.get(keys[name]) == sent.files[name] for name in keys
    )


class Uploader:
    """Sends finished shards of `shards` as they appear; a context manager.

    remote: the store's URL; requests are tried again for LONG_PAUSES_S. limit: bytes of shards that may wait here.
    still_owner: called before a shard is committed; raises when another process may be writing it.
    An error ends the uploads; `check`, `wait_for_room` and `finish` raise it.
    """

    def __init__(
        self,
        store: Path,
        job: Job,
        shards: list[Shard],
        url: str,
        limit: int,
        still_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.job, self.limit, self.still_owner = store, job, limit, still_owner
        self.remote = RemoteFiles(url, LONG_PAUSES_S, self._sleep)
        self.waiting = [shard for shard in shards if not sent_path(store, job, shard).exists()]
        self.under_way: list[Shard] = []
        self.error: BaseException | None = None
        self._closing, self._choosing = threading.Event(), threading.Lock()
        # Daemons: a run that is stopped does not wait for what they are sending.
        self._threads = [
            threading.Thread(target=self._work, name=f"store-upload-{number}", daemon=True)
            for number in range(UPLOADS)
        ]
        for shard in shards:  # killed between the record and the deletion
            if shard not in self.waiting:
                self._delete(shard)

    def check(self) -> None:
        """Raises what an upload raised."""
        if self.error is not None:
            raise self.error

    def wait_for_room(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Return when another shard may be begun here: one always may, more within the limit. Raises as `check`."""
        told = False
        while True:
            self.check()
            if self.has_room() or stopped():
                return
            if not told:
                told = True
                size = self.staged_bytes() / 1e9
                log.info("%.2f GB of shards wait for their upload: encoding waits for it", size)
            time.sleep(POLL_S / 2)

    def has_room(self, begun: int = 0) -> bool:
        """Whether another shard may be begun here: one always may, more within the limit. begun: not full yet."""
        size = self.staged_bytes() + begun * self._shard_bytes()
        return not size or size + self._shard_bytes() <= self.limit

    def staged_bytes(self) -> int:
        """Bytes of the shards that are here with all their rows."""
        total = 0
        for shard in [*self.waiting, *self.under_way]:
            if not is_full(self.store, self.job, shard):
                continue
            for path in self._files(shard).values():
                for written in (path, path.with_name(f"{path.name}{PARTIAL}")):
                    with contextlib.suppress(FileNotFoundError):
                        total += written.stat().st_size
        return total

    def finish(self, between: Callable[[], None] = lambda: None) -> None:
        """Return when all finished shards are sent. Raises as `check`. between: called while waiting; may raise."""
        while self.under_way or self._finished():
            self.check()
            between()
            time.sleep(POLL_S / 2)
        self.check()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if kind is None:
            for thread in self._threads:
                thread.join()

    # -- how it is done ---------------------------------------------------------------------------

    def _work(self) -> None:
        """One thread: send the next finished shard, or wait for one."""
        try:
            while self.error is None and not self._closing.is_set():
                shard = self._take()
                if shard is None:
                    self._closing.wait(POLL_S)
                    continue
                self._send(shard)
                self.under_way.remove(shard)
        except BaseException as error:  # carried to the thread that encodes
            self.error = self.error or error

    def _take(self) -> Shard | None:
        with self._choosing:
            shard = next(iter(self._finished()), None)
            if shard is not None:
                self.under_way.append(
                    shard
                )  # before it leaves `waiting`: `finish` finds it in one of the two
                self.waiting.remove(shard)
            return shard

    def _finished(self) -> list[Shard]:
        """Shards whose files are here and not on their way. Files have their names just before their log is finished."""
        return [shard for shard in list(self.waiting) if is_finished(self.store, self.job, shard)]

    def _send(self, shard: Shard) -> None:
        log_file = log_path(self.store, self.job, *shard)
        finished = read_commits(log_file)[-1].finished or {}
        files, moments = {}, {}
        keys = shard_files(self.job, shard)
        for name, path in self._files(shard).items():
            with mapped(path) as data:
                got = len(data), crc32c_of(data)
                if got != tuple(finished[name]):
                    raise StoreError(
                        f"{path}: is damaged: {got[0]} bytes with crc32c {got[1]:08x}, expected {finished[name][0]} "
                        f"bytes with {finished[name][1]:08x}; delete {log_file} and run the same command again"
                    )
                files[name] = Entry(len(data), self.remote.write(keys[name], data))
            spec = next(spec for spec in self.job.direct if spec.name == name)
            if spec.scaled and spec.encoding == "plain":
                moments[name] = self._moments(shard, name)
        sent = Sent(files, moments).to_json()
        record = sent_path(self.store, self.job, shard)
        self.remote.write(self._key(record), sent)
        self.still_owner()
        self._sleep(0)
        with mapped(log_file) as data:
            self.remote.write(self._key(log_file), data)
        self._sleep(0)
        replace_file(record, sent)
        self._delete(shard)

    def _moments(self, shard: Shard, name: str) -> Moments:
        split, number = shard
        spec = next(spec for spec in self.job.direct if spec.name == name)
        layout = self.job.layout(spec, self.job.splits[split].rows)
        array = one_shard(self.store / split / name, layout, number)
        log_file = log_path(self.store, self.job, *shard)
        parts = [data for _, _, data in read_parts(log_file, read_commits(log_file), VALID)]
        first, end = self.job.shard_range(split, number)
        return moments_of(array, first, end, np.frombuffer(b"".join(parts), np.bool_))

    def _files(self, shard: Shard) -> dict[str, Path]:
        return {name: self.store / key for name, key in shard_files(self.job, shard).items()}

    def _key(self, path: Path) -> str:
        return path.relative_to(self.store).as_posix()

    def _delete(self, shard: Shard) -> None:
        for path in self._files(shard).values():
            path.unlink(missing_ok=True)

    def _shard_bytes(self) -> int:
        return sum(self.job.shard_rows * spec.row_bytes for spec in self.job.direct)

    def _sleep(self, seconds: float) -> None:
        """Raises StoreError when the run ends: nothing more is changed, here or there."""
        if self._closing.wait(seconds):
            raise StoreError(f"{self.remote.url}: an upload was given up, because the run ends")


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A file's content, which is not read into memory."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise StoreError(
            f"{path}: is missing, although its rows are committed here: delete the staging folder and run the same "
            "command again"
        ) from None
    try:
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
            yield data
    finally:
        os.close(file)


def crc32c_of(data: mmap.mmap) -> int:
    values = np.frombuffer(data, np.uint8)
    try:
        return crc32c(values)
    finally:
        del values  # a map that is looked at cannot be closed


def one_shard(folder: Path, layout: Layout, shard: int) -> RowArray:
    """An array of which only one shard is here."""
    if layout.codec != "none":
        return ZarrArray(str(folder), layout)
    array = MappedArray(folder, layout, filled=False, one_map=False)
    array.add(shard)
    return array
