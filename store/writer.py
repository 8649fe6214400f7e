"""Append rows to a store: large rows directly into shard files, small arrays into the commit log (see job.py).

A row is committed when its record is in its shard's log: at least every 1,024 rows or 60 seconds. What was not
committed when a process was killed is written again by the next run, and the resulting files are bit-identical.

The record is written at once, so that it survives a kill; a second thread syncs data and log a little later, while the
next rows are computed. Where rows come faster than the disk can sync, the commits of up to 128 MB share a sync: one
for each would cost most of the speed. Only a power failure can undo those, and the next run finds out (`_true_commits`).
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from files.writing import sync_folder
from store.errors import StoreError, disk_errors
from store.format import FEATURES_JOB, OWN_ARRAYS, VALID, ragged_groups
from store.job import (
    Commit,
    Job,
    encode_commit,
    intact_commits,
    job_folder,
    keys_folder,
    load_job,
    log_path,
    read_commits,
)
from store.keys import KeyTable, open_keys
from store.locks import RowLock
from store.rows import Block, Values, prepare_block
from store.shards import ShardFile, write_all

log = logging.getLogger(__name__)


COMMIT_ROWS = 1024
COMMIT_SECONDS = 60.0
COMMIT_BYTES = 128 * 1024 * 1024  # large rows: bounds memory, and the disk works while rows are computed


class StoreWriter:
    """Appends rows of one split, in row order, from `next_row` on.

    row_range: (first row, end row), both at shard boundaries (the end may be the split's end); None is
        every row of the job. Writers of disjoint ranges may run at the same time, anywhere.

    Use as a context manager: leaving it normally commits, leaving it by an exception does not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str,
        row_range: tuple[int, int] | None = None,
        *,
        job: str = FEATURES_JOB,
        commit_rows: int = COMMIT_ROWS,
        commit_seconds: float = COMMIT_SECONDS,
        break_lock: bool = False,
    ) -> None:
        self.path, self.split = Path(path), split
        self.job: Job = load_job(self.path, job)
        if split not in self.job.splits:
            raise StoreError(f"{path}: no split {split!r}; valid: {sorted(self.job.splits)}")
        self.start, self.stop = check_range(self.job, split, row_range, self.path)
        self.commit_rows, self.commit_seconds = commit_rows, commit_seconds
        self._shard: OpenShard | None = None
        self._failed = self._closed = False
        self._last_commit = time.monotonic()
        self._syncer = ThreadPoolExecutor(1, "store-sync")
        self._syncs: deque[tuple[Future[None], int]] = deque()  # under way, and their bytes
        with disk_errors(self.path):
            folder = job_folder(self.path, job)
            self._lock = RowLock(folder, split, self.start, self.stop, break_lock=break_lock)
            try:
                self.next_row = self._resume()
            except BaseException:
                self._lock.release()
                raise

    # -- what the caller sees ---------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, int]]:
        """The (first row, end row) of every batch that is still to be appended."""
        return batches(self.next_row, self.stop, self.job.batch_rows, self.job.shard_rows)

    @cached_property
    def keys(self) -> KeyTable:
        """The split's keys in row order, new ones included."""
        appended = keys_folder(job_folder(self.path, self.job.name)) / self.split
        return open_keys(appended if appended.exists() else self.path / self.split)

    @property
    def array_names(self) -> list[str]:
        """The arrays that `append` expects."""
        return [spec.name for spec in self.job.arrays if spec.name not in OWN_ARRAYS]

    def append(
        self,
        arrays: Mapping[str, Values],
        *,
        valid: np.ndarray | None = None,
        reasons: Sequence[str] | None = None,
        stored: bool | Collection[str] = False,
        finite: Collection[str] = (),
    ) -> np.ndarray:
        """Append b rows. Returns valid [b] bool as stored.

        arrays: name → [b, ...] for fixed arrays, list of b arrays [n, ...] for ragged ones; every array of
            the job but `valid` and `reasons`. Scaled arrays are given in true units (any float dtype);
            with `stored=True`, or their name in `stored`, as they are in the store.
        valid: [b] bool, None for all valid. Features of invalid rows are stored as NaN, whatever is given.
        reasons: b texts, empty for valid rows.
        finite: names of arrays that the caller has found to be finite in stored form; they are not looked at again.

        A valid row with a value that float16 cannot hold at its scale becomes invalid, with the reason.
        Raises StoreError for wrong names, shapes, dtypes, too many rows, and for a disk that refuses.
        """
        self._check_usable()
        block = prepare_block(self.job, arrays, valid, reasons, stored, finite)
        if self.next_row + block.rows > self.stop:
            raise StoreError(
                f"{self.path} {self.split}: {block.rows} rows at row {self.next_row} pass the end of the "
                f"range at {self.stop}"
            )
        with self._failing_for_good():
            self._lock.check()
            if self._shard is not None and self._shard.uncommitted + block.rows > self.commit_rows:
                self._commit()
            self._write(block)
            self._commit_when_due()
        return block.fixed.get(VALID, np.ones(block.rows, dtype=bool))

    def commit(self) -> None:
        """Make every appended row durable; returns when it is."""
        self._check_usable()
        with self._failing_for_good():
            self._lock.check()
            self._commit()
            while self._syncs:
                self._await_sync()

    def close(self, *, commit: bool = True) -> None:
        """Commit (unless `commit` is False) and release files and lock. May be called twice."""
        try:
            if commit and not self._failed and not self._closed:
                self.commit()
        finally:
            self._closed = True
            self._syncer.shutdown()
            if self._shard is not None:
                self._shard.close()
                self._shard = None
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(commit=kind is None)

    # -- how it is done ---------------------------------------------------------------------------

    def _resume(self) -> int:
        """Open the first shard that is not complete. Returns the first row to append."""
        mine = range(self.start // self.job.shard_rows, -(-self.stop // self.job.shard_rows))
        for shard in [shard for shard in self.job.shards(self.split) if shard in mine]:
            log = log_path(self.path, self.job, self.split, shard)
            commits = read_commits(log)
            if commits and commits[-1].finished is not None:
                continue
            opened = OpenShard(self.path, self.job, self.split, shard, intact_commits(log))
            if opened.committed < opened.end:
                self._shard = opened
                return opened.committed
            opened.finish()  # killed between its last rows and its publication
        return self.stop

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """After an error in here the state on disk is unknown: this writer cannot be used any more."""
        self._failed = True
        with disk_errors(self.path):
            yield
        self._failed = False

    def _commit(self) -> None:
        """Record what was appended, and let the second thread sync it; wait while that is too far behind."""
        self._last_commit = time.monotonic()
        shard = self._shard
        if shard is None or not shard.uncommitted:
            return
        size = shard.waiting
        shard.commit()
        self._syncs.append((self._syncer.submit(self._sync, shard, shard.committed), size))
        while self._syncs:
            behind = len(self._syncs) > 1 and sum(size for _, size in self._syncs) > COMMIT_BYTES
            if not (behind or self._syncs[0][0].done()):
                break
            self._await_sync()

    def _sync(self, shard: OpenShard, stop: int) -> None:
        self._lock.check()
        shard.sync(stop)

    def _await_sync(self) -> None:
        """Wait for the oldest sync under way. Raises what it raised."""
        sync, _ = self._syncs.popleft()
        sync.result()

    def _write(self, block: Block) -> None:
        """Write a block's rows, shard by shard."""
        done = 0
        while done < block.rows:
            if self._shard is None:
                shard = self.next_row // self.job.shard_rows
                self._shard = OpenShard(self.path, self.job, self.split, shard, [])
            count = min(block.rows - done, self._shard.end - self.next_row)
            self._shard.append(block.part(done, done + count))
            done += count
            self.next_row += count
            if self.next_row == self._shard.end:
                self._commit()
                self._shard = None

    def _commit_when_due(self) -> None:
        if self._shard is None:
            return
        late = time.monotonic() - self._last_commit >= self.commit_seconds
        if late or self._shard.uncommitted >= self.commit_rows or self._shard.waiting >= COMMIT_BYTES:
            self._commit()

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"{self.path}: this writer is closed; open a new one")
        if self._failed:
            raise StoreError(f"{self.path}: an earlier write failed; open a new writer to resume")


