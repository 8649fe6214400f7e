"""One shard of a job while it is written: its partial files, its commit log, what waits in memory.

A commit record is written at once, so that a killed process loses nothing of it, and data and log are synced a
little later. A power failure in between may keep a record and lose its data; but every record carries the
checksums of all data before it, and resuming goes back to the last one that is true.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from store.block import Block
from store.commits import Commit, encode_commit
from store.errors import StoreError
from store.files import sync_folder, write_pieces
from store.job import Job, log_path
from store.shards import ShardFile

log = logging.getLogger(__name__)


class OpenShard:
    """One shard being written: a partial file for each direct array, memory for the rest, one log.

    Two threads share it: one appends and commits, the other syncs.
    """

    def __init__(self, store: Path, job: Job, split: str, shard: int, commits: list[Commit]) -> None:
        self._groups = job.ragged_groups
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
            # The log first: it must never vouch for files that are about to be cut.
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

        After the shard's last row, its files are published, and a last record says so. Does nothing when an
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
        self._record(self.end, self._finish_files(), dict.fromkeys(self._logged, b""))
        os.fsync(self._log_fd)
        for file in self.files.values():
            file.discard_partial()
        self.close()

    def _record(
        self, stop: int, finished: dict[str, tuple[int, int]] | None, parts: dict[str, bytes]
    ) -> None:
        prefix = {name: (file.written, file.crc) for name, file in self.files.items()}
        write_pieces(self._log_fd, encode_commit(self.committed, stop, prefix, finished, parts))

    def _finish_files(self) -> dict[str, tuple[int, int]]:
        """Publish the shard's files; array → (bytes, crc32c)."""
        return {name: file.finish(self.end - self.first) for name, file in self.files.items()}

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
