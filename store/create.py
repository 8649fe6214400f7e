"""Make a new store, or begin to add arrays (`logits/<name>`) or rows to a complete one.

Nothing of a new store or job is visible until it is complete, and nothing that is stored is encoded again.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np

from files.writing import sync_folder
from store.errors import StoreError, disk_errors
from store.finalize import drop_job, keep_records
from store.format import (
    DIRECT_PREFIXES,
    FEATURES_JOB,
    KEY_ARRAYS,
    ArraySpec,
    Manifest,
    own_specs,
)
from store.job import (
    CREATING,
    Job,
    JobSplit,
    encode_commit,
    job_folder,
    keys_folder,
    load_job,
    log_path,
    pending_jobs,
)
from store.keys import KeyTable, Plan, write_keys
from store.locks import pid_namespace, process_start
from store.metadata import remove_strays, write_array_metadata, write_group, write_manifest
from store.reader import Split, Store, open_store
from store.shards import ShardFile, choose_shard_rows, crc32c


def create_store(
    path: str | os.PathLike[str],
    manifest: Manifest,
    plan: Plan,
    arrays: Sequence[ArraySpec],
    *,
    scales: Mapping[str, np.ndarray] | None = None,
    centers: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Lay out a new store for `plan` and `arrays`, ready for `StoreWriter`s.

    scales: array → [D] powers of two (see `channel_scale`); an array whose spec is `scaled` and that has
        none here gets 1. They are fixed from here on.
    centers: array → [D], what readers add after scaling; for packed arrays.
    Raises StoreError when the path is taken or the specs do not fit each other.
    """
    target = Path(path)
    check_free(target)
    specs = [*arrays, *own_specs()]
    check_specs(specs)
    shard_rows = plan.shard_rows or choose_shard_rows(specs)
    job = Job(
        name=FEATURES_JOB,
        arrays=tuple(specs),
        splits={name: JobSplit(rows=len(keys)) for name, keys in plan.tables.items()},
        scale=complete_scales(specs, scales or {}),
        center={name: tuple(map(float, center)) for name, center in (centers or {}).items()},
        shard_rows=shard_rows,
        batch_rows=plan.batch_rows,
    )
    manifest = manifest.model_copy(
        update={
            "complete": False,
            "splits": {name: len(keys) for name, keys in plan.tables.items()},
            "arrays": tuple(specs),
            "shard_rows": shard_rows,
            "batch_rows": plan.batch_rows,
            "software": {"numpy": np.__version__, "zarr": version("zarr"), **manifest.software},
        }
    )
    with new_folder(target) as building:
        for split, table in plan.tables.items():
            write_group(building / split)
            write_keys(building, split, table)
            for spec in job.direct:
                layout = job.layout(spec, len(table))
                write_array_metadata(building / split, spec.name, layout, job.attributes(spec.name))
        job.save_in(job_folder(building, job.name))
        write_manifest(building, manifest)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its name at the end, and is deleted after an error.

    Its name has the host and process id, so that a later process can delete what a killed one left.
    """
    begun = f".{target.name}.creating.{socket.gethostname()}.{pid_namespace()}."
    building = target.with_name(f"{begun}{os.getpid()}")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in list(target.parent.iterdir()):  # what processes that are gone had begun
            pid = path.name.removeprefix(begun)
            ours = path.name.startswith(begun) and pid.isdigit()
            if ours and (int(pid) == os.getpid() or process_start(int(pid)) is None):
                shutil.rmtree(path)
        building.mkdir()
        try:
            yield building
            os.rename(building, target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        sync_folder(target.parent)


def check_free(target: Path) -> None:
    with disk_errors(target):
        exists, is_folder = target.exists(), target.is_dir()
    if exists and not is_folder:
        raise StoreError(f"{target}: is a file; a store is a folder: choose another path")
    if exists and any(target.iterdir()):
        raise StoreError(
            f"{target}: exists and is not empty; a store needs a folder of its own, choose another path"
        )


def check_specs(specs: Sequence[ArraySpec]) -> None:
    """Raises StoreError for doubled names, codecs where none is used, ragged arrays without a folder."""
    names = [spec.name for spec in specs]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise StoreError(f"arrays {doubled} are given twice")
    every = set(names) | {spec.offsets_name for spec in specs if spec.ragged} | set(KEY_ARRAYS)
    nested = [name for name in every if any(str(parent) in every for parent in PurePosixPath(name).parents)]
    if nested or set(names) & set(KEY_ARRAYS):
        raise StoreError(
            f"arrays {sorted(nested) or names}: names of the store's own, or below another array"
        )
    for spec in specs:
        if spec.codec != "none" and not spec.direct:
            raise StoreError(
                f"{spec.name}: only arrays of fixed width below {DIRECT_PREFIXES} are compressed"
            )
        if spec.ragged and "/" not in spec.name:
            raise StoreError(f"ragged array {spec.name!r} needs a folder, as in {spec.name}/values")


def complete_scales(
    specs: Sequence[ArraySpec], scales: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, ...]]:
    """A scale for every scaled array; 1 where none is given. Raises StoreError for a wrong one."""
    unknown = sorted(set(scales) - {spec.name for spec in specs if spec.scaled})
    if unknown:
        raise StoreError(f"scales given for {unknown}, which are not scaled arrays of this store")
    complete = {}
    for spec in specs:
        if not spec.scaled:
            continue
        width = spec.row_shape[-1]
        scale = np.asarray(scales.get(spec.name, np.ones(width)), dtype=np.float32)
        exact = spec.dtype == "int8" or bool(np.all(np.frexp(scale)[0] == 0.5))
        if scale.shape != (width,) or not exact:
            raise StoreError(f"scale of {spec.name}: expected {width} powers of two, got shape {scale.shape}")
        complete[spec.name] = tuple(float(value) for value in scale)
    return complete


# -- more for a complete store -------------------------------------------------------------------------------------


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
        raise StoreError(f"{path}: arrays {taken} exist; pass replace=True to replace them")
    with disk_errors(store.path):
        drop_arrays(store, taken)
        publish_job(store.path, job)
    return job.name


def drop_arrays(store: Store, names: Sequence[str]) -> Manifest:
    """Take arrays out of the manifest, then delete them. Returns the manifest as it is now."""
    manifest = store.manifest
    if not names:
        return manifest
    manifest = manifest.with_arrays(spec for spec in manifest.arrays if spec.name not in names)
    write_manifest(store.path, manifest)
    for split in store.splits:
        keep_records(store.path, split, manifest)
    remove_strays(store.path, manifest)
    return manifest


def extend_store(path: str | os.PathLike[str], new_keys: Mapping[str, Iterable[str]]) -> None:
    """Begin a job that appends rows to a complete store: rows N, N+1, … of each split, in the given order.

    Then write and finalize as for a new store: `StoreWriter.next_row` starts at the first new row.
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
