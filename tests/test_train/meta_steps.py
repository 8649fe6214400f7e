"""Training steps on the meta device: no arithmetic, but devices, shapes, dtypes and host synchronizations are checked.

Mixing devices raises there, and so does everything that would make the host wait for a GPU: `.item()`, `.tolist()`,
`bool()`, `nonzero`, boolean indexing, a copy to the host. `DeviceTraffic` checks what the meta device lets pass.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from store.format import FRAMES, GRID, POOLED, VIEWS_GRID, VIEWS_POOLED
from train.config import load_config
from train.data.batches import Batch
from train.distill.objective import DistillationPlan, Objective, build_standardizers
from train.distill.projector import DistilledStudent, Projector
from train.loop.loop import Loop, Parts, TrainingState, build_normalizer
from train.loop.optimizer import WeightAverage, build_optimizer
from train.loop.saving import StepGuard
from train.students.build import build_student
from train.tasks import build_task

META = torch.device("meta")
WIDTH, GRID_SIDE, CLASSES, SIDE = 12, 4, 3, 32
#: Operators that take lengths from the host by design.
HOST_LENGTHS = ("_pack_padded_sequence", "_pad_packed_sequence", "lstm")


class DeviceTraffic(TorchDispatchMode):
    """Counts copies from host to device, and refuses operators that mix the two otherwise.

    A CPU index into a GPU tensor works in PyTorch, but is copied with a synchronization first.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device_type = device.type
        self.to_device = 0
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == self.device_type]
        on_host = [tensor for tensor in tensors if tensor.device.type != self.device_type]
        out = func(*args, **(kwargs or {}))
        if name == "copy_" and on_device and on_host:
            assert args[0].device.type == self.device_type, "a copy from the device to the host"
            self.to_device += 1
        elif name == "_to_copy" and on_host and out.device.type == self.device_type:
            self.to_device += 1
        elif on_device and any(tensor.ndim for tensor in on_host) and not name.startswith(HOST_LENGTHS):
            raise AssertionError(f"{name} mixes tensors of the host and of the device")
        if on_device:
            self.operators[name] += 1
        return out


class PlainAccelerator:
    """What the loop asks of accelerate, for a device that accelerate does not know."""

    device, scaler, process_index, num_processes = META, None, 0, 1

    def no_sync(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)


def meta_student(name: str, num_classes: int = CLASSES, **options: Any) -> Any:
    """A student whose parameters are on the meta device."""
    with META:
        return build_student(name, num_classes=num_classes, image_size=SIDE, **options).to(META)


def statistics_of_a_split() -> Any:
    """What targets are standardized with; a scale as stored features have."""
    found = SimpleNamespace(mean=np.zeros(WIDTH), std=np.ones(WIDTH))
    names = (GRID, POOLED, FRAMES)
    return SimpleNamespace(
        path="split", statistics=dict.fromkeys(names, found), scale={GRID: np.ones(WIDTH, np.float32)}
    )


def make_plan(student: Any, kind: str, **options: Any) -> DistillationPlan | None:
    """A plan as `train.distill.resolve` would make it for a store with grids and logits."""
    if kind == "none":
        return None
    features = kind != "logit"
    settings: dict[str, Any] = {
        "pooled": features,
        "cells": features and student.spec.feature_kind == "map",
        "grid": features,
        "logits": "probe" if kind in ("logit", "hybrid") else None,
    }
    return DistillationPlan(**settings | options)


def host_batch(student: Any, plan: DistillationPlan | None, *, size: int = 6, frames: int = 4) -> Batch:
    """A batch as the loader makes it: unlabeled and padding samples, crops, a mask, and whatever the plan needs."""
    clips = student.spec.feature_kind == "sequence"
    shape = (size, frames, SIDE, SIDE, 3) if clips else (size, SIDE, SIDE, 3)
    views = np.tile(np.array([[0.5, 0, 0.1], [0, 0.6, 0.2]]), (size, 1, 1))
    batch = Batch(
        np.arange(size),
        torch.zeros(shape, dtype=torch.uint8),
        views,
        torch.tensor([1.0] * (size - 1) + [0.0]),
        size - 1.0,
        labels=torch.tensor([-1] + [1] * (size - 1)),
        masks=torch.zeros(size, SIDE, SIDE, dtype=torch.uint8),
        lengths=torch.tensor([frames, 1, *[2] * (size - 2)]) if clips else None,
        recorded=np.zeros(size, np.int64) if plan is not None and plan.recorded else None,
    )
    if plan is not None:
        shapes = {GRID: (GRID_SIDE, GRID_SIDE, WIDTH), POOLED: (WIDTH,), "logits/probe": (CLASSES,)}
        shapes |= {VIEWS_GRID: shapes[GRID], VIEWS_POOLED: shapes[POOLED]}
        batch.features = {name: torch.zeros(size, *shapes[name], dtype=torch.float16) for name in plan.arrays}
        if plan.frames and plan.cells:
            batch.features["frames"] = torch.zeros(size, frames, WIDTH, dtype=torch.float16)
            batch.features["frame_mask"] = torch.ones(size, frames)
    return batch


def make_objective(
    student: Any, plan: DistillationPlan | None, rows: int = 6, *, loss_type: str = "mse"
) -> Objective:
    task = build_task(student.spec.task, num_classes=student.spec.num_classes, label_smoothing=0.1)
    if plan is None:
        return Objective(task)
    shapes = []
    if plan.cells and not plan.frames:
        shape = student.eval()(torch.zeros(1, 3, SIDE, SIDE, device=META)).features.shape
        shapes = [(int(shape[2]), int(shape[3]))]
    return Objective(
        task,
        plan,
        weights={"hard_loss": 1.0, "feature_loss": 0.5, "logit_loss": 0.5},
        loss_type=loss_type,
        standardizers=build_standardizers(plan, statistics_of_a_split(), META),
        teacher_views=np.tile(np.eye(2, 3), (rows, 1, 1)),
        cell_shapes=shapes,
    )


def make_loop(student: Any, objective: Objective, plan: DistillationPlan | None, **options: Any) -> Loop:
    """The loop around a student on the meta device; losses stay unread, as they do on a GPU."""
    distills = plan is not None and plan.features
    head = Projector(student.spec.feature_width, WIDTH).to(META) if distills else None
    module = DistilledStudent(
        student, head, cells=bool(plan and plan.cells), pooled=bool(plan and plan.pooled)
    )
    settings = {
        "student": "resnet18",
        "store": "store",
        "out": "run",
        "epochs": 3,
        "batch_size": 6,
        "feature_weight": 1.0,  # measuring one reads from the device
        **options,
    }
    config = load_config(settings)
    accelerator: Any = PlainAccelerator()
    batches = SimpleNamespace(slices=[slice(0, 6)] * 4, rows=range(24), balance=None)
    loader: Any = SimpleNamespace(batches=batches)
    loop = Loop(
        Parts(
            config=config,
            accelerator=accelerator,
            module=module,
            wrapped=module,
            optimizer=build_optimizer(module, "adamw", 1e-3, 0.01),
            objective=objective,
            val_objective=objective,
            train_loader=loader,
            val_loader=loader,
            normalize=build_normalizer(student, META),
            guard=StepGuard(module),
            progress=TrainingState(),
            average=WeightAverage(student, 0.9),
            stop=SimpleNamespace(requested=False),  # type: ignore[arg-type]
        )
    )
    loop.reads_late = True
    module.train()
    return loop
