"""What a run's metrics are measured on: how many samples, and why they may say less than they seem to."""

from __future__ import annotations

from console.log import get_logger
from store.reader import Store
from store.splits import class_warnings, count_measured, size_warnings, split_warnings
from train.config import TrainConfig

log = get_logger("train")

#: Task → the kind of target that it is measured with; `features` has none.
TARGET_KINDS = {"classification": "label", "sequence": "label", "segmentation": "mask", "detection": "boxes"}


def count_validation(store: Store, split: str, task: str) -> int:
    """Samples of the split that the task's metrics are measured on."""
    return count_measured(store[split], TARGET_KINDS.get(task))


def warn_of_splits(config: TrainConfig, store: Store, task: str) -> None:
    """Log a warning for copies in both splits, classes that one lacks, and few validation samples."""
    for text in split_warnings(store, config.train_split, config.val_split, TARGET_KINDS.get(task)):
        log.warning("%s: %s", config.store, text)


def warn_of_measured_split(path: str, store: Store, split: str, task: str) -> None:
    """Log a warning where the split to measure on is small or lacks classes."""
    kind = TARGET_KINDS.get(task)
    for text in [*size_warnings(store[split], kind), *class_warnings(store, [split], kind)]:
        log.warning("%s: %s", path, text)
