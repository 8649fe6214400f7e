"""A bad box costs its image nothing: boxes are clipped to their image, those without area dropped and counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.sources.annotations import clip_boxes
from extract.sources.base import Boxes
from store.format import BOX_CLASSES, BOXES
from store.reader import open_store
from tests.test_extract.extractions import extract
from tests.test_extract.source_datasets import write_coco, write_voc, write_yolo

SIZE = (24, 16)  # of the data sets' images


def test_boxes_are_clipped_and_those_without_area_dropped() -> None:
    boxes = Boxes.of(
        [[-5, -5, 10, 10], [2, 2, 2, 9], [30, 2, 40, 9], [20, 10, 50, 50], [0, 0, 24, 16]], [0, 1, 2, 3, 4]
    )
    clipped, dropped = clip_boxes(boxes, SIZE)
    assert clipped.values.tolist() == [[0, 0, 10, 10], [20, 10, 24, 16], [0, 0, 24, 16]]
    assert clipped.classes.tolist() == [0, 3, 4]
    assert dropped == 2
    assert clipped.values.dtype == np.float32
    none, dropped = clip_boxes(Boxes.of([], []), SIZE)
    assert (none.values.shape, dropped) == ((0, 4), 0)


def spoil_yolo(root: Path) -> None:
    """A box without width, one far outside, one that reaches outside."""
    file = sorted((root / "labels/train").glob("*.txt"))[0]
    file.write_text(file.read_text() + "0 0.5 0.5 0 0.5\n0 1.8 0.5 0.2 0.5\n1 0.9 0.5 0.4 0.5\n")


def spoil_voc(root: Path) -> None:
    file = next(
        file for file in sorted((root / "Annotations").glob("*.xml")) if "<object>" in file.read_text()
    )
    objects = "".join(
        f"<object><name>dog</name><bndbox><xmin>{x1}</xmin><ymin>5</ymin><xmax>{x2}</xmax><ymax>12</ymax></bndbox></object>"
        for x1, x2 in ((40, 50), (30, 60), (18, 31))
    )
    file.write_text(file.read_text().replace("</annotation>", f"{objects}</annotation>"))


@pytest.mark.parametrize(("write", "spoil"), [(write_yolo, spoil_yolo), (write_voc, spoil_voc)])
def test_a_bad_box_does_not_throw_out_its_image(
    tmp_path: Path, extract_options: dict[str, Any], caplog: pytest.LogCaptureFixture, write: Any, spoil: Any
) -> None:
    write(tmp_path / "data")
    options = {**extract_options, "data": str(tmp_path / "data"), "val_fraction": 0.25}
    before = boxes_of(extract(options, out=tmp_path / "clean"))
    spoil(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        result = extract(options, out=tmp_path / "spoiled")
    assert result.bad == 0
    assert "2 boxes without area inside their image were dropped" in caplog.text
    after = boxes_of(result)
    assert len(after) == len(before) + 1
    values = np.array([box for box, _ in after])
    assert (values >= 0).all()
    assert (values[:, [0, 2]] <= SIZE[0]).all()
    assert (values[:, [1, 3]] <= SIZE[1]).all()
    assert (values[:, 2:] > values[:, :2]).all()


def test_coco_without_sizes_is_clipped_as_well(tmp_path: Path, extract_options: dict[str, Any]) -> None:
    """The file may not say how large an image is; the image does."""
    import json

    write_coco(tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.json"):
        content = json.loads(file.read_text())
        for image in content["images"]:
            del image["width"], image["height"]
        for annotation in content["annotations"]:
            annotation["bbox"][2] = 500
        file.write_text(json.dumps(content))
    result = extract(extract_options, data=str(tmp_path / "data"))
    assert result.bad == 0
    values = np.array([box for box, _ in boxes_of(result)])
    assert len(values)
    assert values[:, 2].max() == SIZE[0]


def boxes_of(result: Any) -> list[tuple[list[float], int]]:
    store = open_store(result.store)
    found = []
    for name in store.splits:
        split = store[name]
        rows = np.arange(len(split))
        for boxes, classes in zip(split.ragged(rows, BOXES), split.ragged(rows, BOX_CLASSES), strict=True):
            found += list(zip(boxes.tolist(), classes.tolist(), strict=True))
    return found
