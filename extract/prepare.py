"""Before the first row: data set and teacher are opened, the store is made, resumed or refused; and what follows its last."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from console.cores import core_share
from console.log import get_logger
from extract.config import ConfigError, ExtractConfig
from extract.encode import encode_samples
from extract.follow.changes import Changes
from extract.follow.stamps import annotation_stamp, digest_of, load_stamps, save_stamps, stamps_of
from extract.follow.version import changes_of, finish_switch, follow, is_rows_store, rows_task, work_path
from extract.plan import ExtractTask, batch_rows, calibration_samples, shard_rows
from extract.resume import (
    FOLDER,
    adopt_rows,
    check_same,
    committed_part,
    count_committed,
    job_of,
    list_units,
    record_source,
    recorded_splits,
)
from extract.sources.base import RemovedFile, Source
from extract.sources.detect import open_source
from extract.teachers import Teacher, license_notice, load_teacher
from store import format as names
from store.create import create_store
from store.errors import StoreError
from store.finalize import finalize_store
from store.format import RANDOM_WEIGHTS_NOTICE
from store.job import Job
from store.keys import Plan
from store.metadata import ZARR_JSON, write_json
from store.reader import open_store
from store.rows import channel_scale

log = get_logger("extract")

LISTING_LOG_S = 5.0


# -- what an extraction opens ----------------------------------------------------------------------------


class ListingLog:
    """Says every few seconds how many files a large data set has shown so far."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, found: int) -> None:
        if time.monotonic() - self.last >= LISTING_LOG_S:
            self.last = time.monotonic()
            log.info("listing the data set: %s files so far", f"{found:,}")


def open_data(config: ExtractConfig) -> Source:
    """Open the data set; log its notes, warnings and counts."""
    source = open_source(
        config.data,
        config.source,
        split=config.split or None,
        val_fraction=config.val_fraction,
        group_duplicates=config.group_duplicates,
        recorded=lambda: recorded_splits(config),
        progress=ListingLog(),
        **config.source_options,
    )
    for note in source.notes:
        log.info("%s", note)
    for text in source.warnings:
        log.warning("%s", text)
    counts = ", ".join(f"{len(samples):,} {name}" for name, samples in source.splits().items())
    log.info("%s: %s data set, %s, %d classes", source.root, source.kind, counts, len(source.class_names))
    return source


def open_teacher(config: ExtractConfig) -> Teacher:
    """The teacher on the first device."""
    teacher = load_teacher(
        config.teacher,
        config.teacher_path,
        device=config.devices[0],
        dtype=config.dtype,
        image_size=config.image_size,
        resize=config.resize,
        pool=config.pool,
        compile_tower=config.compile,
    )
    log.info("teacher %s on %s, %s", teacher.spec.name, teacher.device, teacher.spec.dtype)
    if notice := license_notice(teacher.license):
        log.warning("%s: weights under %s", teacher.spec.name, notice)
    if teacher.spec.random_weights:
        log.warning("%s", RANDOM_WEIGHTS_NOTICE)
    return teacher


