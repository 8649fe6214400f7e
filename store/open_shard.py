"""One shard of a job while it is written: its partial files, its commit log, what waits in memory."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from store.block import Block
from store.commits import Commit, encode_commit
from store.files import sync_folder, write_all
from store.job import Job, log_path
from store.shards import ShardFile


class Begun(NamedTuple):
    """A commit on its way: rows, (bytes, crc32c) of each partial file up to them, the small arrays."""

    start: int
    stop: int
    prefix: dict[str, tuple[int, int]]
    parts: dict[str, bytes]


class OpenShard:
    """One shard being written: a partial file for each direct array, memory for the rest, one log.

    Two threads share it: one appends and begins commits, the other finishes those that have begun.
    """

    def __init__(self, store: Path, job: Job, split: str, shard: int, commits: list[Commit]) -> None:
        self._groups = job.ragged_groups
        self.first, self.end = job.shard_range(split, shard)
        self.committed = commits[-1].stop if commits else self.first  # in a commit, begun or finished
        self.uncommitted = 0
        self.waiting = 0  # bytes that are in no commit yet
        self._parts: dict[str, list[bytes]] = {}
        self._begun: deque[Begun] = deque()
        self._broken = False
        self._log_path, self._log_fd = log_path(store, job, split, shard), -1
        self.files: dict[str, ShardFile] = {}
        try:
            # First, so that no log vouches for files that are about to be cut.
            self._log_fd = self._open_log(commits[-1].end if commits else 0)
            for spec in job.direct:
                layout = job.layout(spec, job.splits[split].rows)
                self.files[spec.name] = ShardFile(store / split / spec.name, layout, shard)
                written, crc = commits[-1].prefix[spec.name] if commits else (0, 0)
                self.files[spec.name].resume(written, crc)
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

    def begin_commit(self) -> None:
        """Put the rows appended so far into a commit, for `finish_commits`."""
        start, stop = self.committed, self.committed + self.uncommitted
        prefix = {name: (file.written, file.crc) for name, file in self.files.items()}
        parts = {name: b"".join(blocks) for name, blocks in self._parts.items()}
        self._begun.append(Begun(start, stop, prefix, parts))
        self.committed, self.uncommitted, self.waiting = stop, 0, 0
        self._parts.clear()

    def finish_commits(self, stop: int) -> None:
        """Make rows up to `stop` durable, with every commit that has begun: data, then records, one sync for all.

        Does nothing when an earlier call took them along, or failed: no record may follow a torn one.
        """
        if not self._broken and self._begun and self._begun[0].stop <= stop:
            begun = [self._begun.popleft() for _ in range(len(self._begun))]
            self._broken = True
            self._finish(begun)
            self._broken = False

    def _finish(self, begun: list[Begun]) -> None:
        finished = self._finish_files() if begun[-1].stop == self.end else None
        if finished is None:
            for file in self.files.values():
                file.sync()
        for commit in begun:
            for piece in encode_commit(
                commit.start,
                commit.stop,
                commit.prefix,
                finished if commit is begun[-1] else None,
                commit.parts,
            ):
                write_all(self._log_fd, piece)
        os.fsync(self._log_fd)
        if finished is not None:
            for file in self.files.values():
                file.discard_partial()
            self.close()

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
