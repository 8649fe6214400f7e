"""A training from a store: the run folder and what is in it."""

from __future__ import annotations

import json

import pytest
import torch

from store.errors import StoreError
from store.format import RANDOM_WEIGHTS_NOTICE
from store.reader import open_store
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


def test_secrets_in_the_address_of_the_store_are_in_no_file_of_a_run(
    make_store, make_config, tmp_path, train_log
):
    (tmp_path / "signed?token=s3cr3t").mkdir()
    make_store("signed?token=s3cr3t/store.zarr")
    address = f"file://{tmp_path}/signed?token=s3cr3t/store.zarr"
    config = make_config(address, epochs=1, control=True)
    run_training(config)
    for file in config.out.rglob("*"):
        if file.is_file():
            assert b"s3cr3t" not in file.read_bytes(), file
    recorded = json.loads((config.out / "config.json").read_text())
    assert "token=***" in recorded["options"]["store"]
    assert "token=***" in recorded["store"]["path"]
    with pytest.raises(StoreError, match="the password was left out when this address was recorded"):
        open_store(recorded["store"]["path"])
    run_training(config.replace(resume=True, epochs=2))


@pytest.mark.parametrize(
    "place", ["train.data.images.decode", "train.distill.projector.DistilledStudent.forward"]
)
def test_images_per_second_count_waiting_for_data_and_computing(make_store, make_config, monkeypatch, place):
    """A wait in either place bounds the rate: no more images than waits allow, whatever the machine does."""
    import importlib
    import time

    holder, _, name = place.rpartition(".")
    try:
        owner = importlib.import_module(holder)
    except ModuleNotFoundError:
        module, _, kind = holder.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    plain = getattr(owner, name)
    wait_s = {"decode": 0.01, "forward": 0.08}[name]  # of an image, of a batch of 8

    def slow(*arguments, **options):
        time.sleep(wait_s)
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, slow)
    config = make_config(make_store(train=24), epochs=2)
    summary = run_training(config)
    assert 0 < summary["images_per_second"] <= 100
    assert summary["images_per_second"] >= 48 / summary["wall_time_s"]