# -- one shard -----------------------------------------------------------------------------------------------------


class OpenShard:
    """One shard being written: a partial file for each direct array, memory for the rest, one log.

    Two threads share it: one appends and commits, the other syncs.
    """

    def __init__(self, store: Path, job: Job, split: str, shard: int, commits: list[Commit]) -> None:
        self._groups = ragged_groups(job.arrays)
        self._logged = [*self._groups, *(spec.name for spec in job.logged)]  # what every record has
        self.first, self.end = job.shard_range(split, shard)
        self.uncommitted = 0
        self.waiting = 0  # bytes that are in no commit yet
        self._parts: dict[str, list[bytes]] = {}
        self._broken = False
        self._log_path, self._log_fd = log_path(store, job, split, shard), -1
        self.files: dict[str, ShardFile] = {}
        for spec in job.direct:
            layout = job.layout(spec, job.splits[split].rows)
            self.files[spec.name] = ShardFile(store / split / spec.name, layout, shard)
        try:
            commits = self._true_commits(commits)
            self.committed = self._synced = commits[-1].stop if commits else self.first
            self._check_kept(job.splits[split].start)
            # The log first: it must never hold checksums of bytes that are about to be cut off.
            self._log_fd = self._open_log(commits[-1].end if commits else 0)
            for name, file in self.files.items():
                file.resume(*(commits[-1].prefix[name] if commits else (0, 0)))
        except BaseException:
            self.close()
            raise

    def append(self, block: Block) -> None:
        for name, array in block.fixed.items():
            if name in self.files:
                self.files[name].append(array)
                self.waiting += array.nbytes
            else:
                self._keep(name, array.tobytes())
        for offsets, specs in self._groups.items():
            lengths = np.fromiter(map(len, block.ragged[specs[0].name]), "<i8", block.rows)
            self._keep(offsets, lengths.tobytes())
            for spec in specs:
                entries = block.ragged[spec.name] if lengths.any() else []
                self._keep(spec.name, b"".join(entry.tobytes() for entry in entries))
        self.uncommitted += block.rows

    def commit(self) -> None:
        """Record the rows appended so far: they outlive this process from now on, the power after `sync`."""
        stop = self.committed + self.uncommitted
        self._record(stop, None, {name: b"".join(blocks) for name, blocks in self._parts.items()})
        self.committed, self.uncommitted, self.waiting = stop, 0, 0
        self._parts.clear()

    def sync(self, stop: int) -> None:
        """Make commits up to row `stop` outlast a power failure, with all that have come since.

        After the shard's last row, its files are published, which a last record confirms. Does nothing when an
        earlier call did it.
        """
        if stop <= self._synced or self._broken:
            return
        self._broken = True  # until it went well: after a failed sync, another one proves nothing
        reached = self.committed
        if reached == self.end:
            self.finish()
        else:
            for file in self.files.values():
                file.sync()
            os.fsync(self._log_fd)
        self._synced, self._broken = reached, False

    def finish(self) -> None:
        """Publish the files of a shard whose rows are all committed."""
        finished = {name: file.finish(self.end - self.first) for name, file in self.files.items()}
        self._record(self.end, finished, dict.fromkeys(self._logged, b""))
        os.fsync(self._log_fd)
        for file in self.files.values():
            file.discard_partial()
        self.close()

    def _record(
        self, stop: int, finished: dict[str, tuple[int, int]] | None, parts: dict[str, bytes]
    ) -> None:
        prefix = {name: (file.written, file.crc) for name, file in self.files.items()}
        pieces = encode_commit(self.committed, stop, prefix, finished, parts)
        # One system call as a rule; it may write less than all.
        written = os.writev(self._log_fd, pieces)
        for piece in pieces:
            write_all(self._log_fd, piece[written:])
            written = max(0, written - len(piece))

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def _keep(self, name: str, data: bytes) -> None:
        self._parts.setdefault(name, []).append(data)
        self.waiting += len(data)

    def _true_commits(self, commits: list[Commit]) -> list[Commit]:
        """The commits whose data are in the files."""
        true = len(commits)
        for name, file in self.files.items():
            sums = file.checksums([commit.prefix[name][0] for commit in commits])
            while true and sums[true - 1] != commits[true - 1].prefix[name][1]:
                true -= 1
        if true < len(commits):
            log.warning(
                "%s: rows %d:%d are written again: their data did not reach the disk, or are damaged",
                self._log_path,
                commits[true].start,
                commits[-1].stop,
            )
        return commits[:true]

    def _check_kept(self, start: int) -> None:
        """Raises StoreError when rows before `start`, which come from an earlier job, are damaged."""
        if self.committed < min(start, self.end):
            raise StoreError(
                f"{self._log_path}: rows {self.committed}:{min(start, self.end)} were stored before and are "
                "damaged now (crc32c differs); extract again with --overwrite"
            )

    def _open_log(self, end: int) -> int:
        """The log, cut after its last valid record."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._log_path.exists()
        fd = os.open(self._log_path, os.O_WRONLY | os.O_CREAT, 0o644)
        if os.fstat(fd).st_size != end:
            os.ftruncate(fd, end)
            os.fsync(fd)
        os.lseek(fd, end, os.SEEK_SET)
        if new:
            sync_folder(self._log_path.parent)
        return fd


def check_range(job: Job, split: str, row_range: tuple[int, int] | None, path: Path) -> tuple[int, int]:
    """The rows of a writer. Raises StoreError unless they are whole shards of this job."""
    rows, first = job.splits[split].rows, job.splits[split].start
    if row_range is None:
        return first - first % job.shard_rows, rows
    start, stop = row_range
    whole = start % job.shard_rows == 0 and (stop % job.shard_rows == 0 or stop == rows)
    if not whole or not 0 <= start <= stop <= rows:
        raise StoreError(
            f"{path} {split}: row range {start}:{stop} is not made of whole shards of {job.shard_rows} rows "
            f"within 0:{rows}"
        )
    return start, stop


def batches(start: int, stop: int, batch_rows: int, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Batches (first row, end row) of the rows [start, stop), cut at every shard's start.

    Resuming at any cut gives the remaining cuts unchanged.
    """
    row = start
    while row < stop:
        shard_start = row - row % shard_rows
        within = row - shard_start
        end = min(stop, shard_start + min(shard_rows, within - within % batch_rows + batch_rows))
        yield row, end
        row = end
