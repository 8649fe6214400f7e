"""benchmarks/learning.py --data: labels are hidden as asked, the same for a draw, and nothing else changes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.learning_sets import DATA_SETS, lay_out
from benchmarks.learning_studies import DATA_STUDIES
from extract.sources.base import Source
from extract.sources.detect import open_source

COUNT = 6
XML = (
    "<annotation><object><name>{}</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax>"
    "<ymax>5</ymax></bndbox></object></annotation>"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small folders laid out as clothing, camvid and bccd are; six images of each kind and split."""
    root = tmp_path / "data"
    generator = np.random.default_rng(0)

    def save(file: Path, mask: bool = False) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (8, 8) if mask else (8, 8, 3)
        Image.fromarray(generator.integers(0, 2 if mask else 255, shape, np.uint8)).save(file)

    for split in ("train", "val", "test"):
        listed = [f"{split}{number}" for number in range(COUNT)]
        for name in listed:
            for kind in ("hat", "shoe"):
                save(root / "clothing" / split / kind / f"{kind}{name}.jpg")
            save(root / "camvid/images" / split / f"{name}.png")
            save(root / "camvid/masks" / split / f"{name}.png", mask=True)
            save(root / f"bccd/JPEGImages/{name}.jpg")
            xml = root / f"bccd/Annotations/{name}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(XML.format("cell"))
        lists = root / f"bccd/ImageSets/Main/{split}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("\n".join(listed) + "\n")
    (root / "camvid/classes.txt").write_text("a\nb\n")
    return root


def opened(name: str, data: Path, folder: Path, labels: int | None, draw: int = 0) -> Source:
    found = lay_out(name, data, folder, labels, draw)
    return open_source(found, DATA_SETS[name].source, **DATA_SETS[name].options.get("source_options", {}))


def labeled(source: Source, split: str) -> list[str]:
    """Keys of the samples that have a label, a mask or boxes of a class."""

    def has(sample) -> bool:  # type: ignore[no-untyped-def]
        boxes = sample.read_boxes((8, 8))
        return (
            sample.label is not None
            or sample.mask is not None
            or (boxes is not None and boxes.classes[0] >= 0)
        )

    return [sample.key for sample in source.splits[split] if has(sample)]


@pytest.mark.parametrize(("name", "count"), [("clothing", 4), ("camvid", 2), ("bccd", 2), ("digits", 2)])
def test_labels_of_some_training_images_are_kept(name: str, count: int, data: Path, tmp_path: Path) -> None:
    source = opened(name, data, tmp_path / "few", 2)
    everything = opened(name, data, tmp_path / "all", None)
    for split in ("train", "val", "test"):
        assert list(source.splits[split].keys) == list(everything.splits[split].keys)
    assert len(labeled(source, "train")) == count
    for split in ("val", "test"):
        assert labeled(source, split) == labeled(everything, split) == list(source.splits[split].keys)
    assert labeled(source, "train") == labeled(opened(name, data, tmp_path / "again", 2), "train")
    draws = {tuple(labeled(opened(name, data, tmp_path / f"{draw}", 2, draw), "train")) for draw in range(4)}
    assert len(draws) > 1


def test_every_study_has_its_data_set_and_both_sides_their_updates() -> None:
    assert {study.data for study in DATA_STUDIES.values()} == set(DATA_SETS)
    assert all(study.epochs > 0 for study in DATA_STUDIES.values())


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not exist: --data DIR needs the folder camvid"):
        lay_out("camvid", tmp_path, tmp_path / "out", 2, 0)


def test_the_table_has_an_empty_label_for_the_others(data: Path, tmp_path: Path) -> None:
    table = lay_out("clothing", data, tmp_path / "few", 1, 0)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["split"] == "train" and row["label"] != "" for row in rows) == 2
    assert sum(row["split"] == "train" for row in rows) == 2 * COUNT
