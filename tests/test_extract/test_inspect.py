"""`cli inspect`: samples by kind and class, and pictures with true boxes, masks and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands.pictures import show_sample, write_pictures
from commands.store import describe_contents, inspect
from extract.config import load_config
from extract.run import run_extraction
from store.reader import Store, open_store
from tests.test_extract.source_datasets import (
    Dataset,
    save,
    write_clips,
    write_folder,
    write_masks,
    write_yolo,
)


def extract(options: dict[str, Any], dataset: Dataset, **changes: Any) -> Store:
    values = {**options, "data": str(dataset.path), "max_bad": "50%", **changes}
    run_extraction(load_config(values))
    return open_store(options["out"])


def test_labels_are_counted_by_class_and_kind(extract_options: dict[str, Any], tmp_path: Path) -> None:
    dataset = write_folder(tmp_path / "data")
    (tmp_path / "data/train/cat/broken.png").write_bytes(b"no image")
    found = describe_contents(extract(extract_options, dataset))
    assert found["splits"]["train"]["kinds"] == {"labeled": 7, "unlabeled": 0, "background": 0, "bad": 1}
    expected = {
        name: sum(key.startswith(f"train/{name}/") for key in dataset.truth["train"])
        for name in dataset.class_names
    }
    assert {name: entry["samples"] for name, entry in found["splits"]["train"]["classes"].items()} == expected
    assert any(text.startswith("val has 4 samples to measure on") for text in found["warnings"])


def test_boxes_are_counted_by_class_and_background_told_apart(
    extract_options: dict[str, Any], tmp_path: Path
) -> None:
    dataset = write_yolo(tmp_path / "data")
    found = describe_contents(extract(extract_options, dataset))
    for split, truth in dataset.truth.items():
        boxes = [sample.boxes or [] for sample in truth.values()]
        empty = sum(not entry for entry in boxes)
        assert found["splits"][split]["kinds"]["background"] == empty > 0
        assert found["splits"][split]["kinds"]["unlabeled"] == 0
        for name, entry in found["splits"][split]["classes"].items():
            assert entry["boxes"] == sum(other == name for entry_ in boxes for _, other in entry_)
            assert entry["samples"] == sum(any(other == name for _, other in entry_) for entry_ in boxes)


def test_masks_are_counted_by_class_and_pixels(
    extract_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_masks(tmp_path / "data")
    store = extract(extract_options, dataset)
    found = describe_contents(store)
    masks = [sample.mask for sample in dataset.truth["val"].values()]
    counts = np.bincount(np.concatenate([mask[mask != 255].ravel() for mask in masks]))
    entries = found["splits"]["val"]["classes"].values()
    assert [entry["pixels"] for entry in entries] == counts.tolist()
    assert found["splits"]["val"]["masks_read"] == len(masks)
    inspect(str(extract_options["out"]), json=True)
    assert (
        json.loads(capsys.readouterr().out)["splits"]["val"]["classes"] == found["splits"]["val"]["classes"]
    )
    inspect(str(extract_options["out"]))
    shown = capsys.readouterr().out
    assert "samples of each class (share of the pixels)" in shown
    assert "warning: val has 4 samples to measure on" in shown


def test_true_boxes_are_where_the_objects_are(extract_options: dict[str, Any], tmp_path: Path) -> None:
    """A black picture with one white object; letterboxed, so that an error of the geometry shows."""
    root = tmp_path / "data"
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 40:60] = 255
    save(root / "images/0.png", pixels)
    (root / "labels").mkdir()
    (root / "labels/0.txt").write_text("0 0.625 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text("train: images\nnames: [square]\n")
    for images in ("none", "raw"):
        run_extraction(
            load_config(
                {
                    **extract_options,
                    "data": str(root),
                    "resize": "letterbox",
                    "images": images,
                    "val_fraction": 0,
                    "overwrite": True,
                },
            )
        )
        shown = show_sample(open_store(extract_options["out"]), "train", 0)
        assert shown is not None
        frame = (np.asarray(shown) == (0, 114, 178)).all(axis=2)  # the color of class 0
        rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
        # 80×40 in 224: scale 2.8, 56 pixels of padding above. The tag above the frame has its color too.
        assert abs(columns[0] - 40 * 2.8) <= 2
        assert abs(rows[-1] - (56 + 30 * 2.8)) <= 2
        inside = np.asarray(shown)[56 + 40 : 56 + 70, 40 * 3 : 55 * 2]
        assert inside.min(initial=255) > 200


def test_true_masks_are_laid_over_the_picture(extract_options: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "data"
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 20:] = 1
    save(root / "images/0.png", np.zeros((40, 40, 3), np.uint8))
    save(root / "masks/0.png", mask)
    (root / "classes.txt").write_text("left\nright\n")
    run_extraction(load_config({**extract_options, "data": str(root), "val_fraction": 0}))
    (file, _) = write_pictures(extract_options["out"], tmp_path / "pictures")
    with Image.open(file) as picture:
        shown = np.asarray(picture)[:200, :224]
    assert (shown[:, :110] == 0).all(), "class 0 is clear"
    assert (shown[:, 114:] == np.round(np.array([0, 114, 178]) / 2)).all()


@pytest.mark.parametrize("images", ["none", "jpeg"])
def test_clips_are_shown_as_frames_with_their_class(
    extract_options: dict[str, Any], tmp_path: Path, images: str
) -> None:
    dataset = write_clips(tmp_path / "data")
    store = extract(extract_options, dataset, source="clips", frames=4, images=images)
    shown = show_sample(store, "train", 0)
    assert shown is not None
    assert shown.size == (224, 224)
    quarters = [np.asarray(shown)[y : y + 80, x : x + 112] for y in (0, 112) for x in (0, 112)]
    assert len({quarter.tobytes() for quarter in quarters}) > 1, "different frames"
    assert len(write_pictures(extract_options["out"], tmp_path / "pictures", 3)) == 4
