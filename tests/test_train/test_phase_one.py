"""`--pretrain-epochs`: the features of all samples first, then the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from processes.stop import Stopped
from store.reader import open_store
from tests.test_train.test_resume import StopAfter, assert_same, records
from train.checkpoint import load_checkpoint
from train.config import load_config
from train.errors import ConfigError, TrainError
from train.events import Event, PhaseOneEpochEnded
from train.phase_one import phase_one_config, phase_one_key
from train.report.build import build_report
from train.run import run_training
from train.run_folder import RunFolder
from train.students.build import build_student
from train.sweep.config import SweepConfig

TWO_PHASES = {"pretrain_epochs": 2, "epochs": 2, "seed": 3}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_phases_are_in_one_run(make_store, make_config):
    store = make_store(unlabelled=tuple(range(2, 8)))
    config = make_config(store, **TWO_PHASES, control=True, distillation_type="feature")
    heard: list[Event] = []
    summary = run_training(config, [heard.append])
    in_phase_one = [event for event in heard if isinstance(event, PhaseOneEpochEnded)]
    assert [(event.record["epoch"], event.epochs) for event in in_phase_one] == [(1, 2), (2, 2)]
    assert [(line.get("phase"), line["epoch"]) for line in lines(config.out)] == [
        ("pretrain", 1),
        ("pretrain", 2),
        (None, 1),
        (None, 2),
    ]
    assert [line["epoch"] for line in RunFolder(config.out).read_records()] == [1, 2]
    assert summary["pretrain"]["epochs"] == 2
    assert summary["pretrain"]["samples"] == 24, "the rows without a label are learned from as well"
    assert -1 <= summary["pretrain"]["metrics"]["cosine"] <= 1
    assert summary["epochs_done"] == 2
    assert load_checkpoint(config.out / "last.pt")["training"]["progress"]["global_step"] == 6
    assert load_checkpoint(config.out / "control/last.pt")["training"]["progress"]["global_step"] == 6
    control = lines(config.out / "control")
    assert [line["epoch"] for line in control] == [1, 2], "as many epochs on the labels, and no phase one"
    assert list((config.out / "pretrain/tensorboard").iterdir())
    page = build_report([config.out], config.out / "report.html", samples=0).path.read_text()
    assert "Phase one: the teacher" in page


def test_phase_two_starts_from_what_phase_one_learned(make_store, make_config):
    """With a learning rate of almost zero phase two ends where phase one ended, head aside."""
    store = make_store()
    config = make_config(store, pretrain_epochs=1, epochs=1, learning_rate=1e-12, weight_decay=0.0)
    run_training(config)
    first = load_checkpoint(config.out / "pretrain/best.pt")
    second = load_checkpoint(config.out / "best.pt")
    weights = {
        k: v for k, v in first["model_state_dict"].items() if v.is_floating_point() and "running" not in k
    }
    assert weights
    for name, value in weights.items():
        torch.testing.assert_close(second["model_state_dict"][name], value, atol=1e-6, rtol=0)
    for name, value in first["alignment_head"].items():
        torch.testing.assert_close(second["alignment_head"][name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("looks", [(3, 100), (2, 9, 100), (12, 100)])
def test_stopped_in_either_phase_equals_uninterrupted(tmp_path, make_store, make_config, looks):
    options = {"store": make_store(train=27), "batch_size": 6, "ema_decay": 0.9, "dropout": 0.2, **TWO_PHASES}
    run_training(make_config(**options, out=tmp_path / "whole"))
    stops = 0
    for count in looks:
        try:
            run_training(make_config(**options, out=tmp_path / "parts", resume=True), stop=StopAfter(count))
        except Stopped:
            stops += 1
    assert stops == len(looks) - 1
    left, right = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert_same(left["model_state_dict"], right["model_state_dict"], "weights")
    assert_same(left["training"]["optimizer"]["state"], right["training"]["optimizer"]["state"], "optimizer")
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_resume_with_another_number_of_phase_one_epochs_is_refused(make_store, make_config):
    store = make_store()
    with pytest.raises(Stopped):
        run_training(make_config(store, **TWO_PHASES), stop=StopAfter(3))
    with pytest.raises(ConfigError, match="pretrain_epochs 2 → 3"):
        run_training(make_config(store, **{**TWO_PHASES, "pretrain_epochs": 3}, resume=True))
    with pytest.raises(ConfigError, match="holds a run already"):
        run_training(make_config(store, **TWO_PHASES))


def test_what_phase_one_cannot_do_is_one_line(make_store, make_config):
    with pytest.raises(ConfigError, match="task features learns the features already"):
        run_training(make_config(make_store(), pretrain_epochs=1, task="features"))
    with pytest.raises(
        TrainError, match=r"classification needs class labels .* unlabeled rows only: use --task feat"
    ):
        run_training(make_config(make_store("b.zarr", unlabelled=tuple(range(24))), pretrain_epochs=1))
    with pytest.raises(ConfigError, match="pretrain_image_size has no effect without --pretrain-epochs"):
        make_config(make_store("c.zarr"), pretrain_image_size=64)


def test_no_features_are_nothing_to_learn(make_store, make_config, monkeypatch):
    """Every store of `cli extract` has pooled features: one without is another program's."""
    from store.reader import Split

    store = make_store()
    monkeypatch.setattr(Split, "names", property(lambda split: ["targets/label", "valid"]))
    with pytest.raises(
        ConfigError, match=r"pretrain_epochs 1: .* has no features to learn: extract it again"
    ):
        run_training(make_config(store, pretrain_epochs=1))


