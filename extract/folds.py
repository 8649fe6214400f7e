"""Folds for probes: no prediction for a row comes from a probe that saw the row, or a copy of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from store import format as names
from store.reader import Split, Store

FOLDS = 5


def training_split(store: Store) -> Split:
    """`train`, or the largest split."""
    return store["train" if "train" in store else max(store.splits, key=lambda name: len(store[name]))]


def content_groups(store: Store) -> dict[str, npt.NDArray[np.int64]]:
    """Split → int64 [N]: rows of equal content have equal numbers, across splits."""
    content = {name: np.ascontiguousarray(split.read(names.CONTENT)) for name, split in store.items()}
    digests = np.concatenate(
        [rows.view(np.dtype((np.void, rows.shape[1]))).ravel() for rows in content.values()]
    )
    numbers = np.asarray(np.unique(digests, return_inverse=True)[1]).ravel()
    ends = np.cumsum([len(rows) for rows in content.values()])[:-1]
    return dict(zip(content, np.split(numbers, ends), strict=True))


def folds_of_copies(
    groups: Mapping[str, npt.NDArray[np.int64]], train: str, fold: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Split → [N]: the fold that holds a labeled copy of each row (or the row itself), -1 where none does."""
    folds = np.full(max(int(numbers.max(initial=-1)) for numbers in groups.values()) + 1, -1)
    labeled = fold >= 0
    folds[groups[train][labeled]] = fold[labeled]
    return {split: folds[numbers] for split, numbers in groups.items()}
