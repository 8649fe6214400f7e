"""The store at `--out`: made, checked and resumed before the first row, completed after the last one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from console.output import get_logger
from extract.config import ConfigError, ExtractConfig
from extract.encode import encode_samples
from extract.follow.changes import annotation_stamp, digest_of, load_stamps, save_stamps, stamps_of
from extract.plan import (
    DifferentStore,
    ExtractTask,
    RowSamples,
    calibration_samples,
    planned_keys,
    record_source,
    sample_key,
)
from extract.sources.base import RemovedFile, Sample, Samples
from extract.teachers import Teacher
from files.locking import locked
from store import format as names
from store.create import create_store
from store.errors import StoreError
from store.finalize import NOTHING_KNOWN, finalize_store
from store.format import NOTES_FOLDER, Manifest
from store.job import ROWS_STORE, Job, count_committed, features_job, log_path, read_commits, read_parts
from store.keys import Plan
from store.metadata import ZARR_JSON, write_json
from store.reader import open_store
from store.statistics import Moments
from store.writer import channel_scale

log = get_logger("extract")

CALIBRATION = 32
PLAN_FILE = "plan.json"
COMPARED = ("teacher", "preprocessing", "source", "grid", "views", "images", "options")


@contextmanager
def extract_lock(path: Path) -> Iterator[None]:
    """One extracting process at a time plans or finalizes; the lock is released when its owner ends."""
    (path / NOTES_FOLDER).mkdir(exist_ok=True)
    with locked(path / NOTES_FOLDER / "lock"):
        yield


def prepare_store(config: ExtractConfig, task: ExtractTask, teacher: Teacher) -> ExtractTask:
    """Make the store, or check the one that is there; the task of the rows that are planned and not encoded yet.

    Whatever changed in the data set since they were planned comes after them, see `follow`.

    Raises:
        DifferentStore: when the store was made otherwise, with the fields that differ.
        ConfigError: when `--overwrite` would delete something that is not a store.
    """
    path = task.path
    if config.overwrite and path.exists():
        if not path.is_dir() or (any(path.iterdir()) and not (path / ZARR_JSON).exists()):
            raise ConfigError(
                f"--overwrite deletes stores only: {path} is something else, choose another --out"
            )
        shutil.rmtree(path)
    if not (path / ZARR_JSON).exists():
        make_store(config, task, teacher)
    found = open_store(path, allow_incomplete=True).manifest
    check_same(config.url or path, task, found, config.grid == "auto")
    use_threads(path, teacher)
    planned = planned_rows(task)
    gone = sum(samples.missing for samples in planned.splits.values())
    if gone and features_job(planned.path) is not None:
        log.info(
            "%s: %d planned images are gone: the others are finished first, then the store follows",
            path,
            gone,
        )
    return planned


def make_store(config: ExtractConfig, task: ExtractTask, teacher: Teacher) -> None:
    """Write the plan: keys in order, row numbers, batch cuts, scales. Another process may be first."""
    plan = Plan(
        {name: samples.row_keys for name, samples in task.splits.items()},
        batch_rows=task.batch_rows,
        shard_rows=task.shard_rows,
    )
    # Powers of two [D] from samples spread over the data set, in a batch of the size of those to come: so a GPU
    # compiles for one shape only.
    samples = calibration_samples(task, CALIBRATION)
    _, arrays = encode_samples(teacher, task.encoding, samples, plan.batch_rows)
    scaled = {spec.name for spec in task.arrays if spec.scaled}
    scales = {name: channel_scale(values) for name, values in arrays.items() if name in scaled}
    try:
        create_store(task.path, task.manifest, plan, task.arrays, scales=scales)
    except (StoreError, OSError):
        if config.shard_range is None or not (task.path / ZARR_JSON).exists():
            raise
        return  # another job of the array has made it, from the same data
    notes = task.path / NOTES_FOLDER
    save_stamps(notes, {name: stamps_of(samples)[0] for name, samples in task.splits.items()})
    if teacher.device.type == "cpu":
        import torch

        write_json(notes / PLAN_FILE, {"cpu_threads": torch.get_num_threads()})
    record_source(task.path, config)


def use_threads(path: Path, teacher: Teacher) -> None:
    """Compute with as many threads as the process that wrote the plan: on a CPU their number changes the last bits."""
    import torch

    file = path / NOTES_FOLDER / PLAN_FILE
    if teacher.device.type == "cpu" and file.exists():
        torch.set_num_threads(int(json.loads(file.read_bytes())["cpu_threads"]))


def check_same(path: Path | str, task: ExtractTask, manifest: Manifest, automatic_grid: bool = False) -> None:
    """Raises DifferentStore with every field that differs and both values. Targets and class names may differ."""

    def shorten(value: object) -> str:
        text = str(value)
        return text if len(text) <= 80 else text[:77] + "..."

    differences, hint = [], ""
    for name in COMPARED:
        have, asked = getattr(manifest, name), getattr(task.manifest, name)
        if hasattr(have, "model_dump"):
            have, asked = have.model_dump(), asked.model_dump()
            differences += [
                f"{name}.{key} is {have[key]}, asked for {asked[key]}"
                for key in have
                if have[key] != asked[key]
            ]
        elif have != asked:
            differences.append(f"{name} is {shorten(have)}, asked for {shorten(asked)}")
            if name == "grid" and automatic_grid:
                hint = f"--grid {have or 0} keeps what is stored. "  # `auto` follows the kinds of targets
    needed = {spec.name for spec in task.arrays if not spec.name.startswith(names.TARGETS)}
    missing = sorted(needed - {spec.name for spec in manifest.arrays})
    if missing and not differences:
        differences.append(f"it lacks the arrays {', '.join(missing)}")
    if differences:
        raise DifferentStore(
            f"{path} was made with other options: {'; '.join(differences)}. {hint}"
            "Use another --out, or --overwrite to delete it and extract everything again"
        )


# -- the rows that are planned ---------------------------------------------------------------------------


def rows_path(path: Path) -> Path:
    """Where the rows are encoded that a new version of the store needs."""
    return path / names.WORK_FOLDER / ROWS_STORE


def work_path(path: Path) -> Path:
    """The store that is being filled: that of the rows for a new version, or the store itself."""
    rows = rows_path(path)
    return rows if (rows / ZARR_JSON).exists() and features_job(rows) is not None else path


def planned_rows(task: ExtractTask) -> ExtractTask:
    """The task of the rows that are planned and not complete: those of the store, or of a new version of it."""
    rows = work_path(task.path)
    adopted = adopt_rows(task, rows)
    if rows == task.path:
        return adopted
    store = open_store(task.path)
    planned = {sample_key(key) for samples in adopted.splits.values() for key in samples.keys}
    kept = {key for samples in task.splits.values() for key in samples.samples.keys} - planned
    bad = [
        key
        for split in store.values()
        for key in (split.keys[row] for row in np.flatnonzero(~split.valid).tolist())
        if key in kept
    ]
    return replace(adopted, reused=len(kept), reused_bad=len(bad))


class NoSamples(Samples):
    """A split that the data set does not have."""

    def build(self, index: int) -> Sample:
        raise IndexError(index)


def adopt_rows(task: ExtractTask, path: Path) -> ExtractTask:
    """The task with its samples in the planned row order of the store at `path`, which is then the task's.

    New samples are left out. A sample that is gone, or in another split, leaves a row that will be a bad one.
    """
    splits = {}
    for name, table in planned_keys(path).items():
        samples = task.splits[name].samples if name in task.splits else NoSamples(())
        order = None
        if len(samples) != len(table) or any(a != b for a, b in zip(samples.keys, table, strict=True)):
            index = {key: number for number, key in enumerate(samples.keys)}
            order = np.fromiter((index.get(sample_key(key), -1) for key in table), np.int64, len(table))
        splits[name] = RowSamples(samples, order, table)
    return replace(task, path=path, splits=splits)


def count_still_bad(task: ExtractTask, job: Job) -> tuple[int, int]:
    """Committed rows of a job, and the bad ones among them, without those that were repaired or removed since."""
    rows = bad = 0
    stamps = {
        split: load_stamps(task.path / NOTES_FOLDER, split, len(samples))
        for split, samples in task.splits.items()
    }
    for split, shard_first, _ in job.units():
        log = log_path(task.path, job, split, shard_first // job.shard_rows)
        commits = read_commits(log)
        parts = (read_parts(log, commits, name) for name in (names.VALID, names.CONTENT))
        for (first, stop, valid), (_, _, content) in zip(*parts, strict=True):
            rows += stop - first
            for offset in np.flatnonzero(np.frombuffer(valid, np.bool_) == 0).tolist():
                row = first + offset
                sample = task.splits[split][row]
                same = digest_of(sample) == content[16 * offset : 16 * offset + 16]
                same = same and annotation_stamp(sample) == tuple(stamps[split][row, 2:].tolist())
                bad += same and not isinstance(sample.image, RemovedFile)
    return rows, bad


# -- the end ------------------------------------------------------------------------------------------


def complete_store(
    path: Path, own_all: bool, moments: Mapping[tuple[str, str], Mapping[int, Moments]] = NOTHING_KNOWN
) -> bool:
    """Complete the store if all rows are committed; of several processes one does it. True when complete.

    moments: of shards that are in a bucket, see `finalize_store`.

    Raises:
        StoreError: when rows are missing although this process was to write all of them.
    """
    with extract_lock(path):
        job = features_job(path)
        if job is None:
            return True
        committed = count_committed(path, job)
        expected = sum(end - first for _, first, end in job.units())
        if committed < expected and not own_all:
            log.info("%s: %d of %d rows are committed, other shards are missing", path, committed, expected)
            return False
        rows_store = path.parent.name == names.WORK_FOLDER  # nothing is trained from it
        finalize_store(path, statistics=not rows_store, moments=moments)
        return True
