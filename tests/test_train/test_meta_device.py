"""No training step mixes devices or makes the host wait: every student, loss and mixing runs on the meta device."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import pytest
import torch

from tests.test_train.meta_steps import (
    META,
    DeviceTraffic,
    host_batch,
    make_loop,
    make_objective,
    make_plan,
    meta_student,
)
from train.distill.projector import DistilledStudent
from train.loop.evaluate import add_up

#: Small models with the parts of the real ones: residual blocks, tokens, depthwise convolutions.
IMAGES = ("timm:test_resnet", "timm:test_vit", "timm:test_efficientnet")
FAMILIES = ("resnet18", "vit-tiny", "timm:mobilenetv3_small_050")
MIXINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "mixup": {"mixup_alpha": 0.4},
    "cutmix": {"cutmix_alpha": 1.0},
}
PAIRS = (("cosine", "none"), ("mse", "mixup"), ("smooth_l1", "cutmix"), ("relation", "none"))
LOSSES = ("mse", "cosine", "smooth_l1", "relation")


@cache
def student_of(name: str, num_classes: int = 3, **options: Any) -> Any:
    return meta_student(name, num_classes, **options)


def run_step(
    student: Any, plan: Any, micro_batches: int = 1, loss: str = "mse", **options: Any
) -> DeviceTraffic:
    """A step of `micro_batches` and the validation sums: all that happens between two readings."""
    objective = make_objective(student, plan, loss_type=loss)
    loop = make_loop(student, objective, plan, **options)
    group = []
    for _ in range(micro_batches):
        batch = host_batch(student, plan)
        batch.transport = objective.transport(batch)
        group.append(batch)
    on_device = [batch.to(META) for batch in group]
    with DeviceTraffic() as traffic:
        loop.step(on_device)
    steps = loop.parts.progress.global_step, len(loop.unread)
    assert steps == (1, 1)
    assert loop.unread[0].values.device == META
    module: DistilledStudent = loop.parts.module
    with torch.no_grad(), DeviceTraffic():
        meter, sums = add_up(module, on_device, objective, META, loop.parts.normalize, contextlib.nullcontext)
    assert meter.sums.device == sums.sums.device == META
    return traffic


@pytest.mark.parametrize("kind", ["none", "feature", "logit", "hybrid"])
@pytest.mark.parametrize("name", IMAGES)
def test_classifiers(name: str, kind: str) -> None:
    student = student_of(name)
    losses = LOSSES if kind == "feature" else ("cosine",)  # hybrid is the sum of feature and logit
    for loss in losses:
        for mixing, options in MIXINGS.items():
            if mixing != "none" and loss == "relation":
                continue  # refused by train.distill.resolve
            if name != IMAGES[0] and kind == "feature" and (loss, mixing) not in PAIRS:
                continue  # losses see no difference between students: one tries all combinations
            cells = {"cells": False} if mixing == "cutmix" or loss == "relation" else {}
            traffic = run_step(student, make_plan(student, kind, **cells), loss=loss, **options)
            # The partners of the batch, nothing else.
            assert traffic.to_device == (0 if mixing == "none" else 1), (name, kind, loss, mixing)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    student = student_of(name)
    traffic = run_step(student, make_plan(student, "hybrid"), micro_batches=2, loss="cosine", mixup_alpha=0.4)
    assert traffic.to_device == 2


@pytest.mark.parametrize("kind", ["none", "feature"])
def test_segmentation(kind: str) -> None:
    student = student_of("unet/small")
    for loss in ("mse", "cosine") if kind == "feature" else ("mse",):
        traffic = run_step(student, make_plan(student, kind), loss=loss)
        assert traffic.to_device == 0


@pytest.mark.parametrize(("freeze", "cells"), [(False, True), (True, True), (False, False)])
def test_clips(freeze: bool, cells: bool) -> None:
    student = student_of("lstm/small", freeze_encoder=freeze, attention_pooling=freeze)
    plan = make_plan(student, "hybrid", frames=True, cells=cells, pooled=True, grid=False)
    traffic = run_step(student, plan)
    # The mask of the frames for the student and for the head, their places, the order and its inverse.
    assert traffic.to_device == 5


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_features_alone(name: str) -> None:
    student = student_of(name, 0)
    for loss in ("mse", "relation"):
        plan = make_plan(student, "feature", **({"cells": False} if loss == "relation" else {}))
        assert run_step(student, plan, loss=loss).to_device == 0


@pytest.mark.parametrize("grid", [True, False])
def test_recorded_views(grid: bool) -> None:
    student = student_of("timm:test_resnet")
    plan = make_plan(student, "feature", recorded=True, grid=grid, cells=grid)
    assert run_step(student, plan).to_device == 0
