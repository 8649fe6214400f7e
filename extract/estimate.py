"""`--dry-run`: how large the store will be, whether the disk has room, how long it will take, what is wrong with a sample
of the data. Writes nothing."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from console.output import get_logger
from extract.addition import addition_task
from extract.config import ExtractConfig
from extract.decode.pool import DecodedBatch
from extract.decode.sample import DecodedSample
from extract.encode import Encoder, decode_here
from extract.follow.changes import Changes
from extract.follow.version import bytes_needed, changes_of
from extract.output import check_same, work_path
from extract.plan import (
    ExtractTask,
    calibration_samples,
    decode_workers,
    make_task,
    open_data,
    open_teacher,
    spread,
)
from extract.result import ExtractResult
from extract.sources.splitting import count_shared
from extract.teachers import Teacher
from store import format as names
from store.format import ArraySpec
from store.job import count_committed, features_job
from store.metadata import ZARR_JSON
from store.reader import open_store

if TYPE_CHECKING:
    from extract.bucket import FoundStore

log = get_logger("extract")

CHECKED, LEAST_CHECKED = 64, 8  # samples that are read with their targets, in all and of each split
TIMED_SAMPLES = 32
TIMED_PASSES = 3


def estimate(config: ExtractConfig) -> ExtractResult:
    """Sizes from the arrays, times from a few real samples: decoded once, encoded `TIMED_PASSES` times."""
    found = None
    if config.url is not None:
        from extract.bucket import look_at_url

        found = look_at_url(config)
    teacher = open_teacher(config)
    source = open_data(config)
    task = addition_task(config, make_task(config, source, teacher))
    batch_size = task.batch_rows
    samples = calibration_samples(task, min(TIMED_SAMPLES, batch_size))
    decode_here(task.encoding, samples[:1])  # the first one imports the decoder
    started = time.perf_counter()
    batch = decode_here(task.encoding, samples)
    decode_s = (time.perf_counter() - started) / len(samples)
    encode_s, frames = timed_encoding(task, teacher, batch)
    arrays = {spec.name: bytes_per_sample(spec, batch.results, frames) for spec in task.arrays}
    if config.logits != "none":
        logits = names.logits_array(config.logits, len(task.manifest.class_names))
        arrays[logits.name] = float(logits.row_bytes)
    workers = max(1, decode_workers(config, len(config.devices)))
    per_sample = max(encode_s, decode_s / workers) / len(config.devices)
    total = int(sum(arrays.values()) * task.rows)
    free = free_bytes(config.folder)
    if found is None:
        to_encode, needed, changes = what_is_left(config, task, total)
    else:
        to_encode, needed, changes = *left_for_url(config, task, found, arrays), None
    figures: dict[str, Any] = {
        "batch_size": batch_size,
        "bytes_per_sample": {name: round(size, 1) for name, size in arrays.items()},
        "total_bytes": total,
        "free_bytes": free,
        "needed_bytes": needed,
        "fits": needed < free,
        "state": None if found is None else found.state,
        "to_encode": to_encode,
        "encode_ms_per_image": 1000 * encode_s,
        "decode_ms_per_image_and_core": 1000 * decode_s,
        "decoding_workers": workers,
        "estimated_seconds": per_sample * to_encode,
        "images_per_second": 1 / per_sample,
        "timed_samples": len(samples),
        **check_samples(task),
    }
    splits = source.splits
    warnings = [
        f"{count:,} of {len(splits[other]):,} samples of {other} are exact copies of samples of {first}: "
        f"results on {other} will be too optimistic"
        for (first, other), count in count_shared(splits).items()
    ]
    for text in warnings:
        log.warning("%s", text)
    result = ExtractResult(
        store=config.out,
        rows=task.rows,
        splits={name: len(split) for name, split in task.splits.items()},
        batch_size=batch_size,
        random_weights=teacher.spec.random_weights,
        estimate=figures,
        warnings=warnings,
    )
    if changes is not None:
        result.note_changes(changes.summary())
    return result


def what_is_left(
    config: ExtractConfig, task: ExtractTask, total_bytes: int
) -> tuple[int, int, Changes | None]:
    """Samples that a run would encode, bytes that it needs on the disk, what changed since a complete store.

    All of a new store, the rest of an incomplete one, the changes of a complete one.

    Raises:
        DifferentStore: when the store was made with other options.
    """
    path = config.folder
    if config.overwrite or not (path / ZARR_JSON).exists():
        return task.rows, total_bytes, None
    check_same(path, task, open_store(path, allow_incomplete=True).manifest, config.grid == "auto")
    folder = work_path(path)
    job = features_job(folder)
    if job is not None:
        planned = sum(end - first for _, first, end in job.units())
        left = planned - count_committed(folder, job)
        return left, total_bytes * left // max(1, task.rows), None
    if config.base is not None:
        return 0, 0, None
    changes = changes_of(config, task)
    if not changes.any:
        return 0, 0, changes
    return changes.counts.encode, bytes_needed(task, open_store(path), changes, linked=True), changes


def left_for_url(
    config: ExtractConfig, task: ExtractTask, found: FoundStore, arrays: Mapping[str, float]
) -> tuple[int, int]:
    """Samples that a run would encode, and bytes that staging needs: one shard a device, and small arrays twice.

    arrays: bytes a sample. Raises DifferentStore as the run would.
    """
    from extract.bucket import check_found

    check_found(config, task, found)
    if found.complete:
        return 0, 0
    direct = {spec.name for spec in task.arrays if spec.direct}
    shard = sum(size for name, size in arrays.items() if name in direct) * min(task.shard_rows, task.rows)
    shard *= len(config.devices)
    small = sum(size for name, size in arrays.items() if name not in direct) * task.rows
    return task.rows - (found.committed or 0), int(shard + 2 * small)


def check_samples(task: ExtractTask) -> dict[str, Any]:
    """`checked_samples`, and `bad_samples` among them: split, key and reason of each.

    Images, boxes and masks of samples that are evenly spread over every split are read exactly as the run will.
    """
    bad: list[dict[str, str]] = []
    checked = 0
    for name, split in task.splits.items():
        count = min(len(split), max(LEAST_CHECKED, CHECKED * len(split) // task.rows))
        rows = spread(count, len(split))
        for row in rows:
            sample = split[row]
            (result,) = decode_here(task.encoding, [sample]).results
            if result.reason is not None:
                bad.append({"split": name, "key": sample.key, "reason": result.reason})
        checked += len(rows)
    return {"checked_samples": checked, "bad_samples": bad}


def timed_encoding(task: ExtractTask, teacher: Teacher, batch: DecodedBatch) -> tuple[float, int]:
    """Median seconds a sample of a few passes, and rows of frames a sample."""
    encoder = Encoder(teacher, task.encoding, len(batch.samples))
    arrays = encoder.launch(batch).arrays()  # a warm-up
    times = []
    for _ in range(TIMED_PASSES):
        started = time.perf_counter()
        encoder.launch(batch).arrays()
        times.append(time.perf_counter() - started)
    frames = arrays[names.FRAMES].shape[1] if names.FRAMES in arrays else 0
    return statistics.median(times) / len(batch.samples), frames


def bytes_per_sample(spec: ArraySpec, results: list[DecodedSample], frames: int) -> float:
    """Bytes a row of an array takes; for ragged ones as measured on the timed samples."""
    if not spec.ragged:
        return float(spec.row_bytes)
    counts: dict[str, list[int]] = {
        names.FRAMES: [frames],
        names.BOXES: [0 if result.boxes is None else len(result.boxes.values) for result in results],
        names.BOX_CLASSES: [0 if result.boxes is None else len(result.boxes.classes) for result in results],
        names.MASK: [len(result.mask) for result in results],
        names.IMAGES_ENCODED: [len(result.encoded) for result in results],
    }
    return float(np.mean(counts[spec.name])) * spec.row_bytes + np.dtype(np.int64).itemsize


def free_bytes(path: Path) -> int:
    """Free space of the disk that the path is, or would be, on."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
