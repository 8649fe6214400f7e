"""What an extraction says to somebody who goes on from it, or tries it again with other splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from commands.extracting import next_step
from commands.store import print_description
from extract.config import load_config
from extract.existing import DifferentStore
from extract.measured import note_probe
from extract.run import run_extraction
from extract.teachers import CheckpointError
from store.summary import describe_store


def extract(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run_extraction(load_config(None, {**options, **changes})).as_dict()


def test_a_data_set_that_is_cut_otherwise_is_named_as_that(extract_options: dict[str, Any]) -> None:
    extract(extract_options)
    with pytest.raises(
        DifferentStore, match=r"images of its split 'train' are now in 'val' .* Give --val-fraction"
    ):
        extract(extract_options, val_fraction=0.6)


def test_without_a_validation_split_the_next_step_is_to_cut_one(
    extract_options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qwen_distill")
    result = extract(extract_options, val_fraction=0.001)
    assert result["splits"].keys() == {"train"}
    assert "none of the 60 images fell into val with --val-fraction 0.001" in caplog.text
    assert next_step(result).endswith("--val-fraction 0.3 --overwrite")


@pytest.mark.parametrize(
    ("splits", "task", "command"),
    [
        (("train", "val"), "classification", "cli train s.zarr --student resnet18 --out runs/resnet18"),
        (
            ("train", "test"),
            "segmentation",
            "cli train s.zarr --student unet/small --out runs/unet-small --val-split test",
        ),
    ],
)
def test_the_next_step_fits_the_data(splits: tuple[str, ...], task: str, command: str) -> None:
    assert next_step({"store": "s.zarr", "task": task, "splits": dict.fromkeys(splits, 9)}) == command


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
