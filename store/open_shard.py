"""One shard of a job while it is written: its partial files, its commit log, what waits in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from store.block import Block
from store.commits import Commit, encode_commit
from store.files import sync_folder, write_all
from store.job import Job, log_path
from store.shards import ShardFile


class OpenShard:
    """One shard being written: a partial file for each direct array, memory for the rest, one log."""

    def __init__(self, store: Path, job: Job, split: str, shard: int, commits: list[Commit]) -> None:
        self._groups = job.ragged_groups
        self.first, self.end = job.shard_range(split, shard)
        self.committed = commits[-1].stop if commits else self.first
        self.uncommitted = 0
        self.files: dict[str, ShardFile] = {}
        for spec in job.direct:
            layout = job.layout(spec, job.splits[split].rows)
            self.files[spec.name] = ShardFile(store / split / spec.name, layout, shard)
            written, crc = commits[-1].prefix[spec.name] if commits else (0, 0)
            self.files[spec.name].resume(written, crc)
        self._log_path = log_path(store, job, split, shard)
        self._log_fd = self._open_log(commits[-1].end if commits else 0)
        self._parts: dict[str, list[bytes]] = {}
        self.waiting = 0  # bytes that are not committed

    def append(self, block: Block) -> None:
        for name, array in block.fixed.items():
            if name in self.files:
                self.files[name].append(array)
                self.waiting += array.nbytes
            else:
                self._keep(name, array.tobytes())
        for name, entries in block.ragged.items():
            self._keep(name, b"".join(entry.tobytes() for entry in entries if len(entry)))
        for name, specs in self._groups.items():
            lengths = [len(entry) for entry in block.ragged[specs[0].name]]
            self._keep(name, np.array(lengths, dtype="<i8").tobytes())
        self.uncommitted += block.rows

    def begin_commit(self) -> Callable[[], None]:
        """What is left to do so that the rows appended so far are durable; more rows may come meanwhile."""
        start, stop = self.committed, self.committed + self.uncommitted
        prefix = {name: (file.written, file.crc) for name, file in self.files.items()}
        parts = {name: b"".join(blocks) for name, blocks in self._parts.items()}
        self.committed, self.uncommitted, self.waiting = stop, 0, 0
        self._parts.clear()

        def finish() -> None:
            finished = self._finish_files() if stop == self.end else None
            if finished is None:
                for file in self.files.values():
                    file.sync()
            write_all(self._log_fd, encode_commit(start, stop, prefix, finished, parts))
            os.fsync(self._log_fd)
            if finished is not None:
                for file in self.files.values():
                    file.discard_partial()
                self.close()

        return finish

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
        os.ftruncate(fd, end)
        os.lseek(fd, end, os.SEEK_SET)
        if new:
            sync_folder(self._log_path.parent)
        return fd
