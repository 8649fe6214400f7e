"""Data sets as other programs have written them: labelme's VOC and COCO exports, deepforest's CSV and XML."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract.sources.base import Source
from extract.sources.detect import open_source
from imaging.decode import decode
from imaging.masks import decode_mask

AssetPath = Callable[[str], Path]


@pytest.fixture(scope="module")
def labelme(asset_path: AssetPath) -> Path:
    return next(asset_path("labelme-examples").rglob("examples"))


@pytest.fixture(scope="module")
def deepforest(asset_path: AssetPath) -> Path:
    return asset_path("deepforest") / "deepforest" / "data"


def all_samples(source: Source) -> dict[str, tuple[tuple[int, int], np.ndarray]]:
    """Key → (size, boxes); every box must lie in its image."""
    found = {}
    for samples in source.splits.values():
        for sample in samples:
            size = decode(sample.read()).size
            boxes = sample.read_boxes(size)
            assert boxes is not None
            assert (boxes.values[:, :2] >= 0).all()
            assert (boxes.values[:, 2:] <= np.array(size) + 1).all()
            found[sample.key] = size, boxes.values
    return found


@pytest.mark.slow
def test_labelme_voc_boxes(labelme: Path) -> None:
    source = open_source(labelme / "bbox_detection/data_dataset_voc", one_based=False)
    assert (source.kind, source.class_names) == ("voc", ("bus", "car", "person"))
    assert set(all_samples(source)) == {f"JPEGImages/2011_0000{n}.jpg" for n in ("03", "06", "25")}


@pytest.mark.slow
def test_labelme_coco_agrees_with_its_masks(labelme: Path) -> None:
    folder = labelme / "instance_segmentation"
    source = open_source(folder / "data_dataset_coco")
    assert source.kind == "coco"
    assert source.class_names[:3] == ("_background_", "aeroplane", "bicycle")
    found = all_samples(source)
    assert len(found) == 3
    for key, (size, boxes) in found.items():
        objects = next((folder / "data_dataset_voc/SegmentationObjectPNG").glob(f"{Path(key).stem}.png"))
        instances = np.asarray(Image.open(objects))
        assert instances.shape == (size[1], size[0])
        outer = [v.min() for v in np.nonzero((instances > 0) & (instances < 255))]
        np.testing.assert_allclose([boxes[:, 1].min(), boxes[:, 0].min()], outer, atol=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semantic_segmentation", "instance_segmentation"])
def test_labelme_masks(labelme: Path, name: str) -> None:
    folder = labelme / name / "data_dataset_voc"
    source = open_source(folder, val_fraction=0)
    assert (source.kind, source.task) == ("masks", "segmentation")
    assert source.class_names[:2] == ("_background_", "aeroplane")
    samples = source.splits["train"]
    assert [sample.key for sample in samples] == [f"JPEGImages/2011_0000{n}.jpg" for n in ("03", "06", "25")]
    for sample in samples:
        ids = decode_mask(sample.read_mask(decode(sample.read()).size) or b"")
        stored = np.load(folder / "SegmentationClass" / f"{Path(sample.key).stem}.npy")
        np.testing.assert_array_equal(ids.astype(np.int8), stored.astype(np.int8))  # -1 there is 255 here
        assert len(np.unique(ids)) > 1


@pytest.mark.slow
def test_deepforest_csv_and_xml_agree(deepforest: Path, tmp_path: Path) -> None:
    with (deepforest / "OSBS_029.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = open_source(deepforest / "OSBS_029.csv", val_fraction=0)
    ((size, boxes),) = all_samples(table).values()
    assert size == (400, 400)
    expected = [[float(row[c]) for c in ("xmin", "ymin", "xmax", "ymax")] for row in rows]
    np.testing.assert_array_equal(boxes, expected)
    for name in ("OSBS_029.png", "OSBS_029.xml"):
        shutil.copy(deepforest / name, tmp_path / name)
    voc = open_source(tmp_path, one_based=False, val_fraction=0)
    assert voc.class_names == ("Tree",)
    ((_, from_xml),) = all_samples(voc).values()
    assert sorted(map(tuple, from_xml.tolist())) == sorted(map(tuple, boxes.tolist()))


@pytest.mark.slow
def test_deepforest_classes(deepforest: Path) -> None:
    source = open_source(deepforest / "testfile_multi.csv")
    assert source.class_names == ("Alive", "Dead")
