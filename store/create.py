"""Make a new store: its plan, its metadata, its features job. Nothing of it is visible until it is whole."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import numpy as np

from store.errors import StoreError
from store.files import disk_errors, sync_folder, write_json
from store.format import (
    COMMITS_FOLDER,
    DIRECT_PREFIXES,
    FEATURES_JOB,
    KEY_ARRAYS,
    KEY_HASHES,
    KEY_OFFSETS,
    KEY_ROWS,
    KEY_VALUES,
    ArraySpec,
    Manifest,
)
from store.job import Job, JobSplit, job_folder, own_specs
from store.keys import KeyTable
from store.layout import Layout, choose_shard_rows
from store.locks import pid_namespace, process_start
from store.metadata import write_array_metadata, write_group, write_manifest
from store.plan import Plan
from store.shards import ArrayWriter

KEY_SPECS = {
    KEY_VALUES: ArraySpec(name=KEY_VALUES, dtype="uint8"),
    KEY_OFFSETS: ArraySpec(name=KEY_OFFSETS, dtype="int64"),
    KEY_HASHES: ArraySpec(name=KEY_HASHES, dtype="uint64"),
    KEY_ROWS: ArraySpec(name=KEY_ROWS, dtype="int64"),
}


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
        lay_out(building, manifest, job, plan.tables)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its name at the end, and is deleted after an error.

    Its name says whose it is, so that a later process can clear away what a killed one left.
    """
    begun = f".{target.name}.creating.{socket.gethostname()}.{pid_namespace()}."
    building = target.with_name(f"{begun}{os.getpid()}")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, begun)
        building.mkdir()
        try:
            yield building
            os.rename(building, target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        sync_folder(target.parent)


def remove_abandoned(folder: Path, begun: str) -> None:
    """Delete what processes that are gone had begun. The name's end is the process id."""
    for path in list(folder.iterdir()):
        name, pid = path.name[: len(begun)], path.name[len(begun) :]
        if name == begun and pid.isdigit() and (int(pid) == os.getpid() or process_start(int(pid)) is None):
            shutil.rmtree(path)


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


def lay_out(folder: Path, manifest: Manifest, job: Job, tables: Mapping[str, KeyTable]) -> None:
    """Write everything of a new store but its rows."""
    for split, table in tables.items():
        write_group(folder / split)
        write_keys(folder, split, table)
        for spec in job.direct:
            layout = job.layout(spec, len(table))
            write_array_metadata(folder / split, spec.name, layout, job.attributes(spec.name))
    job.save_in(job_folder(folder, job.name))
    write_manifest(folder, manifest)


def write_keys(folder: Path, split: str, table: KeyTable) -> None:
    """The key arrays of a split, and their checksums in `.commits/<split>.keys.json`."""
    arrays = {
        KEY_VALUES: table.values,
        KEY_OFFSETS: table.offsets,
        KEY_HASHES: table.hashes,
        KEY_ROWS: table.rows,
    }
    checksums = {}
    for name, array in arrays.items():
        spec = KEY_SPECS[name]
        layout = Layout.of(spec, len(array), 0)
        writer = ArrayWriter(folder / split / name, layout)
        writer.append(np.ascontiguousarray(array, dtype=spec.dtype).tobytes())
        checksums[name] = writer.close()
        write_array_metadata(folder / split, name, layout, {})
    (folder / COMMITS_FOLDER).mkdir(exist_ok=True)
    write_json(folder / COMMITS_FOLDER / f"{split}.keys.json", checksums)
