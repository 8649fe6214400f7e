"""Boxes that a trained detector found in images without labels (`--boxes-from`, see `train.self_training`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from files.writing import replacing
from store.format import SIZES
from store.reader import Split, Store
from train.run_folder import BOXES_FOUND
from train.yolo.dataset import DetectionRecord, DetectionSplit


@dataclass(frozen=True)
class FoundBoxes:
    """`rows` int64 [M] ascending, a row for each box; `boxes` float32 [M, 4]: normalized center and size; `classes` int64 [M].

    `confidence`: what all boxes have at least.
    """

    rows: NDArray[np.int64]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def records(self, split: Split, side: int | None) -> list[DetectionRecord]:
        """One record for each image. `side`: of all images, where it is not that of the stored sizes."""
        sizes, found = split.read(SIZES), []
        for row in np.unique(self.rows).tolist():
            width, height = (side, side) if side else sizes[row].tolist()
            chosen = self.rows == row
            boxes, classes = self.boxes[chosen], self.classes[chosen]
            found.append(DetectionRecord(row, str(split.keys[row]), width, height, boxes, classes))
        return found

    def write(self, run: Path) -> None:
        with replacing(run / BOXES_FOUND) as partial, partial.open("wb") as stream:
            np.savez(stream, **vars(self))

    @classmethod
    def read(cls, run: Path) -> FoundBoxes:
        with np.load(run / BOXES_FOUND, allow_pickle=False) as stored:
            return cls(**stored)


def add_found_boxes(run: Path, store: Store, name: str, train: DetectionSplit) -> DetectionSplit:
    """The training split `name` with the images in which boxes were found, in row order."""
    side = store.whole.manifest.preprocessing.image_size if train.raw else None
    records = FoundBoxes.read(run).records(store[name], side)
    together = sorted([*train.records, *records], key=lambda record: record.row)
    return replace(train, records=together)