def test_unet_learns_encoder_and_decoder(make_store, make_config):
    """From masks that are all void but one, too."""
    store = make_store(masks=True, labels=False)
    config = make_config(store, student="unet/small", pretrain_epochs=1, epochs=1, learning_rate=1e-12)
    torch.manual_seed(0)
    run_training(config)
    learned = load_checkpoint(config.out / "pretrain/best.pt")["model_state_dict"]
    start = build_initial(config)
    for part in ("encoder.0", "encoder.4", "decoder.0", "decoder.3", "up.0"):
        moved = [
            k
            for k in learned
            if k.startswith(part) and k.endswith("weight") and not torch.equal(learned[k], start[k])
        ]
        assert moved, f"{part} has not learned"


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_the_recipe_of_a_unet_keeps_its_weights_alive(make_store, make_config, caplog, optimizer):
    """The decay of plain Adam outweighs what the features say: 18 steps take most of the decoder to 0."""
    options = {} if optimizer is None else {"optimizer": optimizer}
    config = make_config(
        make_store(),
        student="unet/small",
        task="features",
        epochs=6,
        learning_rate=3e-3,
        image_size=16,
        lr_scheduler="constant",
        **options,
    )
    with caplog.at_level("INFO"):
        run_training(config)
    learned, start = load_checkpoint(config.out / "last.pt")["model_state_dict"], build_initial(config)
    kept = [
        float(learned[name].norm() / start[name].norm())
        for name in ("encoder.4.3.weight", "decoder.0.3.weight", "decoder.1.3.weight")
    ]
    assert (min(kept) > 0.9) == (optimizer is None), kept
    assert ("use --optimizer adamw" in caplog.text) == (optimizer == "adam")


def build_initial(config) -> dict[str, torch.Tensor]:
    from train.loop.assemble import STUDENT_SEED
    from train.loop.loop import derive_seed

    torch.manual_seed(derive_seed(config.seed, STUDENT_SEED))
    return build_student(config.student, num_classes=0, image_size=config.image_size).state_dict()


def test_without_a_grid_the_decoder_rests(make_store, make_config):
    config = make_config(make_store(grid=0), student="unet/small", task="features", epochs=1)
    summary = run_training(config)
    assert 0 < summary["trainable_parameters"] < summary["parameters"]


@pytest.mark.slow
def test_clips_learn_in_phase_one(clip_store, make_config):
    config = make_config(
        clip_store, student="lstm/small", batch_size=3, image_size=32, pretrain_epochs=1, epochs=1
    )
    summary = run_training(config)
    assert summary["pretrain"]["metrics"]["cosine"] is not None
    assert summary["metrics"]["top1"] is not None


