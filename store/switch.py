"""Put a new version in the place of the store, and delete what is left over.

    .work/next/            the new version, complete, under the same layout as a store (version.py writes it)
    .work/rows/            a store of rows that were encoded for it
    .work/replaced/        what the switch has moved out of the way

A store is many files, and no file system renames them all at once, so the order of the steps makes it safe:

1. The old manifest is marked incomplete: from here on readers refuse the store instead of mixing two versions.
2. Each split, and `.commits`, is moved: the old one to `.work/replaced`, the new one from `.work/next`.
3. The new root `zarr.json` is moved last. It says complete, so its arrival is what completes the switch.

Each step can be seen to be done from what is in `.work/next` still: what is gone from there has been moved. So a
switch that was killed is finished by calling `publish_version` again, which skips those steps.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from files.writing import sync_folder
from store.errors import disk_errors
from store.finalize import drop_job, remove_done
from store.format import COMMITS_FOLDER, WORK_FOLDER
from store.job import CREATING, DONE, NEXT, REPLACED, ROWS_STORE, pending_jobs
from store.metadata import ZARR_JSON, parse_manifest, read_root, write_json


def next_folder(store: Path, end: str = "") -> Path:
    return store / WORK_FOLDER / f"{NEXT}{end}"


def publish_version(store: Path) -> None:
    """Put the version in `.work/next` in the store's place; finishes a switch that was killed. May be repeated.

    Arrays that are being added meanwhile (`logits/…`) are dropped.
    """
    with disk_errors(store):
        new = next_folder(store)
        if (new / ZARR_JSON).exists():
            switch(store, new)
        clear_version(store)


def switch(store: Path, new: Path) -> None:
    root = read_root(store)
    old_splits = parse_manifest(root, str(store)).splits
    new_splits = parse_manifest(read_root(new), str(new)).splits
    for job in pending_jobs(store):
        drop_job(store, job)
    if root["attributes"]["complete"]:
        root["attributes"]["complete"] = False
        write_json(store / ZARR_JSON, root)
    replaced = store / WORK_FOLDER / REPLACED
    replaced.mkdir(exist_ok=True)
    for name in [COMMITS_FOLDER, *dict.fromkeys([*old_splits, *new_splits])]:
        # Not in `.work/next` any more: it was moved before the kill, and what is in the store is the new one.
        moved = not (new / name).exists() and name in {COMMITS_FOLDER, *new_splits}
        if not moved and (store / name).exists():
            os.rename(store / name, replaced / name)
        if (new / name).exists():
            os.rename(new / name, store / name)
    for note in [path for path in new.glob(".*/*") if path.is_file()]:
        (store / note.parent.name).mkdir(exist_ok=True)
        os.replace(note, store / note.parent.name / note.name)
    # All moves must be on the disk before the manifest that calls the store complete.
    for folder in (store, new, replaced):
        sync_folder(folder)
    os.replace(new / ZARR_JSON, store / ZARR_JSON)
    sync_folder(store)


def clear_version(store: Path) -> None:
    """Delete what a finished switch has left, and a version that was never finished. `next` goes last: see above."""
    work = store / WORK_FOLDER
    for name in (f"{NEXT}{CREATING}", REPLACED, ROWS_STORE, NEXT):
        if name == ROWS_STORE and not (work / NEXT).exists():
            continue  # rows that are still being encoded
        if (work / name).exists():
            shutil.rmtree(work / f"{name}{DONE}", ignore_errors=True)
            os.rename(work / name, work / f"{name}{DONE}")
    if work.exists():
        remove_done(store)


def drop_rows_store(store: Path) -> None:
    """Delete the rows that were encoded for a new version that nothing asks for any more."""
    work = store / WORK_FOLDER
    for folder in [work / ROWS_STORE, *work.glob(f".{ROWS_STORE}.creating.*")]:
        if folder.exists():
            os.rename(folder, folder.with_name(f"{folder.name}{DONE}"))
    if work.exists():
        remove_done(store)


def switch_is_done(store: Path) -> bool:
    """Whether a new version has its place, and what it replaced was not deleted."""
    new = next_folder(store)
    return new.exists() and not (new / ZARR_JSON).exists()


def being_switched(store: Path) -> bool:
    """Whether a switch has begun and not ended, or a complete new version waits for it."""
    return next_folder(store).exists()
