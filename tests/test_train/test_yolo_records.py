"""Boxes and images of a store as ultralytics' data set: what is cleaned, and what is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from tests.test_train.yolo_data import Row, make_store, scene, scenes
from train.errors import TrainError

pytest.importorskip("ultralytics")


def row_with(boxes: list[list[float]], classes: list[int]) -> Row:
    image = scene(np.random.default_rng(0))[0]
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int32)


def open_train(path: Path, **settings: Any) -> Any:
    from train.yolo.dataset import open_split

    return open_split(open_store(path), "train", image_size=64, data_root=None, distil=True, **settings)


def test_bad_boxes_are_cleaned_and_backgrounds_kept(
    tmp_path: Path, train_log: pytest.LogCaptureFixture
) -> None:
    image = scene(np.random.default_rng(0))[0]
    height, width = image.shape[:2]
    rows = [
        row_with(
            [
                [-20, -10, 30, 40],
                [10, 10, 10, 30],
                [width + 5, 5, width + 20, 30],
                [5, 5, 25, 25],
                [5, 5, 25, 25],
            ],
            [0, 0, 1, 1, 1],
        ),
        row_with([], []),
    ]
    records = open_train(make_store(tmp_path / "s", {"train": rows, "val": scenes(2, 0)})).records
    expected = np.array(
        [
            [15 / width, 20 / height, 30 / width, 40 / height],
            [15 / width, 15 / height, 20 / width, 20 / height],
        ]
    )
    assert np.allclose(records[0].boxes, expected, atol=1e-6)
    assert records[0].classes.tolist() == [0, 1]
    assert records[1].boxes.shape == (0, 4)
    assert "2 boxes without area" in train_log.text
    assert "1 boxes that repeat another" in train_log.text


def test_a_class_without_a_name_is_an_error(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", {"train": [row_with([[1, 1, 9, 9]], [5])], "val": scenes(2, 0)})
    with pytest.raises(TrainError, match=r"train/000.png: class 5, but the store names 2 classes"):
        open_train(path)


def test_a_store_without_grid_says_what_to_extract(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", {"train": scenes(2, 1), "val": scenes(2, 0)}, grid=False)
    with pytest.raises(TrainError, match="--grid 16"):
        open_train(path)


def test_a_store_without_boxes_is_an_error(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", {"train": scenes(2, 1), "val": scenes(2, 0)}, boxes=False)
    with pytest.raises(TrainError, match="no boxes"):
        open_train(path)


def test_a_missing_split_is_an_error(tmp_path: Path) -> None:
    from train.yolo.dataset import open_split

    path = make_store(tmp_path / "s", {"train": scenes(2, 1)})
    with pytest.raises(TrainError, match="no split 'val', it has train"):
        open_split(open_store(path), "val", image_size=64, data_root=None, distil=False)


def test_raw_images_have_the_boxes_of_the_teachers_view(tmp_path: Path) -> None:
    """`--images raw` stores what the teacher saw: here a 200×100 photo in a 112-pixel letterbox."""
    from train.yolo.dataset import detection_records

    image = np.zeros((100, 200, 3), np.uint8)
    row = (image, np.array([[50, 25, 150, 75]], np.float32), np.zeros(1, np.int32))
    store = open_store(make_store(tmp_path / "s", {"train": [row]}, resize="letterbox"))
    (record,) = detection_records(store, store["train"], raw=True)
    assert (record.width, record.height) == (112, 112)
    assert np.allclose(record.boxes, [[0.5, 0.5, 0.5, 0.25]], atol=0.01)


def test_a_level_learns_the_layer_that_it_names(tmp_path: Path) -> None:
    """Layers with their own sizes and widths, each read and standardized once; a layer that is not stored is named."""
    from train.yolo.geometry import PACKED_WIDTH, SOURCE_PLACEMENTS, SOURCE_ROWS

    path = make_store(tmp_path / "store", {"train": scenes(6, 0)}, layers={8: (16, 5)})
    data = open_train(path, layers={"P3": 8, "P4": None, "P5": None})
    targets = data.targets.by_level
    assert targets["P4"] is targets["P5"] is not targets["P3"]
    assert [targets[level].standardizer.gain.numel() for level in ("P3", "P4")] == [5, 12]
    rows = torch.tensor([[0, 3], [3, -1]])
    batch: dict[str, Any] = {SOURCE_ROWS: rows, SOURCE_PLACEMENTS: torch.zeros(2, 2, PACKED_WIDTH)}
    data.targets.prefetch(batch)
    assert len(batch) == 4  # rows, placements and two layers
    read = [batch[targets[level].pending].result().grids for level in ("P3", "P5")]
    assert [tuple(grids.shape) for grids in read] == [(2, 16, 16, 5), (2, 8, 8, 12)]
    split = open_store(path)["train"]
    assert np.array_equal(read[0].numpy(), split.gather([0, 3], ["features/grid@8"])["features/grid@8"])
    with pytest.raises(TrainError, match=r"has no layer 16, it has 8, last: extract with --layers 16"):
        open_train(path, layers={"P5": 16})


def test_both_splits_are_standardized_by_the_training_splits_statistics(tmp_path: Path) -> None:
    """As in the main loop: training and validation distances are to the same targets."""
    from train.config import TrainConfig
    from train.yolo.job import open_splits

    def features(split: str, row: int, image: np.ndarray) -> np.ndarray:
        return np.random.default_rng(row).normal(5 if split == "val" else 0, 1, (4, 4, 6)).astype(np.float32)

    rows = {"train": scenes(6, 0), "val": scenes(4, 1)}
    path = make_store(tmp_path / "store", rows, grid_features=features)
    config = TrainConfig(store=path, student="yolov8/n", out=tmp_path / "run", image_size=64)  # type: ignore[arg-type]
    splits = open_splits(config, open_store(path), 1)
    gains = [splits[mode].targets["P5"].standardizer for mode in ("train", "val")]  # type: ignore[union-attr]
    assert torch.equal(gains[0].shift, gains[1].shift)
    assert torch.equal(gains[0].gain, gains[1].gain)
    assert gains[0].shift.abs().max() < 1
