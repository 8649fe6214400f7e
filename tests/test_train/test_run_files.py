"""A training from a store: the run folder and what is in it."""

from __future__ import annotations

import json

import pytest
import torch

from store.format import RANDOM_WEIGHTS_NOTICE
from train.run import run_training


@pytest.mark.parametrize("images", ["jpeg", "raw", "none"])
def test_run_writes_every_file_of_the_contract(make_store, make_config, images):
    config = make_config(make_store(images=images, logits=True), control=True)
    summary = run_training(config)
    folder = config.out
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in [
        "student",
        "task",
        "num_classes",
        "epochs_done",
        "best_epoch",
        "metrics",
        "parameters",
        "trainable_parameters",
        "macs",
        "wall_time_s",
        "images_per_second",
        "peak_rss_mb",
        "peak_gpu_mb",
        "store",
        "seed",
        "control",
    ]:
        assert name in summary, name
    assert set(summary["metrics"]) >= {"top1", "top5", "macro_f1"}
    assert summary["control"]["difference"]["top1"] == pytest.approx(
        summary["metrics"]["top1"] - summary["control"]["metrics"]["top1"]
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for name in [
        "train_loss",
        "hard_loss",
        "feature_loss",
        "logit_loss",
        "val_loss",
        "learning_rate",
        "epoch_time_s",
        "top1",
    ]:
        assert isinstance(lines[0][name], float), name
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["class_names"] == ["red", "green", "blue"]
    assert any((folder / "tensorboard").iterdir())
    assert (folder / "control" / "last.pt").exists()


@pytest.mark.parametrize("random", [True, False])
def test_a_random_teacher_is_said_once(make_store, make_config, train_log, random):
    summary = run_training(make_config(make_store(random_teacher=random), control=True, epochs=1))
    assert summary["store"]["random_teacher"] == random
    said = {record.created for record in train_log.records if RANDOM_WEIGHTS_NOTICE in record.getMessage()}
    assert len(said) == int(random)
