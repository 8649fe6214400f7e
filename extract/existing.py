"""A store that is already there: does it fit what is asked, what of it is committed, did files change?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.config import ExtractConfig
from extract.planning import NO_SAMPLES, ExtractTask, RowSamples, in_stored_order
from extract.sources.base import Sample, content_digest
from imaging.errors import ImageError
from store import format as names
from store.commits import read_commits
from store.errors import DistillError
from store.files import write_file, write_json
from store.format import Manifest
from store.job import Job, job_folder, keys_folder, load_job, log_path, pending_jobs
from store.keys import KeyTable
from store.mapped import open_keys
from store.metadata import ZARR_JSON
from store.reader import open_store

COMPARED = ("teacher", "preprocessing", "class_names", "source", "grid", "views", "images", "options")
FOLDER = ".extract"  # in the store: what the extractor alone needs
SOURCE_FILE = "source.json"
SHOWN = 3
Unit = tuple[str, int, int]  # one shard of the plan: split, first row, end row
UNKNOWN = -1


class DifferentStore(DistillError):
    """The store was made from other options or other files than are asked for now."""


def job_of(path: Path) -> Job | None:
    """The features job that is not finished, or None."""
    return load_job(path, names.FEATURES_JOB) if names.FEATURES_JOB in pending_jobs(path) else None


def list_units(job: Job) -> list[Unit]:
    """All shards of a job: (split, first row, end row), in the order that `--shard-range` counts."""
    return [(split, *job.shard_range(split, shard)) for split in job.splits for shard in job.shards(split)]


def check_same(path: Path, task: ExtractTask, manifest: Manifest) -> None:
    """Raises DifferentStore with every field that differs and both values."""
    differences = []
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
    have_arrays = {spec.name for spec in manifest.arrays if not spec.name.startswith(names.LOGITS)}
    missing = sorted({spec.name for spec in task.arrays} - have_arrays)
    if missing and not differences:
        differences.append(f"it lacks the arrays {', '.join(missing)}")
    if differences:
        raise DifferentStore(
            f"{path} was made otherwise: {'; '.join(differences)}. "
            "Use another --out, or --overwrite to delete it and start anew"
        )


def shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def adopt_rows(task: ExtractTask, path: Path) -> tuple[ExtractTask, dict[str, list[str]]]:
    """The task with its samples in the store's planned row order, and the keys of each split that are new.

    Raises:
        DifferentStore: when the data set lacks samples of the store.
    """
    planned = planned_keys(path)
    splits: dict[str, RowSamples] = {}
    for name, keys in planned.items():
        samples = task.splits[name].samples if name in task.splits else NO_SAMPLES
        splits[name], missing = in_stored_order(samples, keys)
        if missing:
            raise explain_missing(path, task, name, missing)
    new = {
        name: [key for key in samples.samples.keys if name not in planned or key not in planned[name]]
        for name, samples in task.splits.items()
        if len(samples.samples) > len(planned.get(name, ()))
    }
    return replace(task, splits=splits), new


def explain_missing(path: Path, task: ExtractTask, name: str, missing: list[str]) -> DifferentStore:
    """The error for samples of a store's split that are not in the data set's split of that name."""
    for other, samples in task.splits.items():
        if any(key in samples.samples.keys for key in missing[:SHOWN]):
            return DifferentStore(
                f"{path}: images of its split {name!r} are now in {other!r} ({listing(missing)}): the data set is "
                "split otherwise than when the store was made. Give --val-fraction and --split as before, or "
                "--overwrite to start anew"
            )
    return DifferentStore(
        f"{path}: {len(missing)} images of its split {name!r} are not in {task.manifest.data_root} any "
        f"more ({listing(missing)}): bring them back, or use --overwrite to start anew"
    )


def planned_keys(path: Path) -> dict[str, KeyTable]:
    """The keys of every split in row order, those of an unfinished extension included."""
    job = job_of(path)
    appended = keys_folder(job_folder(path, job.name)) if job is not None else path
    splits = list(job.splits) if job is not None else open_store(path).splits
    return {
        split: open_keys(appended / split if (appended / split).exists() else path / split)
        for split in splits
    }


def listing(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


# -- how the data set is opened again: `cli verify` looks for its images -----------------------------


def record_source(path: Path, config: ExtractConfig) -> None:
    """Keep how the data set was opened beside the store's arrays; a database's password is in none of it."""
    record = {"split": config.split, "options": config.source_options, "val_fraction": config.val_fraction}
    write_json(path / FOLDER / SOURCE_FILE, record)


def recorded_source(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What `record_source` kept of splits and options, both empty where nothing was."""
    record = read_source_record(path)
    return record.get("split", {}), record.get("options", {})


def read_source_record(path: Path) -> dict[str, Any]:
    file = path / FOLDER / SOURCE_FILE
    record: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    return record


