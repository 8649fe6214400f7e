"""A store that is already there: does it fit what is asked, what of it is committed, how was its data set opened?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from console.output import plain_json
from console.redaction import redact, redact_values
from extract.config import ExtractConfig
from extract.plan import NO_SAMPLES, ExtractTask, in_stored_order
from store import format as names
from store.errors import DistillError
from store.format import Manifest
from store.job import Job, job_folder, keys_folder, load_job, log_path, pending_jobs, read_commits
from store.keys import KeyTable, open_keys
from store.metadata import ZARR_JSON, write_json
from store.reader import open_store

COMPARED = ("teacher", "preprocessing", "source", "grid", "views", "images", "options")
FOLDER = ".extract"  # in the store: what the extractor alone needs
SOURCE_FILE = "source.json"
Unit = tuple[str, int, int]  # one shard of the plan: split, first row, end row


class DifferentStore(DistillError):
    """The store was made from other options or other files than are asked for now."""


def job_of(path: Path) -> Job | None:
    """The features job that is not finished, or None."""
    return load_job(path, names.FEATURES_JOB) if names.FEATURES_JOB in pending_jobs(path) else None


def list_units(job: Job) -> list[Unit]:
    """All shards of a job: (split, first row, end row), in the order that `--shard-range` counts."""
    return [(split, *job.shard_range(split, shard)) for split in job.splits for shard in job.shards(split)]


def check_same(path: Path, task: ExtractTask, manifest: Manifest, automatic_grid: bool = False) -> None:
    """Raises DifferentStore with every field that differs and both values. Targets and class names may differ."""
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


def shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def adopt_rows(task: ExtractTask, path: Path) -> ExtractTask:
    """The task with its samples in the planned row order of the store at `path`, which is then the task's.

    New samples are left out. A sample that is gone, or in another split, leaves a row that will be a bad one.
    """
    splits = {
        name: in_stored_order(task.splits[name].samples if name in task.splits else NO_SAMPLES, keys)
        for name, keys in planned_keys(path).items()
    }
    return replace(task, path=path, splits=splits)


def planned_keys(path: Path) -> dict[str, KeyTable]:
    """The keys of every split in row order, those of an unfinished extension included."""
    job = job_of(path)
    appended = keys_folder(job_folder(path, job.name)) if job is not None else path
    splits = list(job.splits) if job is not None else open_store(path).splits
    return {
        split: open_keys(appended / split if (appended / split).exists() else path / split)
        for split in splits
    }


# -- how the data set is opened again: `cli verify` looks for its images -----------------------------


def record_source(path: Path, config: ExtractConfig) -> None:
    """Keep how the data set was opened beside the store's arrays; no password is in it."""
    record: dict[str, Any] = {
        "data": redact(config.data) if "://" in config.data else os.path.abspath(config.data),
        "source": config.source,
        "split": config.split,
        "options": config.source_options,
        "val_fraction": config.val_fraction,
        "group_duplicates": config.group_duplicates,
    }
    record = redact_values(plain_json(record))
    if record != read_source_record(path):
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


def count_committed(path: Path, job: Job) -> tuple[int, int]:
    """Rows that a job has committed so far, and how many of them are bad."""
    rows = bad = 0
    for split in job.splits:
        for first, stop, data in committed_part(path, job, split, names.VALID):
            rows += stop - first
            bad += data.count(0)
    return rows, bad
