"""Targets that few samples have: all samples decide which arrays a store gets."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.config import load_config
from extract.plan import make_task, open_data, open_teacher
from extract.sources.base import Sample, Samples
from imaging.masks import encode_mask
from store.reader import open_store
from tests.test_extract.extractions import extract

ROWS, STEP = 20_000, 100  # every hundredth sample has a target: 200 of them


def write_table(folder: Path, column: str, values: dict[int, str], rows: int = ROWS) -> Path:
    """A table of images, `column` filled in some rows only."""
    folder.mkdir()
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", column])
        writer.writerows([f"{row:05d}.png", values.get(row, "")] for row in range(rows))
    return folder / "table.csv"


def sparse(text: str) -> dict[int, str]:
    """200 values, none of them in a row that a look at a thousand evenly spaced ones would see."""
    return dict.fromkeys(range(7, ROWS, STEP), text)


@pytest.mark.parametrize(
    ("column", "value", "array"),
    [
        ("label", "cat", "targets/label"),
        (
            "annotation",
            json.dumps({"boxes": [[0, 0, 5, 5]], "classes": ["cat"]}),
            "targets/boxes/values",
        ),
    ],
)
@pytest.mark.parametrize("val_fraction", [0, 0.1])
def test_two_hundred_targets_of_twenty_thousand_samples_get_their_array(
    extract_options: dict[str, Any], tmp_path: Path, column: str, value: str, array: str, val_fraction: float
) -> None:
    table = write_table(tmp_path / "data", column, sparse(value))
    config = load_config({**extract_options, "data": str(table), "val_fraction": val_fraction})
    task = make_task(config, open_data(config), open_teacher(config))
    assert array in {spec.name for spec in task.arrays}
    assert task.rows == ROWS


class SparseMasks(Samples):
    """A layout with masks for some images, which says nothing about its targets itself."""

    def __init__(self) -> None:
        self.names = [f"{row:05d}" for row in range(ROWS)]
        self.mask = encode_mask(np.zeros((2, 2), np.uint8))

    @property
    def keys(self) -> Sequence[str]:
        return self.names

    def build(self, index: int) -> Sample:
        return Sample(self.names[index], b"", mask=self.mask if index % STEP == 7 else None)


def test_two_hundred_masks_of_twenty_thousand_samples_are_found() -> None:
    assert SparseMasks().target_kinds() == {"mask"}


def test_the_few_labels_arrive_in_the_store(
    extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "data", "label", {}, rows=0)
    files = sorted(digit_folder.rglob("*.png"))
    with table.open("a", newline="") as file:
        writer = csv.writer(file)
        for number, image in enumerate(files):
            (table.parent / image.name).write_bytes(image.read_bytes())
            writer.writerow([image.name, "cat" if number == 41 else ""])
    extract(extract_options, data=str(table), val_fraction=0)
    train = open_store(extract_options["out"])["train"]
    labels = train.read("targets/label")
    assert [train.keys[row] for row in np.flatnonzero(labels >= 0)] == [files[41].name]
