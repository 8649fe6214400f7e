"""Validations follow the training: few steps between two of them are not worth one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from processes.stop import Stopped
from tests.test_train.test_resume import StopAfter, records
from train.checkpoint import load_checkpoint
from train.fit import is_validated, validation_interval
from train.run import run_training


@pytest.mark.parametrize(
    ("every", "steps", "train", "val", "epochs"),
    [
        (None, 4, 100, 341, 4),  # four steps an epoch: 400 samples trained on for 341 validated
        (None, 96, 3068, 341, 1),
        (None, 1, 8, 8, 1),
        (500, 96, 3068, 341, 6),
        (1, 96, 3068, 341, 1),
        (10, 4, 100, 341, 3),
    ],
)
def test_interval_in_epochs(every, steps, train, val, epochs):
    assert validation_interval(every, steps=steps, train_samples=train, val_samples=val) == epochs


def test_the_last_epoch_is_validated():
    assert [epoch for epoch in range(1, 9) if is_validated(epoch, 3, 8)] == [3, 6, 8]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_epochs_without_validation_have_training_losses_alone(make_store, make_config):
    config = make_config(make_store(train=6, val=16), epochs=5, batch_size=6, control=True)
    summary = run_training(config)
    for folder in (config.out, config.out / "control"):
        measured = [line["epoch"] for line in lines(folder) if "top1" in line]
        assert measured == [3, 5]
        assert [line["epoch"] for line in lines(folder) if line["val_loss"] is not None] == measured
        assert all(line["train_loss"] > 0 for line in lines(folder))
    assert summary["best_epoch"] in (3, 5)
    assert summary["epochs_done"] == 5
    assert load_checkpoint(config.out / "best.pt")["epoch"] == summary["best_epoch"]


def test_a_resumed_run_validates_after_the_same_epochs(tmp_path, make_store, make_config):
    options = {"store": make_store(train=12, val=20), "epochs": 4, "batch_size": 4}
    run_training(make_config(**options, out=tmp_path / "whole"))
    for looks in (4, 1000):
        try:
            run_training(make_config(**options, out=tmp_path / "parts", resume=True), stop=StopAfter(looks))
        except Stopped:
            continue
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_early_stopping_counts_epochs(make_store, make_config):
    """Not validations: every second epoch has one."""
    config = make_config(
        make_store(train=6, val=12), epochs=40, batch_size=6, early_stopping_patience=4, learning_rate=1e-12
    )
    summary = run_training(config)
    assert summary["epochs_done"] == summary["best_epoch"] + 4


@pytest.mark.slow
def test_yolo_validates_as_often(tmp_path, yolo_store, capsys):
    pytest.importorskip("ultralytics")
    from tests.test_train.yolo_runs import make_config as yolo_config

    config = yolo_config(yolo_store, tmp_path / "run", epochs=5, validate_every=4)
    summary = run_training(config)
    measured = [line["epoch"] for line in lines(config.out) if line["map50"] is not None]
    assert measured == [2, 4, 5]
    assert [line["epoch"] for line in lines(config.out) if line["val_loss"] is not None] == measured
    assert summary["best_epoch"] in measured
    # What is shown of an epoch is what it measured, not what the one before it did.
    shown = [line for line in capsys.readouterr().err.splitlines() if re.match(r"epoch \d/5: box_loss", line)]
    assert [number for number, line in enumerate(shown, 1) if "mAP50" in line] == measured


def test_what_is_shown_of_a_detectors_epoch():
    from train.yolo.fit import epoch_line

    record = {"epoch": 3, "box_loss": 1.5, "cls_loss": 2.0, "dfl_loss": 0.25, "feature_loss": None}
    record |= {"map50": None, "map50_95": None}
    assert epoch_line(record, 9, 87) == "epoch 3/9: box_loss 1.500, cls_loss 2.000, dfl_loss 0.250"
    record |= {"feature_loss": 0.5, "map50": 0.61342, "map50_95": 0.0}
    assert epoch_line(record, 9, 87).endswith(", feature_loss 0.500; mAP50 0.6134, mAP50-95 0.0000 (n=87)")
