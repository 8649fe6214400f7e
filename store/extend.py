"""More for a complete store: new arrays (`logits/<name>`) or new rows. Nothing stored is encoded again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from store.commits import encode_commit
from store.create import check_specs, complete_scales, write_keys
from store.errors import StoreError
from store.files import crc32c, disk_errors, sync_folder
from store.finalize import drop_job, keep_records
from store.format import FEATURES_JOB, ArraySpec, Manifest
from store.job import (
    CREATING,
    Job,
    JobSplit,
    job_folder,
    keys_folder,
    load_job,
    log_path,
    pending_jobs,
)
from store.keys import KeyTable
from store.metadata import remove_strays, write_manifest
from store.reader import Split, Store, open_store
from store.shards import ShardFile


def add_arrays(
    path: str | os.PathLike[str],
    arrays: Sequence[ArraySpec],
    *,
    scales: Mapping[str, np.ndarray] | None = None,
    replace: bool = False,
) -> str:
    """Begin (or resume) a job that adds arrays to a complete store. Returns the job's name.

    Write the rows with `StoreWriter(path, split, job=name)`, then `finalize_store(path, job=name)`.
    replace: drop arrays of these names first, if the store has them.
    Raises StoreError for an incomplete store, or names that exist.
    """
    store = open_store(path)
    check_specs(arrays)
    job = Job(
        name=arrays[0].name,
        arrays=tuple(arrays),
        splits={name: JobSplit(rows=len(store[name])) for name in store.splits},
        scale=complete_scales(arrays, scales or {}),
        shard_rows=store.manifest.shard_rows,
        batch_rows=store.manifest.batch_rows,
    )
    if job.name in pending_jobs(store.path):
        if load_job(store.path, job.name) == job:
            return job.name
        drop_job(store.path, job.name)
    taken = sorted({spec.name for spec in arrays} & {spec.name for spec in store.manifest.arrays})
    if taken and not replace:
        raise StoreError(f"{path}: arrays {taken} exist; pass replace=True to make them anew")
    with disk_errors(store.path):
        drop_arrays(store, taken)
        publish_job(store.path, job)
    return job.name


def drop_arrays(store: Store, names: Sequence[str]) -> Manifest:
    """Take arrays out of the manifest, then delete them. Returns the manifest as it is now."""
    manifest = store.manifest
    if not names:
        return manifest
    kept = tuple(spec for spec in manifest.arrays if spec.name not in names)
    added = tuple(name for name in manifest.added if name not in names)
    manifest = manifest.model_copy(update={"arrays": kept, "added": added})
    write_manifest(store.path, manifest)
    for split in store.splits:
        keep_records(store.path, split, manifest)
    remove_strays(store.path, manifest)
    return manifest


def extend_store(path: str | os.PathLike[str], new_keys: Mapping[str, Iterable[str]]) -> None:
    """Begin a job that appends rows to a complete store: rows N, N+1, … of each split, in the given order.

    Then write and finalise as for a new store: `StoreWriter.next_row` starts at the first new row.
    The store counts as incomplete until then. Arrays that were added later (`logits/<name>` of
    `cli probe`), or are just being added, are dropped, because they know nothing of the new rows.
    Raises StoreError when the store is incomplete or a key exists already.
    """
    store = open_store(path)
    store.require_plain("appending rows")
    tables = {
        split: KeyTable.build(
            chain(store[split].keys if split in store else (), new_keys.get(split, ())), f"split {split!r}"
        )
        for split in [*store.splits, *(name for name in new_keys if name not in store)]
    }
    starts = {split: len(store[split]) if split in store else 0 for split in tables}
    specs = tuple(spec for spec in store.manifest.arrays if spec.name not in store.manifest.added)
    job = Job(
        name=FEATURES_JOB,
        arrays=specs,
        splits={split: JobSplit(rows=len(table), start=starts[split]) for split, table in tables.items()},
        scale=scales_of(store, specs),
        shard_rows=store.manifest.shard_rows,
        batch_rows=store.manifest.batch_rows,
    )
    with disk_errors(store.path):
        for name in pending_jobs(store.path):
            drop_job(store.path, name)
        manifest = drop_arrays(store, list(store.manifest.added))
        publish_job(store.path, job, store, tables)
        write_manifest(store.path, manifest.model_copy(update={"complete": False}))


def scales_of(store: Store, specs: Sequence[ArraySpec]) -> dict[str, tuple[float, ...]]:
    """The scales that the store's arrays have, for every scaled array."""
    first = store[store.splits[0]]
    return {
        spec.name: tuple(float(value) for value in first.scale[spec.name]) for spec in specs if spec.scaled
    }


def publish_job(
    store: Path, job: Job, opened: Store | None = None, tables: Mapping[str, KeyTable] | None = None
) -> None:
    """Make the job's folder under another name, then rename it: a job exists whole or not at all."""
    final = job_folder(store, job.name)
    building = job.model_copy(update={"name": f"{job.name}{CREATING}"})
    folder = job_folder(store, building.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for split, table in (tables or {}).items():
        write_keys(keys_folder(folder), split, table)
        if opened is not None and split in opened:
            reopen_last_shard(opened[split], building, split, opened.path)
    job.save_in(folder)
    os.rename(folder, final)
    sync_folder(final.parent)


def reopen_last_shard(split: Split, job: Job, name: str, store: Path) -> None:
    """If the last shard has room, lay it out as if its rows had just been committed."""
    rows = len(split)
    shard = rows // job.shard_rows
    first = shard * job.shard_rows
    if first == rows or job.splits[name].rows == rows:
        return
    held = np.arange(first, rows)
    prefix = {}
    for spec in job.direct:
        data = split.gather(held, [spec.name])[spec.name]
        file = ShardFile(store / name / spec.name, job.layout(spec, rows), shard)
        file.append(data)
        file.sync()
        file.close()
        prefix[spec.name] = (data.nbytes, crc32c(np.ascontiguousarray(data)))
    parts: dict[str, bytes] = {}
    for spec in job.logged:
        if spec.ragged:
            entries = split.ragged(held, spec.name)
            parts[spec.name] = b"".join(entry.tobytes() for entry in entries)
            parts[spec.offsets_name] = np.array([len(entry) for entry in entries], "<i8").tobytes()
        else:
            parts[spec.name] = split.gather(held, [spec.name])[spec.name].tobytes()
    log = log_path(store, job, name, shard)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"".join(encode_commit(first, rows, prefix, None, parts)))