def recorded_splits(config: ExtractConfig) -> Mapping[str, KeyTable] | None:
    """The keys of `train` and `val` in the store at `--out`, which stay where they are; None: cut by the rule alone.

    Raises:
        DifferentStore: when the store was cut with another `--val-fraction`.
    """
    path = config.out
    if config.overwrite or not (path / ZARR_JSON).exists():
        return None
    fraction = read_source_record(path).get("val_fraction", config.val_fraction)  # older stores have none
    if fraction != config.val_fraction:
        raise DifferentStore(
            f"{path}: its validation split was cut with --val-fraction {fraction:g}, asked for "
            f"{config.val_fraction:g}. Give --val-fraction {fraction:g}, or --overwrite to extract everything again"
        )
    keys = planned_keys(path)
    return keys if keys.keys() <= {"train", "val"} else None


# -- files: size and time of change at the last run ---------------------------------------------------


def snapshot(samples: RowSamples) -> npt.NDArray[np.int64]:
    """int64 [N, 2]: bytes and time of the last change (ns) of each sample's file; -1 where it is no file."""
    table = np.full((len(samples), 2), UNKNOWN, np.int64)
    for row in range(len(samples)):
        (sample,) = samples.between(row, row + 1)
        if isinstance(sample.image, Path):
            try:
                status = sample.image.stat()
            except OSError:
                continue
            table[row] = status.st_size, status.st_mtime_ns
    return table


def save_snapshots(path: Path, task: ExtractTask) -> dict[str, npt.NDArray[np.int64]]:
    """Record the files as they are now."""
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    tables = {name: snapshot(samples) for name, samples in task.splits.items()}
    for name, table in tables.items():
        write_file(folder / f"files-{name}.i64", table.tobytes())
    return tables


def check_files(path: Path, task: ExtractTask) -> bool:
    """True when files were touched. Files of unchanged size and time are trusted, the others read.

    Raises:
        DifferentStore: when a committed image's bytes differ from what was encoded.
    """
    touched = False
    changed: list[str] = []
    for name, samples in task.splits.items():
        recorded = load_snapshot(path, name, len(samples))
        current = snapshot(samples)
        suspects = np.flatnonzero((current != recorded).any(axis=1))
        content = committed_content(path, name)
        touched = touched or len(suspects) > 0
        suspects = suspects[suspects < len(content)]
        changed += changed_keys(samples, suspects, content)
    if changed:
        raise DifferentStore(
            f"{path}: {len(changed)} images have other bytes than when they were encoded ({listing(changed)}): "
            "use --overwrite to start anew, or restore the files"
        )
    return touched


def changed_keys(
    samples: RowSamples, rows: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]
) -> list[str]:
    """Keys of those of the rows whose bytes have another digest than `content` says."""

    def differs(row: int) -> str | None:
        (sample,) = samples.between(row, row + 1)
        return None if hash_of(sample) == content[row].tobytes() else sample.key

    with ThreadPoolExecutor(8) as pool:
        return [key for key in pool.map(differs, rows.tolist()) if key is not None]


def load_snapshot(path: Path, split: str, rows: int) -> npt.NDArray[np.int64]:
    """int64 [rows, 2]; what was not recorded differs from everything."""
    table = np.full((rows, 2), UNKNOWN - 1, np.int64)
    file = path / FOLDER / f"files-{split}.i64"
    if file.exists():
        found = np.frombuffer(file.read_bytes(), np.int64)
        found = found[: len(found) // 2 * 2].reshape(-1, 2)[:rows]
        table[: len(found)] = found
    return table


def hash_of(sample: Sample) -> bytes:
    """The digest of a sample's bytes now; zeros when it cannot be read, as the store has it then."""
    try:
        return content_digest(sample.read())
    except ImageError:
        return bytes(16)


# -- committed rows ------------------------------------------------------------------------------------


def committed_part(path: Path, job: Job, split: str, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(first row, end row, bytes) of a small array in every commit of a split's unfinished job."""
    for shard in job.shards(split):
        log = log_path(path, job, split, shard)
        if not log.exists():
            continue
        with log.open("rb") as file:
            for commit in read_commits(log):
                if name in commit.parts:  # the last record of a shard publishes its files and holds no rows
                    position, length = commit.parts[name]
                    file.seek(position)
                    yield commit.start, commit.stop, file.read(length)


def committed_content(path: Path, split: str) -> npt.NDArray[np.uint8]:
    """uint8 [n, 16]: content digests of the committed rows. Rows of gaps count as not committed."""
    parts = [np.empty((0, 16), np.uint8)]
    job = job_of(path)
    end = 0
    if job is None or job.splits[split].start:  # a complete store, or one that is being extended
        finished = open_store(path, allow_incomplete=True)[split]
        parts.append(finished.read(names.CONTENT))
        end = len(parts[-1])
    if job is not None:
        for first, stop, data in committed_part(path, job, split, names.CONTENT):
            if first > end:
                break
            parts.append(np.frombuffer(data, np.uint8).reshape(-1, 16)[end - first :])
            end = max(end, stop)
    return np.concatenate(parts)


def count_committed(path: Path, job: Job) -> tuple[int, int]:
    """Rows that a job has committed so far, and how many of them are bad."""
    rows = bad = 0
    for split in job.splits:
        for first, stop, data in committed_part(path, job, split, names.VALID):
            rows += stop - first
            bad += data.count(0)
    return rows, bad
