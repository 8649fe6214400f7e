"""What a run takes from a store: splits, rows, labels and classes, and warnings about what it is measured on.

What does not fit is an error with the next step. No torch here: `cli inspect` counts masks as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from console.output import get_logger
from imaging.decode import FULL_DEPTH, ImageError
from imaging.masks import IGNORE, decode_mask
from store.format import IMAGES_RAW, LABEL, MASK, VALID, Preprocessing
from store.reader import Split, Store
from store.summary import (
    UNDEFINED,
    UNLEARNED,
    absent_warnings,
    class_warnings,
    count_measured,
    labeled_rows,
    size_warnings,
    split_warnings,
)
from train.config import TrainConfig
from train.errors import ConfigError, TrainError
from train.metrics import TASK_METRICS
from train.students.families import FAMILIES

log = get_logger("train")

CLASS_TASKS = ("classification", "sequence")

#: Masks that are decoded for each split: which classes a mask has is known from its pixels alone.
MASKS_READ = 1_000

LABEL_FREE = "use --task features to learn without them, or extract a data set that has them"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the store offers this run. `rows`: valid rows int64; `labels` int32 [N] of the whole split, or None.

    `labeled` bool, one for each of `train_rows`: which have a label or mask; None for tasks without, and for boxes.
    `validation_samples`: how many of `val_rows` the task's metrics are measured on. `preprocessing`: how the student is
    shown the images; None: as the store's teacher was.
    """

    task: str
    num_classes: int
    train_rows: NDArray[np.int64]
    val_rows: NDArray[np.int64]
    train_labels: NDArray[np.int32] | None
    val_labels: NDArray[np.int32] | None
    validation_samples: int
    notes: list[str] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    labeled: NDArray[np.bool_] | None = None


def student_preprocessing(store: Store, recorded: Mapping[str, Any]) -> Preprocessing:
    """How a trained student is shown the images of any store: as in its training, `recorded` in its checkpoint.

    The store may have been made with another resize policy: a student that learned from letterboxed images fails on
    squashed ones.
    """
    own: Preprocessing = store.manifest.preprocessing
    options = {**own.options, "bit_depth": int(recorded.get("bit_depth", FULL_DEPTH))}
    shown = own.model_copy(update={"resize": str(recorded["resize"]), "options": options})
    if shown.resize != own.resize:
        log.info(
            "%s was made with --resize %s, the student was trained with %s: its images are shown as in training%s",
            store.location,
            own.resize,
            shown.resize,
            # What a center crop cut off is not in the store.
            ", as far as the store has them (--images raw)"
            if any(spec.name == IMAGES_RAW for spec in store.manifest.arrays)
            else "",
        )
    if shown.bit_depth != own.bit_depth:
        log.info(
            "%s has 16-bit images of %d bits, the student was trained with %d: they are scaled as in training",
            store.location,
            own.bit_depth,
            shown.bit_depth,
        )
    return shown


def resolve_task(config: TrainConfig) -> str:
    """The student's own task, or `features`. Raises ConfigError for a task that the student cannot learn."""
    own = FAMILIES[config.student_type].task
    if config.task in ("auto", own):
        return own
    if config.task == "features":
        return "features"
    raise ConfigError(f"task {config.task}: {config.student} learns {own} or features")


