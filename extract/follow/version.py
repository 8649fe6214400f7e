"""A complete store follows its data set: changed samples are encoded, everything else is reused.

1. `find_changes` compares the data set with the store.
2. Samples whose features are nowhere yet are encoded into a store of their own, `.work/rows`, by the same code as
   any other: it can be interrupted, and shared between devices and machines.
3. A new version of the store is put together from its own rows and those, and takes its place (store/version.py).

Until the last step the store stays as it was and readable. A run that was killed goes on at the step it was at.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np

from console.output import get_logger
from extract.config import ExtractConfig
from extract.decode.sample import boxes_to_store
from extract.follow.changes import (
    ENCODE,
    Changes,
    SplitChange,
    Stamps,
    find_changes,
    listed,
    load_stamps,
    save_stamps,
)
from extract.output import extract_lock, planned_rows, rows_path
from extract.plan import AGAIN, ExtractTask, record_source
from extract.result import forget_probe
from extract.sources.base import Boxes
from store import format as names
from store.create import create_store, extend_store, scales_of
from store.errors import DistillError, StoreError
from store.format import NOTES_FOLDER, ArraySpec
from store.job import features_job
from store.keys import KeyTable, Plan
from store.metadata import ZARR_JSON, write_manifest
from store.reader import Store, open_store
from store.version import (
    RaggedChange,
    VersionSplit,
    bytes_to_write,
    can_link,
    drop_rows_store,
    publish_version,
    write_version,
)

log = get_logger("extract")

ZERO_SHOT_LOGITS = (
    f"{names.LOGITS}/zero-shot"  # and its calibrated form: from image and class names, not from labels
)
BOXES_GROUP, MASK_GROUP = "targets/boxes/offsets", "targets/mask/offsets"


class NoSpace(DistillError):
    """The disk has no room for the new version of a store."""


def changes_of(
    config: ExtractConfig, task: ExtractTask, between: Callable[[], None] = lambda: None
) -> Changes:
    """What the data set of `task` (all its samples) has otherwise than the complete store at its path."""
    store, rows = open_store(task.path), rows_path(task.path)
    encoded = open_store(rows) if (rows / ZARR_JSON).exists() and features_job(rows) is None else None
    return find_changes(
        store,
        encoded,
        {name: samples.samples for name, samples in task.splits.items()},
        task.manifest.class_names,
        [spec for spec in task.arrays if spec.name.startswith(names.TARGETS)],
        check_content=config.check_content and encoded is None,
        between=between,
    )


def follow(
    config: ExtractConfig, task: ExtractTask, between: Callable[[], None] = lambda: None
) -> tuple[ExtractTask | None, Changes]:
    """Bring the complete store at `task.path` to what the data set is now, as far as that needs no teacher.

    Returns the task of the rows to encode first, None when the store is as the data set; and what had changed.
    between: called now and then; may raise to stop.
    Raises NoSpace before anything is written, StoreError for a changed data set whose store has several teachers.
    """
    path = task.path
    with extract_lock(path):
        publish_version(path)  # a killed run may have begun it
        changes = changes_of(config, task, between)
        store = open_store(path)
        if not changes.any:
            drop_rows_store(path)
            keep_up(config, task, store, changes)
            return None, changes
        check_one_teacher(store, changes)
        if changes.counts.encode:
            log.info(
                "%s: the data set has changed: %s. %s to encode, everything else is reused",
                path,
                changes.describe(),
                f"{changes.counts.encode:,} images",
            )
            check_space(path, task, store, changes)
            plan_rows(path, task, store, changes)
            return planned_rows(task), changes
        log.info("%s: writing the new version of the store: %s", path, changes.describe())
        check_space(path, task, store, changes)
        put_together(config, task, store, changes, between)
        return None, changes


def check_one_teacher(store: Store, changes: Changes) -> None:
    """Raises StoreError for a store with further teachers: only the first one is at hand to encode what is new."""
    if store.manifest.teachers:
        names_of = ", ".join(store.manifest.teachers)
        raise StoreError(
            f"{store.location}: the data set has changed ({changes.describe()}), and a store with further teachers "
            f"({names_of}) does not follow it: copy it without them (`cli copy {store.location} NEW --arrays "
            "features,targets`, and images, views or logits where it has them), extract into that, add them again"
        )


def keep_up(config: ExtractConfig, task: ExtractTask, store: Store, changes: Changes) -> None:
    """The data set is as the store has it: record what else may be new, such as the times of touched files."""
    if changes.touched:
        save_stamps(task.path / NOTES_FOLDER, {name: split.stamps for name, split in changes.splits.items()})
    record_source(task.path, config)
    known = {"data_root": task.manifest.data_root, "task": task.manifest.task}
    if any(getattr(store.manifest, name) != value for name, value in known.items()):
        write_manifest(task.path, store.manifest.model_copy(update=known))


# -- rows to encode -----------------------------------------------------------------------------------


def plan_rows(path: Path, task: ExtractTask, store: Store, changes: Changes) -> None:
    """Plan the store of rows to encode, or more rows in the one that an earlier run has filled."""
    rows = rows_path(path)
    wanted = {name: split.to_encode for name, split in changes.splits.items() if len(split.to_encode)}
    keys = {name: [changes.splits[name].keys[row] for row in some.tolist()] for name, some in wanted.items()}
    stamps = {name: changes.splits[name].stamps[some] for name, some in wanted.items()}
    if (rows / ZARR_JSON).exists():
        encoded = open_store(rows)
        before: dict[str, Stamps] = {
            name: load_stamps(rows / NOTES_FOLDER, name, len(part)) for name, part in encoded.items()
        }
        taken = {name: part.keys for name, part in encoded.items()}
        extend_store(
            rows, {name: [free_key(key, taken.get(name, ())) for key in some] for name, some in keys.items()}
        )
        save_stamps(
            rows / NOTES_FOLDER,
            {n: np.concatenate([before[n], s]) if n in before else s for n, s in stamps.items()},
        )
        return
    manifest = store.manifest
    scales = scales_of(store, [spec for spec in task.arrays if spec.scaled])
    create_store(
        rows,
        task.manifest,
        Plan(keys, batch_rows=manifest.batch_rows, shard_rows=manifest.shard_rows),
        task.arrays,
        scales={name: np.array(scale, np.float32) for name, scale in scales.items()},
    )
    save_stamps(rows / NOTES_FOLDER, stamps)


def free_key(key: str, taken: Container[str]) -> str:
    """The key of another row of the same sample, whose file has changed since it was encoded; see `sample_key`."""
    return next(name for n in count(1) if (name := key if n == 1 else f"{key}{AGAIN}{n}") not in taken)


# -- the new version ----------------------------------------------------------------------------------


def put_together(
    config: ExtractConfig, task: ExtractTask, store: Store, changes: Changes, between: Callable[[], None]
) -> None:
    """Write the new version of a store, none of whose rows is to be encoded any more, and switch to it."""
    arrays, dropped = arrays_of(task, store, changes)
    stamps = {name: split.stamps for name, split in changes.splits.items()}
    write_version(
        store,
        task.manifest,
        arrays,
        version_splits(arrays, changes),
        notes=lambda folder: save_stamps(folder / NOTES_FOLDER, stamps),
        between=between,
    )
    if dropped:
        log.warning(
            "%s: %s dropped, because labels or images have changed: --logits, or `cli probe`, writes them again",
            task.path,
            listed(dropped),
        )
    forget_probe(task.path)
    publish_version(task.path)
    record_source(task.path, config)


def arrays_of(task: ExtractTask, store: Store, changes: Changes) -> tuple[list[ArraySpec], list[str]]:
    """All arrays of the new version, and the names of those that the store has and the new version has not.

    Zero-shot logits are a function of image and class names: they stay where every row was in the store before.
    """
    later = (f"{names.LOGITS}/", f"{names.MAPS}/")
    logits = [spec for spec in store.manifest.arrays if spec.name.startswith(later)]
    fresh = [number for number, part in enumerate(changes.parts) if part.fresh]
    before, now = changes.classes
    all_old = not any(np.isin(split.part, [ENCODE, *fresh]).any() for split in changes.splits.values())
    kept = [s for s in logits if all_old and before == now and s.name.startswith(ZERO_SHOT_LOGITS)]
    return [*task.arrays, *kept], [spec.name for spec in logits if spec not in kept]


def version_splits(arrays: Sequence[ArraySpec], changes: Changes) -> Mapping[str, VersionSplit]:
    wanted = {spec.name for spec in arrays}
    splits = {}
    for name, change in changes.splits.items():
        groups = {names.BOXES: (BOXES_GROUP, change.boxes), names.MASK: (MASK_GROUP, change.masks)}
        ragged = {
            group: RaggedChange(rows, targets_reader(change, changes, kind))
            for kind, (group, rows) in groups.items()
            if kind in wanted
        }
        splits[name] = VersionSplit(
            keys=KeyTable.build(change.keys, f"split {name!r}"),
            sources=[part.split for part in changes.parts],
            source=change.part,
            row=change.row,
            fixed={names.LABEL: change.labels} if names.LABEL in wanted else {},
            ragged=ragged,
            invalid=change.invalid,
        )
    return splits


def targets_reader(
    change: SplitChange, changes: Changes, kind: str
) -> Callable[[int], Mapping[str, np.ndarray]]:
    """Reads the boxes or the mask of a row; a bad one has none."""

    def read(row: int) -> Mapping[str, np.ndarray]:
        width, height = changes.parts[int(change.part[row])].sizes[int(change.row[row])].tolist()
        sample = change.samples[row]
        if kind == names.MASK:
            mask = sample.read_mask((width, height)) if width else None
            return {names.MASK: np.frombuffer(mask or b"", np.uint8)}
        boxes = (boxes_to_store(sample, (width, height))[0] if width else None) or Boxes.of([], [])
        return {names.BOXES: boxes.values, names.BOX_CLASSES: boxes.classes}

    return read


def check_space(path: Path, task: ExtractTask, store: Store, changes: Changes) -> None:
    """Raises NoSpace when the new version, and the rows encoded for it, do not fit on the disk."""
    needed = bytes_needed(task, store, changes, linked=can_link(path))
    free = shutil.disk_usage(path).free
    if needed > free:
        raise NoSpace(
            f"{path}: the new version of the store needs about {needed / 1e6:,.0f} MB beside the old one, "
            f"{free / 1e6:,.0f} MB are free: free some space and run the same command again; the store is as it was"
        )


def bytes_needed(task: ExtractTask, store: Store, changes: Changes, *, linked: bool) -> int:
    """About how many bytes following the changes adds to the disk, until the old version is deleted.

    linked: whether the file system has hard links.
    """
    arrays, _ = arrays_of(task, store, changes)
    needed = bytes_to_write(store, arrays, version_splits(arrays, changes), linked=linked)
    return needed + changes.counts.encode * sum(spec.row_bytes for spec in arrays if not spec.ragged)
