"""What a run's metrics are measured on is said: few samples, classes that are absent, copies of training images."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from store.summary import count_classes, count_kinds, count_shared, split_warnings
from train.config import TrainConfig
from train.data.batches import Batch
from train.data.splits import warn_of_splits
from train.deliver.evaluate import evaluate_run
from train.distill.projector import DistilledOutput
from train.metrics import warn_of_zero_metric
from train.run import run_training
from train.tasks import build_task


def measure(task, logits, **targets):
    batch = Batch(
        np.arange(len(logits)),
        torch.zeros(1),
        np.zeros((1, 2, 3)),
        torch.ones(len(logits)),
        len(logits),
        **targets,
    )
    meter = task.new_meter(torch.device("cpu"))
    task.update(meter, DistilledOutput(logits, None, None), batch)
    return task.metrics(meter)


def test_metrics_of_a_class_without_samples_are_undefined_not_zero():
    """Class 2 is predicted once and never right: there is no sample of it, so its recall is not 0."""
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    metrics = measure(build_task("classification", num_classes=3, label_smoothing=0.0), logits, labels=labels)
    assert metrics["macro_recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["per_class_recall/1"] == pytest.approx(1 / 2)
    assert "per_class_recall/2" not in metrics


def test_iou_of_a_class_without_pixels_is_undefined_not_zero():
    masks, predicted = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 0, 1, 2]]])
    logits = torch.nn.functional.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    metrics = measure(build_task("segmentation", num_classes=3, label_smoothing=0.0), logits, masks=masks)
    assert metrics["miou"] == pytest.approx((1 + 1 / 2) / 2)
    assert "per_class_iou/2" not in metrics


def test_summary_and_evaluation_count_labeled_validation_samples(make_store, make_config, caplog):
    config = make_config(make_store(train=24, val=8, unlabelled=(0, 3)), epochs=1)
    with caplog.at_level(logging.WARNING):
        summary = run_training(config)
    assert summary["validation_samples"] == 6
    assert json.loads((config.out / "summary.json").read_text())["validation_samples"] == 6
    assert (
        "val has 6 samples to measure on, fewer than 30: one sample changes top-1 by 16.7 points"
        in caplog.text
    )
    measured = evaluate_run(config.out, config.store, device="cpu", workers=0)
    assert measured["samples"] == 6
    assert measured["per_class"].keys() == {"red", "green", "blue"}


def test_absent_classes_are_reported(make_store):
    store = open_store(make_store(train=6, val=6, one_class=True))
    assert count_kinds(store["val"]) == {"labeled": 6, "unlabeled": 0, "background": 0, "bad": 0}
    assert count_classes(store["val"], 3, "label")["samples"].tolist() == [6, 0, 0]
    assert count_shared(store) == {}
    texts = split_warnings(store, "train", "val", "label")
    assert any(text.startswith("val has no sample of 2 of 3 classes (green, blue)") for text in texts)
    assert any(text.startswith("train has no sample of 2 of 3 classes") for text in texts)


def test_evaluate_shows_the_number_of_samples_and_undefined_classes(
    make_store, make_config, capsys: pytest.CaptureFixture[str]
):
    """A validation split of one class: the recall of the others is n/a, not 0."""
    from commands.train import evaluate
    from console.output import configure_logging

    configure_logging()  # as the command line does
    config = make_config(make_store(train=24, val=8), epochs=1)
    run_training(config)
    capsys.readouterr()
    evaluate(
        config.out, str(make_store("other.zarr", train=8, val=5, one_class=True)), device="cpu", workers=0
    )
    printed = capsys.readouterr()
    assert "on val (5 samples)" in printed.out
    assert [line.split()[-1] for line in printed.out.splitlines() if line.startswith(("green", "blue"))] == [
        "n/a"
    ] * 2
    assert "val has no sample of 2 of 3 classes (green, blue): their metrics are undefined" in printed.err


def test_classes_that_no_mask_has_are_reported(make_store, make_config, caplog: pytest.LogCaptureFixture):
    """Four classes; the masks of a store of one class have the background and that class."""
    config = make_config(make_store(masks=True, train=6, val=4, one_class=True), student="unet/small")
    with caplog.at_level(logging.WARNING):
        warn_of_splits(config, open_store(config.store), "segmentation")
    assert "val has no sample of 2 of 4 classes (green, blue): their metrics are undefined" in caplog.text
    assert "train has no sample of 2 of 4 classes (green, blue): they cannot be learned" in caplog.text


def records_of(*values: float | None, name: str = "map50_95") -> list[dict[str, Any]]:
    return [{"epoch": epoch, name: value, "learning_rate": 1e-7} for epoch, value in enumerate(values, 1)]


def test_a_metric_that_is_0_after_a_third_of_the_epochs_is_warned_of_once(
    tmp_path: Path, train_log: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(store="s.zarr", student="yolov8/n", out=tmp_path, epochs=9)
    warned = {}
    for count in range(1, 10):
        train_log.clear()
        warn_of_zero_metric(config, tmp_path, records_of(*[0.0004] * count))
        warned |= dict.fromkeys(train_log.messages, count)
    ((line, count),) = warned.items()
    assert count == 3
    assert line.startswith(f"{tmp_path}: mAP50-95 is still 0 after 3 of 9 epochs: ")
    assert "learning rate that is too low or too high (now 1e-07)" in line
    assert "image size of 640 px" in line
    assert "cli inspect s.zarr --pictures FOLDER" in line


@pytest.mark.parametrize(
    "records", [records_of(0.0, 0.2, 0.0), records_of(None, None, None), records_of(0.0, 0.0)]
)
def test_other_metrics_are_not_warned_of(
    records: list[dict[str, Any]], tmp_path: Path, train_log: pytest.LogCaptureFixture
) -> None:
    warn_of_zero_metric(TrainConfig(store="s", student="yolov8/n", out=tmp_path, epochs=9), tmp_path, records)
    assert not train_log.messages


def test_short_runs_are_not_warned_of(tmp_path: Path, train_log: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(store="s", student="resnet18", out=tmp_path, epochs=3)
    warn_of_zero_metric(config, tmp_path, records_of(0.0, name="top1"))
    assert not train_log.messages