def test_runs_that_differ_in_phase_two_alone_share_phase_one(tmp_path, make_store, make_config, train_log):
    store, cache = make_store(), tmp_path / "cache"
    options = {**TWO_PHASES, "pretrain_cache": cache}
    run_training(make_config(store, **options, out=tmp_path / "a"))
    run_training(make_config(store, **options, out=tmp_path / "b", learning_rate=2e-3, temperature=2.0))
    assert "phase one: taken from" in train_log.text
    assert len(list(cache.glob("*/best.pt"))) == 1
    run_training(make_config(store, **options, out=tmp_path / "c", batch_size=6))
    assert len(list(cache.glob("*/best.pt"))) == 2
    run_training(make_config(store, **TWO_PHASES, out=tmp_path / "alone"))
    assert records(tmp_path / "a") == records(tmp_path / "alone"), "a shared phase one changes nothing"
    assert [line.get("phase") for line in lines(tmp_path / "b")] == ["pretrain", "pretrain", None, None]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"learning_rate": 0.5}, True),
        ({"epochs": 9, "soft_label_weight": 2.0, "label_smoothing": 0.1, "lora_rank": 0}, True),
        ({"workers": 1, "tracker": "mlflow"}, True),
        ({"seed": 5}, False),
        ({"pretrain_epochs": 5}, False),
        ({"pretrain_learning_rate": 0.5}, False),
        ({"image_size": 48}, False),
        ({"feature_loss_type": "cosine"}, False),
    ],
)
def test_the_key_of_phase_one(make_store, make_config, change, same):
    path = make_store()
    store = open_store(path)
    base = {"pretrain_epochs": 2}
    one = phase_one_key(make_config(path, **base), store)
    other = phase_one_key(make_config(path, **{**base, **change}), store)
    assert (one == other) is same


def test_its_own_image_size_and_schedule(make_store, make_config):
    config = make_config(
        make_store(), pretrain_epochs=1, epochs=1, pretrain_image_size=48, pretrain_learning_rate=5e-3
    )
    run_training(config)
    first, second = lines(config.out)
    assert first["learning_rate"] == pytest.approx(5e-3, rel=0.9)
    assert first["learning_rate"] > config.learning_rate > second["learning_rate"] / 2
    assert load_checkpoint(config.out / "pretrain/best.pt")["student"]["image_size"] == 48
    assert load_checkpoint(config.out / "best.pt")["student"]["image_size"] == 32


def test_phase_one_config_has_no_options_of_phase_two():
    config = load_config(
        {"store": "s", "student": "yolov8n", "out": "o", "pretrain_epochs": 3, "yolo_settings": "mosaic=0"}
    )
    ours = phase_one_config(config, 3)
    assert (ours.task, ours.epochs, ours.optimizer) == ("features", 3, "adamw")
    assert ours.yolo_settings == ""


@pytest.mark.slow
def test_yolo_learns_backbone_and_neck_without_boxes(tmp_path, make_store, yolo_store):
    """A label-free run of a store without boxes, then phase one and two of a detection store, then its weights."""
    pytest.importorskip("ultralytics")
    from tests.test_train.yolo_runs import make_config as yolo_config

    free = tmp_path / "free"
    run_training(
        load_config(
            {
                "store": make_store(labels=False),
                "student": "yolov8n",
                "task": "features",
                "out": free,
                "epochs": 1,
                "batch_size": 8,
                "image_size": 64,
                "workers": 0,
            }
        )
    )
    state = load_checkpoint(free / "best.pt")["model_state_dict"]
    assert any(name.startswith("network.model.21.") for name in state)
    assert not any(name.startswith("network.model.22.") for name in state), (
        "the Detect head is not part of it"
    )

    out = tmp_path / "two"
    summary = run_training(yolo_config(yolo_store, out, pretrain_epochs=1, epochs=1, control=True))
    assert summary["pretrain"]["metrics"]["cosine"] is not None
    assert [line.get("phase") for line in lines(out)] == ["pretrain", None]
    assert not (out / "control/pretrain").exists()

    started = yolo_config(yolo_store, tmp_path / "three", epochs=1, student_path=free / "best.pt")
    assert run_training(started)["epochs_done"] == 1


def test_trials_of_a_sweep_share_phase_one(tmp_path):
    from train.sweep.config import Trial
    from train.sweep.driver import Cores, order

    config = SweepConfig(store="s.zarr", out=tmp_path / "sweep", students=["resnet18"])
    cores = Cores(1, {})
    with_phase_one = order(config, Trial("a", {"pretrain_epochs": 3}, False, None), cores)
    assert with_phase_one["options"]["pretrain_cache"] == str(tmp_path / "sweep/pretrain")
    for options in ({}, {"pretrain_epochs": 0}):
        assert "pretrain_cache" not in order(config, Trial("b", options, False, None), cores)["options"]


def test_a_detection_store_without_labels_names_the_next_step(tmp_path, yolo_store, monkeypatch):
    pytest.importorskip("ultralytics")
    from tests.test_train.yolo_runs import make_config as yolo_config

    monkeypatch.setattr(
        "train.yolo.dataset.unlabeled_rows", lambda split, kind: np.ones(len(split), dtype=bool)
    )
    with pytest.raises(TrainError, match="no image of split 'train' is labeled: use --task features"):
        run_training(yolo_config(yolo_store, tmp_path / "out", epochs=1))
