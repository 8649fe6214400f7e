"""The control of a sweep is the control of `cli train --control`: the same images, weights and schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from train.checkpoint import load_checkpoint
from train.config import load_config
from train.data.splits import resolve_data, resolve_task
from train.loop.assemble import build_training
from train.loop.machine import build_accelerator
from train.run import run_training
from train.sweep.config import load_sweep_config, plan_trials

SIZE = {"image_size": 32, "batch_size": 8, "epochs": 1, "workers": 0, "device": "cpu", "learning_rate": 1e-3}
IMAGE_STORES = {
    "grid": {},
    "pooled": {"grid": 0},
    "views": {"views": 2},
    "pooled views": {"views": 2, "grid": 0},
    "letterbox": {"resize": "letterbox"},
}
VARIED = [
    {},
    {"distillation_type": ["logit"]},
    {"distillation_type": ["none"]},
    {"feature_target": ["pooled"]},
    {"feature_loss_type": ["relation"]},
    {"views": ["random"]},
]


def built(config: Any, *, control: bool = False) -> Any:
    from processes.stop import StopRequest

    store = open_store(config.store)
    data = resolve_data(config, store, resolve_task(config))
    return build_training(config, store, data, build_accelerator(config), StopRequest(), control=control)


def planned(store: Path, tmp_path: Path, student: str, varied: dict[str, Any]) -> tuple[Any, Any]:
    """(the configuration of a distilled trial, that of its control) as the worker starts them."""
    values = {"store": str(store), "out": tmp_path, "students": [student], "options": SIZE, "set": varied}
    trials = plan_trials(load_sweep_config(values), "f")
    (trial,) = (trial for trial in trials if not trial.is_control)
    (control,) = (other for other in trials if other.name == trial.control_name)
    return tuple(
        load_config({"store": str(store), "out": tmp_path / item.name, **item.options})
        for item in (trial, control)
    )


def assert_same_control(store: Path, tmp_path: Path, student: str, varied: dict[str, Any]) -> None:
    distilled, control = planned(store, tmp_path, student, varied)
    assert control.control_only
    ours, theirs = built(control, control=True), built(distilled)
    assert ours.augmentation == theirs.augmentation
    assert shown(ours) == shown(theirs)
    assert not ours.parts.objective.plan.anything
    assert ours.parts.objective.weights["hard_loss"] == 1.0
    for name, value in theirs.student.state_dict().items():
        assert torch.equal(ours.student.state_dict()[name], value)


def shown(training: Any) -> Any:
    """The view settings of the training images."""
    return training.parts.train_loader.loader.dataset.settings


@pytest.mark.parametrize(
    ("kind", "varied"),
    [("grid", VARIED[1]), ("pooled", VARIED[0]), *[("pooled views", varied) for varied in VARIED]],
    ids=str,
)
def test_view_settings_of_images(make_store: Any, tmp_path: Path, kind: str, varied: Any) -> None:
    store = make_store(logits=True, **IMAGE_STORES[kind])
    assert_same_control(store, tmp_path, "timm:test_resnet", varied)


@pytest.mark.parametrize("kind", IMAGE_STORES)
@pytest.mark.parametrize("student", ["timm:test_resnet", "timm:test_vit", "unet/small"])
def test_view_settings_of_student_families(make_store: Any, tmp_path: Path, kind: str, student: str) -> None:
    assert_same_control(make_store(masks=True, **IMAGE_STORES[kind]), tmp_path, student, {})


@pytest.mark.parametrize("varied", [{}, {"distillation_type": ["none"]}], ids=str)
def test_view_settings_of_clips(clip_store: Path, tmp_path: Path, varied: Any) -> None:
    (clip_store.parent / "sweep").mkdir()
    settings = {**varied, "batch_size": [2]}
    values = {**SIZE}
    del values["batch_size"]
    store, out = str(clip_store), clip_store.parent / "sweep"
    trials = plan_trials(
        load_sweep_config(
            {"store": store, "out": out, "students": ["lstm/small"], "options": values, "set": settings}
        ),
        "f",
    )
    configs = [load_config({"store": store, "out": out / item.name, **item.options}) for item in trials]
    control, distilled = (built(config, control=config.control_only) for config in configs)
    assert control.augmentation == distilled.augmentation == ("full" if varied else "mild")
    assert shown(control) == shown(distilled)


def test_trials_that_are_shown_other_images_have_controls_of_their_own(tmp_path: Path) -> None:
    values = {"store": "x", "out": tmp_path, "students": ["resnet18"]}
    varied = {"distillation_type": ["feature", "hybrid", "logit"], "views": ["auto", "random"]}
    trials = plan_trials(load_sweep_config({**values, "set": varied}), "f")
    controls = {
        (trial.options["distillation_type"] == "logit", trial.options["views"]): trial.control_name
        for trial in trials
        if not trial.is_control
    }
    assert len(controls) == len(set(controls.values())) == 4


@pytest.mark.parametrize("kind", ["grid", "pooled", "pooled views"])
def test_a_sweep_trains_the_control_of_cli_train(make_store: Any, tmp_path: Path, kind: str) -> None:
    distilled, control = planned(make_store(**IMAGE_STORES[kind]), tmp_path, "timm:test_resnet", {})
    run_training(distilled.replace(control=True))
    run_training(control)
    first, second = (
        load_checkpoint(folder / "last.pt")["model_state_dict"]
        for folder in (distilled.out / "control", control.out)
    )
    for name, value in first.items():
        np.testing.assert_array_equal(value.numpy(), second[name].numpy())
    resolved = json.loads((control.out / "config.json").read_text())["resolved"]
    assert resolved["distilled"] is None