def decode_workers(config: ExtractConfig, share: int = 1) -> int:
    """Decoding processes of one of `share` devices: as asked, or its part of the cores, 16 at most.

    A fifth of the cores, one at least, is left to the threads that launch, copy, checksum and write.
    """
    if config.workers is not None:
        return config.workers
    cores = core_share()
    return max(1, min(16, (cores - max(1, cores // 5)) // share))


# -- the store before the first row ----------------------------------------------------------------------


CALIBRATION = 32
PLAN_FILE = "plan.json"
HALVED_FILE = "out_of_memory.jsonl"


def prepare_store(config: ExtractConfig, task: ExtractTask, teacher: Teacher) -> ExtractTask:
    """Make the store, or check the one that is there; the task of the rows that are planned and not encoded yet.

    Whatever changed in the data set since they were planned comes after them, see `follow`.

    Raises:
        DifferentStore: when the store was made otherwise, with the fields that differ.
    """
    path = task.path
    if config.overwrite:
        delete_store(path)
    if not (path / ZARR_JSON).exists():
        make_store(config, task, teacher)
    check_same(path, task, open_store(path, allow_incomplete=True).manifest, config.grid == "auto")
    use_threads(path, teacher)
    planned = rows_task(task) if work_path(path) != path else adopt_rows(task, path)
    gone = sum(samples.missing for samples in planned.splits.values())
    if gone and job_of(planned.path) is not None:
        log.info(
            "%s: %d planned images are gone: the others are finished first, then the store follows",
            path,
            gone,
        )
    return planned


def delete_store(path: Path) -> None:
    """Remove what an earlier run made, and nothing else.

    Raises:
        ConfigError: when the path holds something that is not a store.
    """
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / ZARR_JSON).exists()):
        raise ConfigError(f"--overwrite deletes stores only: {path} is something else, choose another --out")
    shutil.rmtree(path)


def make_store(config: ExtractConfig, task: ExtractTask, teacher: Teacher) -> None:
    """Write the plan: keys in order, row numbers, batch cuts, scales. Another process may be first."""
    plan = Plan(
        {name: samples.samples.keys for name, samples in task.splits.items()},
        batch_rows=batch_rows(config, task, teacher),
        shard_rows=shard_rows(config, task),
    )
    scales = calibrate(task, teacher, plan.batch_rows)
    try:
        create_store(task.path, task.manifest, plan, task.arrays, scales=scales)
    except (StoreError, OSError):
        if config.shard_range is None or not (task.path / ZARR_JSON).exists():
            raise
        return  # another job of the array has made it, from the same data
    save_stamps(task.path / FOLDER, {name: stamps_of(samples)[0] for name, samples in task.splits.items()})
    record_threads(task.path, teacher)
    record_source(task.path, config)


def calibrate(task: ExtractTask, teacher: Teacher, batch_size: int) -> dict[str, np.ndarray]:
    """Powers of two [D] for every scaled array, from samples spread over the data set.

    batch_size: that of the batches to come, so that a GPU compiles for one shape only.
    """
    samples = calibration_samples(task, CALIBRATION)
    _, arrays = encode_samples(teacher, task.encoding, samples, batch_size)
    scaled = {spec.name for spec in task.arrays if spec.scaled}
    return {name: channel_scale(values) for name, values in arrays.items() if name in scaled}


def resume_switch(config: ExtractConfig) -> None:
    """Finish a switch to a new version that was killed: without it the store counts as incomplete."""
    if (config.out / ZARR_JSON).exists() and not config.overwrite:
        with extract_lock(config.out):
            finish_switch(config.out)


# -- after the planned rows -----------------------------------------------------------------------------


def follow_data(
    config: ExtractConfig, task: ExtractTask, between: Callable[[], None] = lambda: None
) -> tuple[ExtractTask | None, Changes]:
    """`follow`, by one process at a time."""
    with extract_lock(task.path):
        return follow(config, task, between)


def warn_of_changes(config: ExtractConfig, task: ExtractTask) -> None:
    """What `--shard-range` leaves alone: its numbers are those of the shards that were planned first."""
    changes = changes_of(config, task)
    if changes.any:
        log.warning(
            "%s: the data set has changed: %s. Run the same command without --shard-range: the store follows it",
            task.path,
            changes.describe(),
        )


def count_still_bad(task: ExtractTask, job: Job) -> tuple[int, int]:
    """Committed rows of a job, and the bad ones among them, without those that were repaired or removed since."""
    rows = bad = 0
    for split, samples in task.splits.items():
        stamps = load_stamps(task.path / FOLDER, split, len(samples))
        flags = committed_part(task.path, job, split, names.VALID)
        contents = committed_part(task.path, job, split, names.CONTENT)
        for (first, stop, valid), (_, _, content) in zip(flags, contents, strict=True):
            rows += stop - first
            for offset in np.flatnonzero(np.frombuffer(valid, np.bool_) == 0).tolist():
                (sample,) = samples.between(first + offset, first + offset + 1)
                same = digest_of(sample) == content[16 * offset : 16 * offset + 16]
                same = same and annotation_stamp(sample) == tuple(stamps[first + offset, 2:].tolist())
                bad += same and not isinstance(sample.image, RemovedFile)
    return rows, bad


# -- the end ------------------------------------------------------------------------------------------


def finalize(path: Path, own_all: bool) -> bool:
    """Complete the store if all rows are committed; of several processes one does it. True when complete.

    Raises:
        StoreError: when rows are missing although this process was to write all of them.
    """
    with extract_lock(path):
        job = job_of(path)
        if job is None:
            return True
        committed = count_committed(path, job)[0]
        expected = sum(end - first for _, first, end in list_units(job))
        if committed < expected and not own_all:
            log.info("%s: %d of %d rows are committed, other shards are missing", path, committed, expected)
            return False
        finalize_store(path, statistics=not is_rows_store(path))
        return True


@contextmanager
def extract_lock(path: Path) -> Iterator[None]:
    """One extracting process at a time plans or finalizes; the lock is released when its owner ends."""
    (path / FOLDER).mkdir(exist_ok=True)
    with open(path / FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def record_halving(path: Path, halved: list[int]) -> None:
    """Note batch sizes that memory forced: rows encoded so may differ in the last bits from an undisturbed run's."""
    if halved:
        with (path / FOLDER / HALVED_FILE).open("a") as file:
            file.write("".join(json.dumps({"batch_size": size}) + "\n" for size in halved))


# -- threads: on a CPU their number changes the last bits of a sum ----------------------------------


def record_threads(path: Path, teacher: Teacher) -> None:
    import torch

    if teacher.device.type == "cpu":
        write_json(path / FOLDER / PLAN_FILE, {"cpu_threads": torch.get_num_threads()})


def use_threads(path: Path, teacher: Teacher) -> None:
    """Compute with as many threads as the process that wrote the plan, so that all runs agree to the bit."""
    import torch

    file = path / FOLDER / PLAN_FILE
    if teacher.device.type == "cpu" and file.exists():
        torch.set_num_threads(int(json.loads(file.read_bytes())["cpu_threads"]))
