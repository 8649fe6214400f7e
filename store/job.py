"""A job: arrays that are being written to a store, over which rows, and what of them is committed.

`features` is the job of the extractor; later jobs add arrays (`logits/<name>`) to a complete store.
A job is kept in `.work/<name>/` until it is finalized:

    job.json                  the content of `Job`, written before the first shard
    <split>/<shard>.log       the commit log of one shard, see below
    keys/                     the new keys of a job that appends rows
    locks/                    which processes are writing
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from store.errors import StoreError
from store.format import FEATURES_JOB, VALID, WORK_FOLDER, ArraySpec, Model, Name
from store.metadata import read_json, write_json
from store.shards import Layout, crc32c

# Folders of .work that are no jobs: a new version, a store of rows encoded for it, what it replaced (version.py).
NEXT, ROWS_STORE, REPLACED = "next", "rows", "replaced"
ADDITIONS = "teachers"  # a store of each further teacher's features while they are encoded (teachers.py)
Unit = tuple[str, int, int]  # one shard of a job: split, first row, end row
# Suffixes of the folders of jobs that are not complete yet, and of finished ones.
CREATING, DONE = ".creating", ".done"


class JobSplit(Model):
    """Rows of one split; rows before `start` were written by an earlier job and stay."""

    rows: int
    start: int = 0


class Job(Model):
    """The content of job.json. `scale` holds one power of two a channel, fixed before the first shard."""

    name: Name
    arrays: tuple[ArraySpec, ...]
    splits: dict[str, JobSplit]
    scale: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    center: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    shard_rows: int
    batch_rows: int

    def attributes(self, name: str) -> dict[str, Any]:
        """The attributes of an array's zarr.json."""
        found: dict[str, Any] = {}
        if name in self.scale:
            found["scale"] = list(self.scale[name])
        if name in self.center:
            found["center"] = list(self.center[name])
        return found

    @property
    def direct(self) -> list[ArraySpec]:
        return [spec for spec in self.arrays if spec.direct]

    @property
    def logged(self) -> list[ArraySpec]:
        """Arrays that wait in the commit log until the job is finalized."""
        return [spec for spec in self.arrays if not spec.direct]

    @property
    def owns_rows(self) -> bool:
        """Whether this job decides which rows are valid (the extractor's job)."""
        return any(spec.name == VALID for spec in self.arrays)

    def scale_of(self, name: str) -> np.ndarray | None:
        """[D] float32, or None for an array that is stored as it is."""
        scale = self.scale.get(name)
        return None if scale is None else np.array(scale, dtype=np.float32)

    def layout(self, spec: ArraySpec, rows: int) -> Layout:
        return Layout.of(spec, rows, self.shard_rows)

    def shard_range(self, split: str, shard: int) -> tuple[int, int]:
        """First row and end row of a shard."""
        return shard * self.shard_rows, min(self.splits[split].rows, (shard + 1) * self.shard_rows)

    def shards(self, split: str) -> range:
        """The shards that this job writes."""
        rows, start = self.splits[split].rows, self.splits[split].start
        return range(start // self.shard_rows, -(-rows // self.shard_rows) if rows > start else 0)

    def units(self) -> list[Unit]:
        """All shards that this job writes, in the order that `--shard-range` counts."""
        return [
            (split, *self.shard_range(split, shard)) for split in self.splits for shard in self.shards(split)
        ]

    def save_in(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "job.json", self.model_dump(mode="json"))


def job_folder(store: Path, name: str) -> Path:
    return store / WORK_FOLDER / name.replace("/", "-")


def keys_folder(job: Path) -> Path:
    """Where a job that appends rows keeps the new key arrays, laid out as in a store."""
    return job / "keys"


def log_path(store: Path, job: Job, split: str, shard: int) -> Path:
    return job_folder(store, job.name) / split / f"{shard:06d}.log"


def pending_jobs(store: Path) -> list[str]:
    """Names of the jobs that are not finalized."""
    files = sorted((store / WORK_FOLDER).glob("*/job.json"))
    files = [path for path in files if not path.parent.name.endswith((CREATING, DONE))]
    return [str(read_json(path)["name"]) for path in files]


def load_job(store: Path, name: str) -> Job:
    """Raises StoreError when the store has no such job."""
    path = job_folder(store, name) / "job.json"
    if not path.exists():
        raise StoreError(
            f"{store}: no job {name!r} is being written; pending: {pending_jobs(store) or 'none'}"
        )
    try:
        return Job.model_validate(read_json(path))
    except ValidationError as error:
        raise StoreError(f"{path}: damaged: {error}") from error


def features_job(store: Path) -> Job | None:
    """The extractor's job; None when it is finished."""
    return load_job(store, FEATURES_JOB) if FEATURES_JOB in pending_jobs(store) else None


# -- the commit log ----------------------------------------------------------------------------------------------
#
# What is in the log of a shard is committed; rows that are not in it are written again by the next run. A commit is one
# record, appended after the data whose checksums it holds:
#
#     b"COMMIT1\n" | header length uint32 | payload length uint64 | header JSON | payload | crc32c uint32
#
# The header has the rows, the length and running crc32c of every partial shard file (`prefix`), and the size of each
# small array in the payload. Small and ragged arrays are kept only there until the job is finalized: their final
# layout depends on all rows.
#
# Why a log, and not a file per commit: appending is one write, and a kill can only damage the end. A torn or damaged
# record ends the log, because every record's checksum covers the whole record. And because each `prefix` covers the
# shard file from its start, one true record proves all data before it: after a power failure, which may keep a record
# and lose its data, resuming goes back to the last record whose checksum the files still have.

MAGIC = b"COMMIT1\n"
HEAD = struct.Struct("<IQ")


@dataclass(frozen=True)
class Commit:
    """One record. `prefix` and `finished` map a direct array to (bytes, crc32c)."""

    start: int
    stop: int
    prefix: dict[str, tuple[int, int]]
    finished: dict[str, tuple[int, int]] | None  # None while the shard is open
    parts: dict[str, tuple[int, int]]  # array → (offset in the file, bytes)
    begin: int  # position of the record in the file
    end: int


def encode_commit(
    start: int,
    stop: int,
    prefix: dict[str, tuple[int, int]],
    finished: dict[str, tuple[int, int]] | None,
    parts: dict[str, bytes],
) -> list[bytes]:
    """The record, in pieces to be written one after the other. `finished` is None while the shard is open."""
    header = {
        "rows": [start, stop],
        "prefix": prefix,
        "finished": finished,
        "parts": [[name, len(data)] for name, data in parts.items()],
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    head = MAGIC + HEAD.pack(len(encoded), sum(map(len, parts.values()))) + encoded
    pieces = [head, *parts.values()]  # a payload of 128 MB is not copied again
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return [*pieces, struct.pack("<I", crc)]


def read_commits(path: Path, *, check_all: bool = False) -> list[Commit]:
    """The valid records of a log, in order; a missing file has none.

    Only the last record's checksum is read, which a killed process may have torn; unless `check_all`, which
    raises StoreError for a damaged record in the middle.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        commits = list(_scan(file, path.stat().st_size))
        suspects = commits if check_all else commits[-1:]
        for commit in suspects:
            if _is_intact(file, commit):
                continue
            if commit is commits[-1]:
                commits.pop()
            else:
                raise StoreError(
                    f"{path}: commit of rows {commit.start}:{commit.stop} is damaged (crc32c differs); "
                    "delete this file and run the extraction again to redo its shard"
                )
    return commits


def intact_commits(path: Path) -> list[Commit]:
    """The records before the first damaged one; every checksum is read."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return list(takewhile(partial(_is_intact, file), list(_scan(file, path.stat().st_size))))


def _scan(file: BinaryIO, size: int) -> Iterator[Commit]:
    position = 0
    while position + len(MAGIC) + HEAD.size + 4 <= size:
        file.seek(position)
        head = file.read(len(MAGIC) + HEAD.size)
        if not head.startswith(MAGIC):
            return
        header_bytes, payload_bytes = HEAD.unpack(head[len(MAGIC) :])
        end = position + len(head) + header_bytes + payload_bytes + 4
        if end > size:
            return
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return
        (start, stop), parts, payload = header["rows"], {}, position + len(head) + header_bytes
        for name, length in header["parts"]:
            parts[name] = (payload, length)
            payload += length
        yield Commit(start, stop, header["prefix"], header["finished"], parts, position, end)
        position = end


def _is_intact(file: BinaryIO, commit: Commit) -> bool:
    file.seek(commit.begin)
    record = file.read(commit.end - commit.begin)
    return record[-4:] == struct.pack("<I", crc32c(record[:-4]))


def read_parts(log: Path, commits: list[Commit], name: str) -> Iterator[tuple[int, int, bytes]]:
    """(first row, end row, bytes) of a small array in each of a log's records."""
    if not commits:
        return
    with log.open("rb") as file:
        for commit in commits:
            position, length = commit.parts.get(name, (0, 0))
            file.seek(position)
            yield commit.start, commit.stop, file.read(length)


def units_left(store: Path, job: Job) -> list[Unit]:
    """The shards that are not finished: some of their rows are not committed, or their files do not have their names."""
    left = []
    for split, first, end in job.units():
        commits = read_commits(log_path(store, job, split, first // job.shard_rows))
        if not commits or commits[-1].finished is None:
            left.append((split, first, end))
    return left


def count_committed(store: Path, job: Job) -> int:
    """Rows that a job has committed so far, with those before its start in the shards that it writes."""
    logs = [(first, log_path(store, job, split, first // job.shard_rows)) for split, first, _ in job.units()]
    return sum(commits[-1].stop - first for first, log in logs if (commits := read_commits(log)))


def progress(store: Path, job: Job) -> dict[str, tuple[int, int]]:
    """split → (committed rows, rows)."""
    done = {}
    for split, plan in job.splits.items():
        written = job.shards(split).start * job.shard_rows if job.shards(split) else plan.rows
        for shard in job.shards(split):
            commits = read_commits(log_path(store, job, split, shard))
            written += commits[-1].stop - job.shard_range(split, shard)[0] if commits else 0
        done[split] = (written, plan.rows)
    return done


def describe_progress(store: Path) -> str:
    """`train 640 of 1000 rows, val 0 of 10 rows` of the features job."""
    if (store / WORK_FOLDER / NEXT).exists():
        return "a killed run was putting a new version in its place"
    job = features_job(store)
    if job is None:
        return "no rows are committed"
    done = progress(store, job)
    return ", ".join(f"{split} {have} of {rows} rows" for split, (have, rows) in done.items())
