"""What a run's metrics are measured on: how many samples, and why they may say less than they seem to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from console.log import get_logger
from imaging.decode import ImageError
from imaging.masks import IGNORE, decode_mask
from store.format import MASK
from store.reader import Split, Store
from store.summary import (
    UNDEFINED,
    UNLEARNED,
    absent_warnings,
    class_warnings,
    count_measured,
    size_warnings,
    split_warnings,
)
from train.config import TrainConfig
from train.metrics import HEADLINE_METRICS, METRICS

log = get_logger("train")

#: A share below it is printed as 0.000.
SHOWN_AS_ZERO = 0.0005

#: Masks that are decoded for each split: which classes a mask has is known from its pixels alone.
MASKS_READ = 1_000

#: Task → the kind of target that it is measured with; `features` has none.
TARGET_KINDS = {"classification": "label", "sequence": "label", "segmentation": "mask", "detection": "boxes"}


def count_validation(store: Store, split: str, task: str) -> int:
    """Samples of the split that the task's metrics are measured on."""
    return count_measured(store[split], TARGET_KINDS.get(task))


def warn_of_splits(config: TrainConfig, store: Store, task: str) -> None:
    """Log a warning for copies in both splits, classes that one lacks, and few validation samples."""
    train, val = config.train_split, config.val_split
    if train not in store or val not in store:
        return  # opening them says so, and what to do
    warnings = split_warnings(store, train, val, TARGET_KINDS.get(task))
    if task == "segmentation":
        warnings += mask_warnings(store, val) + mask_warnings(store, train, UNLEARNED)
    for text in warnings:
        log.warning("%s: %s", config.store, text)


def warn_of_zero_metric(config: TrainConfig, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Log likely causes once when the headline metric is still 0 after a third of the epochs.

    `records`: the lines of metrics.jsonl so far. Runs of fewer than 4 epochs are too short to tell.
    """
    third = math.ceil(config.epochs / 3)
    if third < 2 or len(records) != third:
        return
    name = next((name for name in HEADLINE_METRICS if records[-1].get(name) is not None), None)
    if name is None or max(record.get(name) or 0.0 for record in records) >= SHOWN_AS_ZERO:
        return
    log.warning(
        "%s: %s is still 0 after %d of %d epochs: usual causes are a learning rate that is too low or too high (now "
        "%.3g), objects that are too small at an image size of %d px, labels that do not fit the images (cli inspect %s "
        "--pictures FOLDER), or too few epochs",
        *(
            folder,
            METRICS[name].label,
            third,
            config.epochs,
            records[-1].get("learning_rate") or config.learning_rate,
        ),
        *(config.image_size, config.store),
    )


def warn_of_measured_split(path: str, store: Store, split: str, task: str) -> None:
    """Log a warning where the split to measure on is small or lacks classes."""
    kind = TARGET_KINDS.get(task)
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
