"""Complete a job: move small arrays from the commit logs into shards, then statistics, digest and manifest.

Every step is a pure function of committed data and replaces whole files, so after a kill the same call is repeated.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from files.writing import sync_folder
from store.arrays import MappedArray, open_array
from store.errors import StoreError, disk_errors
from store.format import (
    COMMITS_FOLDER,
    DIGESTED,
    FEATURES_JOB,
    KEY_OFFSETS,
    KEY_VALUES,
    WORK_FOLDER,
    ArraySpec,
    Manifest,
    offsets_spec,
    ragged_groups,
    valid_array,
)
from store.job import (
    DONE,
    Commit,
    Job,
    job_folder,
    keys_folder,
    load_job,
    log_path,
    pending_jobs,
    read_commits,
    read_parts,
)
from store.keys import open_keys, write_keys
from store.locks import RowLock
from store.metadata import (
    ZARR_JSON,
    belongs,
    parse_manifest,
    read_json,
    read_root,
    remove_strays,
    write_array_metadata,
    write_group,
    write_json,
    write_manifest,
)
from store.shards import PARTIAL, ArrayWriter, Layout, byte_view, read_data
from store.statistics import Moments, combine, mean_and_std, moments_of, statistics_json

NOTHING_KNOWN: Mapping[Any, Any] = {}
Checksums = list[tuple[int, int]]


def finalize_store(
    path: str | os.PathLike[str],
    *,
    job: str = FEATURES_JOB,
    statistics: bool = True,
    moments: Mapping[tuple[str, str], Mapping[int, Moments]] = NOTHING_KNOWN,
    break_lock: bool = False,
) -> None:
    """Complete a job whose rows are all committed; for the features job, the store becomes complete.

    statistics: whether to read every feature again for its channel's mean and standard deviation.
    moments: (split, array) → shard → what is known of it already; such shards are not read.
    Raises StoreError when rows are missing, saying which; LockedError while a writer is at work.
    """
    store = Path(path)
    manifest = parse_manifest(read_root(store), str(store))
    if not job_folder(store, job).exists() and manifest.complete:
        # Killed during the last step, or called twice: arrays have their names, a job may still be there.
        named = {spec.name for spec in manifest.arrays}
        for name in pending_jobs(store):
            with contextlib.suppress(StoreError):  # locked, or gone by now: another process is at that step
                if {spec.name for spec in load_job(store, name).arrays} <= named:
                    drop_job(store, name)
        remove_done(store)
        return
    work = load_job(store, job)
    lock = RowLock(job_folder(store, job), None, 0, 0, break_lock=break_lock)
    try:
        with disk_errors(store):
            parts = [Finishing.begin(store, work, split) for split in work.splits]
            for part in parts:
                part.run(statistics, moments)
            publish_manifest(store, work)
            remove_job(store, job)
    finally:
        lock.release()


@dataclass(frozen=True)
class Finishing:
    """One split of a job, all of whose rows are committed.

    kept: rows before the job's first shard, which are in the store already and stay as they are.
    """

    store: Path
    job: Job
    split: str
    shards: list[list[Commit]]
    kept: int

    @classmethod
    def begin(cls, store: Path, job: Job, split: str) -> Finishing:
        """Raises StoreError naming the first rows that are not committed."""
        shards = []
        for shard in job.shards(split):
            commits = read_commits(log_path(store, job, split, shard), check_all=True)
            first, end = job.shard_range(split, shard)
            if not commits or commits[-1].finished is None:
                have = commits[-1].stop if commits else first
                raise StoreError(
                    f"{store}: split {split!r} is incomplete: rows {have}:{end} of {job.splits[split].rows} "
                    "are not written; run the same command again to resume"
                )
            shards.append(commits)
        kept = job.shards(split).start * job.shard_rows if shards else job.splits[split].rows
        return cls(store, job, split, shards, kept)

    @property
    def folder(self) -> Path:
        return self.store / self.split

    @property
    def rows(self) -> int:
        return self.job.splits[self.split].rows

    def run(
        self,
        statistics: bool,
        moments: Mapping[tuple[str, str], Mapping[int, Moments]],
    ) -> None:
        write_group(self.folder)
        appended = keys_folder(job_folder(self.store, self.job.name))  # of a job that appended rows
        if appended.exists():
            write_keys(self.store, self.split, open_keys(appended / self.split))
        record = commit_record(self.store, self.split)
        finished = [commits[-1].finished for commits in self.shards]
        whole = -(-self.kept // self.job.shard_rows)
        for spec in self.job.direct:  # the shard files are there already
            self.write_metadata(spec, self.job.layout(spec, self.rows))
            for stray in (self.folder / spec.name).rglob(f"*{PARTIAL}"):
                stray.unlink()  # Killed between a commit record and this clean-up.
            sums = [item[spec.name] for item in finished if item]
            record[spec.name] = record.get(spec.name, [])[:whole] + sums
        for name, specs in ragged_groups(self.job.arrays).items():
            for spec in specs:
                entries = self.kept_entries(name)
                record[spec.name] = self.compact(spec, entries, record.get(spec.name, []))
            record[name] = self.compact_offsets(name, record.get(name, []))
        for spec in self.job.logged:
            if not spec.ragged:
                record[spec.name] = self.compact(spec, self.kept, record.get(spec.name, []))
        write_json(self.store / COMMITS_FOLDER / f"{self.split}.json", dict(sorted(record.items())))
        for spec in self.job.arrays if statistics else ():
            if spec.scaled and spec.encoding == "plain":
                known = moments.get((self.split, spec.name), {})
                write_statistics(self.store, self.split, spec, self.job.scale_of(spec.name), known)

    def kept_entries(self, offsets: str) -> int:
        """How many ragged entries belong to kept rows. An interrupted run left the same prefix."""
        if not self.kept:
            return 0
        layout = self.job.layout(offsets_spec(offsets), self.rows + 1)
        data = b"".join(read_data(self.folder / offsets, layout, self.kept * 8, (self.kept + 1) * 8))
        return int(np.frombuffer(data, "<i8")[0])

    def compact(self, spec: ArraySpec, kept: int, before: Checksums) -> Checksums:
        """Write one small or ragged array, whose first `kept` entries are in the store already."""
        logged = sum(commit.parts.get(spec.name, (0, 0))[1] for shard in self.shards for commit in shard)
        layout = self.job.layout(spec, kept + logged // max(1, spec.row_bytes))
        checksums = self.rewrite(spec.name, layout, kept, before, self.logged(spec.name))
        self.write_metadata(spec, layout)
        return checksums

    def compact_offsets(self, name: str, before: Checksums) -> Checksums:
        """Turn the logged lengths of a ragged group into offsets [N+1]."""
        spec = offsets_spec(name)
        layout = self.job.layout(spec, self.rows + 1)
        start = self.kept_entries(name)

        def offsets() -> Iterator[bytes]:
            end = np.int64(start)
            if not self.kept:
                yield end.tobytes()
            for data in self.logged(name):
                block = np.cumsum(np.frombuffer(data, dtype="<i8")) + end
                end = block[-1] if len(block) else end
                yield block.tobytes()

        checksums = self.rewrite(name, layout, self.kept + 1 if self.kept else 0, before, offsets())
        self.write_metadata(spec, layout)
        return checksums

    def rewrite(
        self, name: str, layout: Layout, kept: int, before: Checksums, new: Iterator[bytes]
    ) -> Checksums:
        """Whole shards of kept entries stay untouched; the rest is written, then `new`."""
        folder = self.folder / name
        untouched = kept // layout.shard_rows
        writer = ArrayWriter(folder, layout, before[:untouched])
        start = untouched * layout.shard_bytes
        for data in read_data(folder, layout, start, kept * layout.row_bytes):
            writer.append(data)
        for data in new:
            writer.append(data)
        return writer.close()

    def logged(self, name: str) -> Iterator[bytes]:
        """The bytes of one array from all commits, in row order."""
        for shard, commits in zip(self.job.shards(self.split), self.shards, strict=True):
            log = log_path(self.store, self.job, self.split, shard)
            yield from (data for _, _, data in read_parts(log, commits, name))

    def write_metadata(self, spec: ArraySpec, layout: Layout) -> None:
        write_array_metadata(self.folder, spec.name, layout, self.job.attributes(spec.name))


def write_statistics(
    store: Path,
    split: str,
    spec: ArraySpec,
    scale: np.ndarray | None,
    known: Mapping[int, Moments] = NOTHING_KNOWN,
) -> None:
    """Mean and standard deviation [D] of one array, true units, valid rows, into its attributes.

    known: the moments of shards that need not be read, or are not here.
    """
    path = store / split / spec.name / ZARR_JSON
    metadata = read_json(path)
    array = open_array(str(store), split, spec.name, metadata)
    valid = None if spec.ragged else MappedArray.open(store / split, valid_array(spec.name))
    layout = array.layout

    def moments() -> Iterator[Moments]:
        for shard in range(layout.shards):
            first = shard * layout.shard_rows
            end = first + layout.rows_in(shard)
            counted = None if valid is None else valid.slice(first, end)
            yield known.get(shard) or moments_of(array, first, end, counted)

    found = combine(moments(), layout.row_shape[-1])
    metadata["attributes"]["statistics"] = statistics_json(*mean_and_std(found, scale), found.count)
    write_json(path, metadata)


def commit_record(store: Path, split: str) -> dict[str, Checksums]:
    """array → (bytes, crc32c) of every shard file; empty before the first job is complete."""
    path = store / COMMITS_FOLDER / f"{split}.json"
    return dict(read_json(path)) if path.exists() else {}


def keep_records(store: Path, split: str, manifest: Manifest) -> None:
    """Forget the checksums of arrays that the manifest does not name."""
    record = commit_record(store, split)
    kept = {name: item for name, item in record.items() if belongs(f"{split}/{name}", manifest)}
    if kept != record:
        write_json(store / COMMITS_FOLDER / f"{split}.json", kept)


def publish_manifest(store: Path, job: Job) -> None:
    """The last step: the store is complete (again) once this file has its name."""
    manifest = parse_manifest(read_root(store), str(store))
    mine = {spec.name for spec in job.arrays}
    arrays = [spec for spec in manifest.arrays if spec.name not in mine] + list(job.arrays)
    update: dict[str, Any] = {"arrays": tuple(sorted(arrays, key=lambda spec: spec.name))}
    if job.owns_rows:
        update["complete"] = True
        update["splits"] = {name: split.rows for name, split in job.splits.items()}
        update["digest"] = digest_of(store, list(job.splits))
    else:
        update["added"] = tuple(sorted({*manifest.added, *mine}))
    manifest = manifest.model_copy(update=update)
    if job.owns_rows:
        for split in manifest.splits:
            keep_records(store, split, manifest)  # a killed run may have dropped arrays only half
    write_manifest(store, manifest)
    if job.owns_rows:
        remove_strays(store, manifest)


def digest_of(store: Path, splits: list[str]) -> str:
    """blake2b-128 over every split's name, keys, sizes, contents, validity and targets, in row order."""
    state = blake2b(digest_size=16)
    for split in splits:
        state.update(split.encode() + b"\0")
        for name in (KEY_VALUES, KEY_OFFSETS, *DIGESTED):
            if (store / split / name / ZARR_JSON).exists():
                state.update(name.encode() + b"\0")
                array = MappedArray.open(store / split, name)
                for start in range(0, len(array), 1 << 20):
                    state.update(byte_view(array.slice(start, start + (1 << 20))))
    return state.hexdigest()


def drop_job(store: Path, name: str) -> None:
    """Remove a job, finished or not. Raises LockedError while a writer is at it."""
    lock = RowLock(job_folder(store, load_job(store, name).name), None, 0, 0)
    try:
        remove_job(store, name)
    finally:
        lock.release()


def remove_job(store: Path, job: str) -> None:
    """Rename, then delete: a job is there whole or not at all."""
    folder = job_folder(store, job)
    os.rename(folder, folder.with_name(folder.name + DONE))
    remove_done(store)


def remove_done(store: Path) -> None:
    """Delete finished jobs, and the work folder when nothing is left in it."""
    work = store / WORK_FOLDER
    for folder in work.glob(f"*{DONE}"):
        shutil.rmtree(folder)
    if work.exists() and not any(work.iterdir()):
        work.rmdir()
        sync_folder(store)
