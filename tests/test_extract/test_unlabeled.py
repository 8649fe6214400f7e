"""Data sets of which some images are labeled: the others are no background, in any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.config import load_config
from extract.run import run_extraction
from extract.sources.base import SourceError
from extract.sources.detect import open_source
from store.format import BOX_CLASSES, FRAMES, LABEL, MASK, NO_LABEL
from store.reader import Split, open_store
from store.summary import count_classes, count_kinds, count_measured
from store.verify import verify_store
from tests.test_extract.source_datasets import (
    write_clip_table,
    write_clips,
    write_coco,
    write_folder,
    write_masks,
    write_voc,
    write_yolo,
)


def forget_voc(root: Path) -> str:
    (root / "Annotations/000003.xml").unlink()
    return "JPEGImages/000003.png"


def forget_yolo(root: Path) -> str:
    label = sorted((root / "labels/train").glob("*.txt"))[0]
    label.unlink()
    return f"images/train/{label.stem}.png"


def forget_coco(root: Path) -> str:
    file = next(file for file in sorted(root.rglob("*.json")) if "train" in file.name)
    content = json.loads(file.read_text())
    first = content["annotations"][0]["image_id"]
    image = next(item for item in content["images"] if item["id"] == first)
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != image["id"]]
    file.write_text(json.dumps(content))
    return str(image["file_name"])


BOXED: dict[str, tuple[Callable[[Path], Any], Callable[[Path], str]]] = {
    "voc": (write_voc, forget_voc),
    "yolo": (write_yolo, forget_yolo),
    "coco": (write_coco, forget_coco),
}


UNLABELED = {"voc": 1, "yolo": 4, "coco": 4}


def row_of(split: Split, name: str) -> int:
    return next(row for row, key in enumerate(split.keys) if key.endswith(Path(name).name))


@pytest.mark.parametrize("layout", BOXED)
def test_an_image_that_is_not_labeled_is_no_background(
    layout: str, extract_options: dict[str, Any], tmp_path: Path
) -> None:
    write, forget = BOXED[layout]
    write(tmp_path / "data")
    name = forget(tmp_path / "data")
    options = {**extract_options, "data": str(tmp_path / "data"), "source": layout, "val_fraction": 0}
    run_extraction(load_config({**options, "source_options": {"unlabeled": "true"}}))
    store = open_store(extract_options["out"])
    train = store["train"]
    row = row_of(train, name)
    assert train.ragged([row], BOX_CLASSES)[0].tolist() == [-1]
    kinds = count_kinds(train)
    # YOLO's and COCO's other images without objects have no annotation either.
    assert kinds["unlabeled"] == train.read(BOX_CLASSES).tolist().count(-1) == UNLABELED[layout]
    assert kinds["labeled"] + kinds["background"] == len(train) - kinds["unlabeled"]
    assert count_measured(train, "boxes") == len(train) - kinds["unlabeled"]
    counted = count_classes(train, len(store.manifest.class_names), "boxes")
    assert counted["boxes"].sum() == (train.read(BOX_CLASSES) >= 0).sum()
    assert verify_store(extract_options["out"]) == []


def test_without_the_option_it_is_background(extract_options: dict[str, Any], tmp_path: Path) -> None:
    write_yolo(tmp_path / "data")
    name = forget_yolo(tmp_path / "data")
    run_extraction(load_config({**extract_options, "data": str(tmp_path / "data"), "val_fraction": 0}))
    train = open_store(extract_options["out"])["train"]
    assert len(train.ragged([row_of(train, name)], BOX_CLASSES)[0]) == 0
    assert count_kinds(train)["unlabeled"] == 0


def test_an_image_without_a_mask_is_a_sample(extract_options: dict[str, Any], tmp_path: Path) -> None:
    write_masks(tmp_path / "data")
    mask = sorted((tmp_path / "data/train/masks").glob("*.png"))[0]
    mask.unlink()
    with pytest.raises(SourceError, match="option unlabeled=true takes them as not labeled"):
        open_source(tmp_path / "data", kind="masks")
    options = {**extract_options, "data": str(tmp_path / "data"), "source": "masks", "val_fraction": 0}
    run_extraction(load_config({**options, "source_options": {"unlabeled": "true"}}))
    store = open_store(extract_options["out"])
    kinds = {name: count_kinds(split) for name, split in store.items()}
    assert sum(kind["unlabeled"] for kind in kinds.values()) == 1
    split = next(store[name] for name, kind in kinds.items() if kind["unlabeled"])
    lengths = [len(data) for data in split.ragged(np.arange(len(split)), MASK)]
    assert lengths.count(0) == 1


def test_a_label_that_comes_later_is_followed(extract_options: dict[str, Any], tmp_path: Path) -> None:
    write_yolo(tmp_path / "data")
    label = sorted((tmp_path / "data/labels/train").glob("*.txt"))[0]
    text = label.read_text()
    label.unlink()
    options = {**extract_options, "data": str(tmp_path / "data"), "val_fraction": 0}
    options["source_options"] = {"unlabeled": "true"}
    run_extraction(load_config(options))
    label.write_text(text)
    result = run_extraction(load_config(options))
    assert result.encoded == 0
    train = open_store(extract_options["out"])["train"]
    classes = train.ragged([row_of(train, f"{label.stem}.png")], BOX_CLASSES)[0]
    assert len(classes)
    assert (classes >= 0).all()


@pytest.mark.parametrize(("layout", "write"), [("folder", write_folder), ("clips", write_clips)])
def test_files_beside_class_folders_have_no_label(
    layout: str, write: Callable[[Path], Any], extract_options: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path / "data")
    moved = sorted((tmp_path / "data/train/bird").iterdir())[0]
    moved.rename(tmp_path / "data/train" / moved.name)
    with pytest.raises(SourceError, match="pass unlabeled=true to use them without a label"):
        open_source(tmp_path / "data", layout)
    options = {**extract_options, "data": str(tmp_path / "data"), "source": layout, "val_fraction": 0}
    run_extraction(load_config({**options, "source_options": {"unlabeled": "true"}}))
    store = open_store(extract_options["out"])
    labels = dict(zip(store["train"].keys, store["train"].read(LABEL).tolist(), strict=True))
    assert [key for key, label in labels.items() if label == NO_LABEL] == [f"train/{moved.name}"]
    assert set(store.manifest.class_names) == {"bird", "cat", "dog"}
    assert verify_store(extract_options["out"]) == []


def test_a_table_of_clips_of_which_some_are_labeled(extract_options: dict[str, Any], tmp_path: Path) -> None:
    dataset = write_clip_table(tmp_path / "data")
    run_extraction(load_config({**extract_options, "data": str(dataset.path), "frames": 2}))
    store = open_store(extract_options["out"])
    for name, split in store.items():
        assert FRAMES in split.names
        found = dict(zip(split.keys, split.read(LABEL).tolist(), strict=True))
        truth = {key: clip.label for key, clip in dataset.truth[name].items()}
        names = {
            key: None if label < 0 else store.manifest.class_names[label] for key, label in found.items()
        }
        assert names == truth
        assert None in truth.values()
    assert verify_store(extract_options["out"]) == []


def test_a_table_of_clips_has_no_images_and_no_boxes(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("path,label\na.mp4,x\nb.png,y\n")
    with pytest.raises(SourceError, match=r"both video files \(a\.mp4\) and images \(b\.png\)"):
        open_source(file)
    (tmp_path / "frames").mkdir()
    file.write_text("path,label\nframes,x\nb.png,y\n")
    with pytest.raises(SourceError, match=r"both folders of frames \(frames\) and images \(b\.png\)"):
        open_source(file)
    file.write_text('video,boxes,classes\na.mp4,"[[1, 1, 2, 2]]","[""x""]"\n')
    with pytest.raises(SourceError, match="clips, which have no boxes"):
        open_source(file)