def resolve_data(config: TrainConfig, store: Store, task: str, others: Sequence[Store] = ()) -> TrainingData:
    """Rows, labels and classes. Raises TrainError when the store cannot serve the task.

    others: the store as further teachers show it: their features must be there as well.
    """
    train = open_split(store, config.train_split, "--train-split")
    val = open_split(store, config.val_split, "--val-split")
    check_targets(task, train, config.train_split, config.store)
    notes: list[str] = []
    train_rows, val_rows = (
        valid_rows(train, config.train_split, notes, [other[config.train_split] for other in others]),
        valid_rows(val, config.val_split, notes, [other[config.val_split] for other in others]),
    )
    kind, train_labels, val_labels = TASK_METRICS[task].target, labels_of(train), labels_of(val)
    num_classes = 0 if task == "features" else resolve_classes(config, store, train_labels, notes)
    if task in CLASS_TASKS:
        check_labels(config, train_labels, val_labels, train_rows, val_rows)
    if task == "segmentation":
        check_masks(config, train, val, train_rows, val_rows)
    return TrainingData(
        task=task,
        num_classes=num_classes,
        train_rows=train_rows,
        val_rows=val_rows,
        train_labels=train_labels,
        val_labels=val_labels,
        validation_samples=count_validation(store, config.val_split, task),
        notes=notes,
        labeled=labeled_rows(train, kind)[train_rows] if kind in ("label", "mask") else None,
    )


def open_split(store: Store, name: str, option: str) -> Split:
    """A split that has rows."""
    if name not in store.splits:
        made = ", or extract with --val-fraction" if name == "val" else ""
        raise TrainError(
            f"{store.path}: no split {name}, it has {', '.join(store.splits) or 'none'}: name one with {option}{made}"
        )
    if not len(store[name]):
        raise TrainError(
            f"{store.path}: split {name} is empty: extract it again, or name another with {option}"
        )
    return store[name]


def check_targets(task: str, split: Split, name: str, store: str, advice: str = LABEL_FREE) -> None:
    """The split must hold what the task learns from, or is measured on; `advice` is the next step when it does not."""
    needed = {"label": LABEL, "mask": MASK}.get(TASK_METRICS[task].target or "")
    unlabeled = needed == LABEL and labels_of(split) is None
    if needed is None or (needed in split.names and not unlabeled):
        return
    has = [kind for kind, array in (("labels", LABEL), ("masks", MASK)) if array in split.names]
    found = ", ".join(has) if has and not unlabeled else "no targets" if not has else "unlabeled rows only"
    what = "class masks" if needed == MASK else "class labels"
    raise TrainError(f"{store}: {task} needs {what} in split {name}, the store has {found}: {advice}")


def valid_rows(split: Split, name: str, notes: list[str], others: Sequence[Split] = ()) -> NDArray[np.int64]:
    """Rows with features, also of the `others`. Raises TrainError when there are none."""
    valid = split.valid if VALID in split.names else np.ones(len(split), dtype=bool)
    for other in others:
        valid = valid & other.valid
    rows = np.flatnonzero(valid).astype(np.int64)
    if not len(rows):
        raise TrainError(f"{split.path}: all {len(split)} samples of split {name} are bad: see cli inspect")
    if len(rows) < len(split):
        notes.append(f"{len(split) - len(rows)} of {len(split)} samples of {name} are bad and left out")
    return rows


def resolve_classes(
    config: TrainConfig, store: Store, labels: NDArray[np.int32] | None, notes: list[str]
) -> int:
    """The store's classes; more widen the head, fewer are an error."""
    known = len(store.manifest.class_names) or (int(labels.max()) + 1 if labels is not None else 0)
    if known == 0 and config.num_classes is None:
        raise ConfigError(f"{config.store} names no classes: pass --num-classes")
    if config.num_classes is None or config.num_classes == known:
        return known
    if config.num_classes < known:
        raise ConfigError(
            f"num_classes {config.num_classes}: {config.store} has {known} classes; pass at least {known}"
        )
    notes.append(f"the head has {config.num_classes} classes, the data {known}: no sample is of the others")
    return config.num_classes


def check_labels(
    config: TrainConfig,
    train: NDArray[np.int32] | None,
    val: NDArray[np.int32] | None,
    train_rows: NDArray[np.int64],
    val_rows: NDArray[np.int64],
) -> None:
    assert train is not None
    present = train[train_rows]
    classes = np.unique(present[present >= 0])
    if len(classes) < 2:
        raise TrainError(
            f"{config.store}: split {config.train_split} has one class only (class {classes[0]}): there is nothing "
            "to tell apart; use --task features, or another data set"
        )
    if val is None or not (val[val_rows] >= 0).any():
        raise TrainError(f"{config.store}: split {config.val_split} has no labels to validate against")


