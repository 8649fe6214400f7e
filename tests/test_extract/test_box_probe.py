"""What grids are worth for detection, and clips over their frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extract import cells
from extract.boxes import cell_classes, middle_cells
from extract.cells import NoTargets, plan_fit
from extract.config import ConfigError, load_config
from extract.logits import NoLabels, frame_features, probe_store
from extract.run import run_extraction
from store.create import create_store
from store.finalize import finalize_store
from store.format import Manifest, Preprocessing, TeacherSpec, feature_arrays, target_arrays
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter

SIDE = 128
NAMES = ("red", "green")


def write_squares(root: Path, count: int, *, labeled: int | None = None) -> Path:
    """Dark images with one square of 32 pixels, red or green; YOLO labels for the first `labeled` training images."""
    generator = np.random.default_rng(0)
    for number in range(count):
        split = "train" if number < 0.75 * count else "val"
        pixels = generator.integers(0, 60, (SIDE, SIDE, 3), np.uint8)
        x, y = generator.integers(0, SIDE - 32, 2)
        kind = number % 2
        pixels[y : y + 32, x : x + 32, kind] = 230
        file = root / "images" / split / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        if split == "val" or labeled is None or number < labeled:
            label = root / "labels" / split / f"{number:03d}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{kind} {(x + 16) / SIDE} {(y + 16) / SIDE} 0.25 0.25\n")
    (root / "data.yaml").write_text("names: [red, green]\ntrain: images/train\nval: images/val\n")
    return root


@pytest.fixture
def box_options(extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, value in {"STEPS": 60, "BATCH_CELLS": 256, "LEARNING_RATE": 1e-2}.items():
        monkeypatch.setattr(cells, name, value)
    return {
        **extract_options,
        "image_size": 128,
        "grid": "native",
        "source": "yolo",
        "source_options": {"unlabeled": "true"},
    }


def test_cells_find_objects_and_tell_them_apart(box_options: dict[str, Any], tmp_path: Path) -> None:
    """From 20 of 30 training images: the others are no background."""
    run_extraction(
        load_config({**box_options, "data": str(write_squares(tmp_path / "data", 40, labeled=20))})
    )
    result = probe_store(box_options["out"])
    assert (result["task"], result["array"], result["rows"]) == ("detection", None, 20)
    assert result["measured_on"] == "val"
    # 9 of 256 cells are in the middle of an object, so guessing gives an AP of about 0.04; the teacher's weights are random.
    assert result["out_of_fold_objectness_ap"] > 0.2
    assert result["probe_objectness_ap"] > 0.2
    assert result["probe_class_accuracy"] > 0.8


def test_too_few_labeled_images_are_one_line(box_options: dict[str, Any], tmp_path: Path) -> None:
    run_extraction(load_config({**box_options, "data": str(write_squares(tmp_path / "data", 8, labeled=1))}))
    with pytest.raises(
        NoTargets, match="1 of 6 rows of train are labeled, a probe of 2 classes needs 2 or more"
    ):
        probe_store(box_options["out"])


def test_logits_of_boxes_are_refused_before_encoding(box_options: dict[str, Any], tmp_path: Path) -> None:
    data = str(write_squares(tmp_path / "data", 8))
    with pytest.raises(ConfigError, match="--logits probe needs class labels or masks"):
        run_extraction(load_config({**box_options, "data": data, "logits": "probe"}))
    assert not Path(box_options["out"]).exists()


def test_the_middle_of_a_box_in_cells() -> None:
    rows, columns = middle_cells(np.array([1.0, 2.0, 7.0, 4.0]), 8)
    assert sorted(set(rows.ravel().tolist())) == [2, 3]
    assert sorted(set(columns.ravel().tolist())) == [3, 4]
    tiny = middle_cells(np.array([7.6, 7.6, 7.9, 7.9]), 8)
    assert (tiny[0].item(), tiny[1].item()) == (7, 7)


def test_padding_does_not_count(box_options: dict[str, Any], tmp_path: Path) -> None:
    data = write_squares(tmp_path / "data", 8)
    for file in data.rglob("*.png"):
        Image.open(file).resize((128, 64)).save(file)
    run_extraction(load_config({**box_options, "data": str(data), "resize": "letterbox"}))
    store = open_store(box_options["out"])
    plan = plan_fit(store, "boxes", 0)
    classes = cell_classes(plan, store["train"], np.arange(6)).numpy()
    quarter = plan.side // 4
    assert (classes[:, :quarter] == -1).all()
    assert (classes[:, -quarter:] == -1).all()
    assert (classes[:, quarter:-quarter] >= 0).all()


class TestClips:
    def make(self, path: Path, clips: list[np.ndarray], labels: list[int]) -> Path:
        manifest = Manifest(
            teacher=TeacherSpec(name="synthetic", fingerprint="0", layer="", width=4),
            preprocessing=Preprocessing(image_size=32),
            class_names=("forward", "backward"),
        )
        arrays = feature_arrays(4, frames=True) + target_arrays(label=True)
        keys = {"train": [f"clip{number}" for number in range(len(clips))]}
        create_store(path, manifest, Plan(keys, batch_rows=8, shard_rows=64), arrays)
        with StoreWriter(path, "train") as writer:
            content = np.random.default_rng(0).integers(0, 255, (len(clips), 16), np.uint8)
            writer.append(
                {
                    "features/frames/values": clips,
                    "features/pooled": np.stack([clip.mean(axis=0) for clip in clips]),
                    "content": content,
                    "sizes": np.full((len(clips), 2), 32, np.int32),
                    "targets/label": np.array(labels, np.int32),
                }
            )
        finalize_store(path)
        return path

    def test_the_order_of_frames_is_seen(self, tmp_path: Path) -> None:
        """Clips and the same clips backwards: their means are equal, so a probe of pooled features guesses."""
        generator = np.random.default_rng(1)
        ramp = np.linspace(-1, 1, 6)[:, None] * np.array([1.0, 0.5, -1.0, 2.0])
        forward = [ramp + generator.normal(scale=0.3, size=ramp.shape) for _ in range(20)]
        clips = [clip[::order] for clip in forward for order in (1, -1)]
        store = self.make(tmp_path / "clips.zarr", clips, [0, 1] * 20)
        split = open_store(store)["train"]
        features = frame_features(split, np.arange(2))
        assert features.shape == (2, 8)
        np.testing.assert_allclose(features[0, :4], features[1, :4], atol=2e-3)
        np.testing.assert_allclose(features[0, 4:], -features[1, 4:], atol=2e-3)
        assert probe_store(store)["out_of_fold_top1"] > 0.95

    def test_fewer_labeled_clips_than_classes(self, tmp_path: Path) -> None:
        store = self.make(tmp_path / "clips.zarr", [np.ones((2, 4))] * 3, [0, -1, -1])
        with pytest.raises(NoLabels, match="1 labeled rows"):
            probe_store(store)

    def test_a_store_at_a_url_is_named_by_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And where there is nothing to fit a probe on, no feature is downloaded."""
        monkeypatch.setenv("QWEN_DISTILL_CACHE", str(tmp_path / "cache"))
        store = self.make(tmp_path / "clips.zarr", [np.ones((2, 4))] * 3, [0, -1, -1])
        with pytest.raises(NoLabels, match=rf"^file://{tmp_path}/clips\.zarr: 1 labeled rows"):
            probe_store(f"file://{store}")
        assert list((tmp_path / "cache").rglob("targets/label/c/0"))
        assert not list((tmp_path / "cache").rglob("features/*/c/0/*"))
