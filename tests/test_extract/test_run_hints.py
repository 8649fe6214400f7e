"""What an extraction says to somebody who goes on from it, or tries it again with other splits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands.extract import next_step, print_estimate
from commands.store import print_description
from extract.config import load_config
from extract.plan import DifferentStore, open_teacher
from extract.result import note_probe
from extract.run import run_extraction
from extract.teachers import CheckpointError, load_teacher
from store.reader import open_store
from store.summary import count_shared, describe_store, split_warnings
from tests.test_extract.source_datasets import mask_of, picture, save


def extract(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run_extraction(load_config({**options, **changes})).as_dict()


def test_a_data_set_that_is_cut_otherwise_is_named_as_that(extract_options: dict[str, Any]) -> None:
    extract(extract_options)
    with pytest.raises(
        DifferentStore, match=r"was cut with --val-fraction 0.1, asked for 0.6. Give --val-fr"
    ):
        extract(extract_options, val_fraction=0.6)


def test_a_store_of_an_older_version_keeps_its_splits(
    extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made when the hash of the key alone decided, and without a record of --val-fraction."""
    options = {**extract_options, "group_duplicates": False}
    with monkeypatch.context() as older:
        older.setattr("extract.sources.splitting.balance", lambda *arguments: None)
        before = extract(options)
    record = Path(before["store"]) / ".extract" / "source.json"
    record.write_text('{"split": {}, "options": {}}')
    again = extract(options)
    assert again["encoded"] == 0
    assert again["splits"] == before["splits"]
    assert extract(options, overwrite=True)["splits"]["val"] > before["splits"]["val"]


def test_copies_in_splits_of_the_data_set_are_counted(
    extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    for number, file in enumerate(sorted(digit_folder.rglob("*.png"))[:20]):
        for split in ("train", "val") if number < 3 else ("train",):
            target = root / split / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    save(root / "val" / "1" / "own.png", picture(7))
    result = extract(extract_options, data=str(root))
    text = "3 of 4 samples of val are exact copies of samples of train"
    assert text in caplog.text
    assert any(warning.startswith(text) for warning in result["warnings"])
    assert any(warning.startswith("val has 4 samples to measure on") for warning in result["warnings"])
    store = open_store(result["store"])
    assert count_shared(store) == {("train", "val"): 3}
    assert split_warnings(store, "train", "val", "label")[0].startswith(text), "training says the same"


def test_without_a_validation_split_the_next_step_is_to_cut_one(
    extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qwen_distill")
    image = next(digit_folder.rglob("*.png"))
    save(tmp_path / "one" / image.name, np.asarray(Image.open(image).convert("RGB")))
    result = extract(extract_options, data=str(tmp_path / "one"))
    assert len(result["splits"]) == 1
    assert re.search(r"none of the 1 images fell into (val|train) with --val-fraction 0.1", caplog.text)
    result["splits"] = {"train": 1}
    assert next_step(result).endswith("--val-fraction 0.3 --overwrite")


@pytest.mark.parametrize(
    ("splits", "task", "teachers", "command"),
    [
        (
            ("train", "val"),
            "classification",
            ["a"],
            "cli train s.zarr --student resnet18 --out runs/resnet18",
        ),
        (
            ("train", "val"),
            "classification",
            ["a", "b"],
            "cli train s.zarr --student resnet18 --out runs/resnet18 --teachers a,b",
        ),
        (
            ("train", "test"),
            "segmentation",
            ["a"],
            "cli train s.zarr --student unet/small --out runs/unet-small --val-split test",
        ),
    ],
)
def test_the_next_step_fits_the_data(
    splits: tuple[str, ...], task: str, teachers: list[str], command: str
) -> None:
    result = {"store": "s.zarr", "task": task, "splits": dict.fromkeys(splits, 9), "teachers": teachers}
    assert next_step(result) == command


def test_a_grid_finer_than_the_teachers_is_warned_of(
    extract_options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    extract(extract_options, grid=99, dry_run=True)
    assert "grid 99: the teacher sees" in caplog.text


def test_zero_shot_without_a_tokenizer_is_refused_before_anything_is_encoded(
    extract_options: dict[str, Any], micro_checkpoint: Path
) -> None:
    options = {"teacher": "qwen2.5-vl", "teacher_path": str(micro_checkpoint), "image_size": 56}
    with pytest.raises(CheckpointError, match="tokenizer"):
        extract(extract_options, **options, logits="zero-shot")
    assert not Path(extract_options["out"]).exists()


def test_inspect_shows_what_the_features_are_worth(
    extract_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(extract(extract_options)["store"])
    note_probe(store, {"probe_top1": 0.625, "knn_top1": 0.5})
    print_description(describe_store(store))
    shown = capsys.readouterr().out
    assert "linear probe 62.5%, k-NN 50.0%" in shown
    assert all(len(line) <= 80 or "/" in line for line in shown.splitlines())  # paths are as long as they are


def test_a_dry_run_checks_targets_and_copies_as_the_run_would(
    extract_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CamVid's own layout with an image of another size than its mask, and one that is in two splits."""
    root = tmp_path / "street"
    for number in range(8):
        split = "train" if number < 6 else "val"
        save(root / split / f"{number}.png", picture(number if number != 7 else 0))
        save(root / f"{split}annot" / f"{number}.png", mask_of(number) if number != 3 else mask_of(3)[:-1])
    result = extract(extract_options, data=str(root), dry_run=True)
    assert not Path(extract_options["out"]).exists()
    assert result["estimate"]["checked_samples"] == 8
    (bad,) = result["estimate"]["bad_samples"]
    assert (bad["split"], bad["key"]) == ("train", "train/3.png")
    assert "mask of 24×15 pixels, its image has 24×16" in bad["reason"]
    assert result["warnings"][0].startswith("1 of 2 samples of val are exact copies of samples of train")
    print_estimate(result)
    assert (
        "checked: 8 samples with their targets, 1 bad\n  bad: train train/3.png: annotation:"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(("size", "named"), [(64, True), (128, False), (160, False), (192, False)])
def test_a_size_far_below_the_one_that_the_teacher_was_trained_at_is_named(
    extract_options: dict[str, Any], caplog: pytest.LogCaptureFixture, size: int, named: bool
) -> None:
    with caplog.at_level("INFO"):
        open_teacher(load_config({**extract_options, "image_size": size}))
    advice = (
        "timm:test_efficientnet was trained on images of 160 pixels and sees 64 here: --image-size 160 takes"
    )
    assert (advice in caplog.text) == named


def test_a_teacher_with_random_weights_was_trained_at_no_size() -> None:
    teacher = load_teacher("timm:test_efficientnet", device="cpu", image_size=64, random_weights=True)
    assert teacher.trained_size is None