def check_masks(
    config: TrainConfig,
    train: Split,
    val: Split,
    train_rows: NDArray[np.int64],
    val_rows: NDArray[np.int64],
) -> None:
    """Raises TrainError when no row has a mask."""
    for name, split, rows in (
        (config.train_split, train, train_rows),
        (config.val_split, val, val_rows),
    ):
        if not labeled_rows(split, "mask")[rows].any():
            raise TrainError(f"{config.store}: split {name} has no masks: {LABEL_FREE}")


def fit_batch(config: TrainConfig, rows: int, note: Callable[[str], object]) -> TrainConfig:
    """A recipe's batch shrinks to a small split, which `note` gets as a text; one that was asked for is a ConfigError."""
    if config.batch_size <= rows:
        return config
    if config.is_explicit("batch_size"):
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than split {config.train_split} ({rows} samples): "
            f"pass --batch-size {rows} or less"
        )
    note(f"batch_size {rows} instead of {config.batch_size}: the split has no more samples")
    return config.replace(batch_size=rows)


def labels_of(split: Split) -> NDArray[np.int32] | None:
    """Labels int32 [N] (-1: none), or None when the split has none at all."""
    if LABEL not in split.names:
        return None
    labels: NDArray[np.int32] = split.read(LABEL)
    return labels if (labels >= 0).any() else None


def count_validation(store: Store, split: str, task: str) -> int:
    """Samples of the split that the task's metrics are measured on."""
    return count_measured(store[split], TASK_METRICS[task].target)


def warn_of_splits(config: TrainConfig, store: Store, task: str) -> None:
    """Log a warning for copies in both splits, classes that one lacks, and few validation samples."""
    train, val = config.train_split, config.val_split
    if train not in store or val not in store:
        return  # opening them is an error that names the next step
    warnings = split_warnings(store, train, val, TASK_METRICS[task].target)
    if task == "segmentation":
        warnings += mask_warnings(store, val) + mask_warnings(store, train, UNLEARNED)
    for text in warnings:
        log.warning("%s: %s", config.store, text)


def warn_of_measured_split(path: str, store: Store, split: str, task: str) -> None:
    """Log a warning where the split to measure on is small or lacks classes."""
    kind = TASK_METRICS[task].target
    masks = mask_warnings(store, split) if kind == "mask" else []
    for text in [*size_warnings(store[split], kind), *class_warnings(store, [split], kind), *masks]:
        log.warning("%s: %s", path, text)


def mask_warnings(store: Store, split: str, consequence: str = UNDEFINED) -> list[str]:
    """A sentence for classes that no mask of a split has; none for a split of more masks than are read."""
    names = store.manifest.class_names
    if MASK not in store[split].names or np.count_nonzero(store[split].valid) > MASKS_READ:
        return []
    counts, _ = count_mask_classes(store[split], len(names))
    return absent_warnings(split, names, counts["samples"], consequence)


def count_mask_classes(split: Split, classes: int) -> tuple[dict[str, NDArray[np.int64]], int]:
    """`samples` and `pixels` int64 [C] of at most MASKS_READ masks, evenly spread, and how many were read."""
    valid = np.flatnonzero(split.valid)
    rows = valid[np.unique(np.linspace(0, len(valid) - 1, min(MASKS_READ, len(valid))).astype(np.int64))]
    samples, pixels, read = np.zeros(classes, np.int64), np.zeros(classes, np.int64), 0
    for row in rows.tolist():
        data = bytes(split.ragged([row], MASK)[0])
        if not data:
            continue
        try:
            ids = decode_mask(data)
        except ImageError:
            continue  # `cli verify` names it
        counts = np.bincount(ids[ids != IGNORE], minlength=classes)[:classes]
        pixels += counts
        samples += counts > 0
        read += 1
    return {"samples": samples, "pixels": pixels}, read
