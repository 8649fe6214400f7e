"""What a task is: its loss on labels, and its metrics. Distillation is the same for all (`train.distill.objective`).

Tasks by name; each is imported when it is used. `B` samples, `C` classes, `H W` the student's input.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from train.data.batches import Batch
from train.distill.mixing import Mixing
from train.distill.projector import DistilledOutput
from train.ranks import sum_over_ranks

TASKS: dict[str, str] = {
    "classification": "train.tasks.classification:Classification",
    "sequence": "train.tasks.classification:SequenceClassification",
    "segmentation": "train.tasks.segmentation:Segmentation",
    "features": "train.tasks.features:Features",
}


def build_task(name: str, *, num_classes: int, label_smoothing: float) -> Any:
    """The task of that name."""
    module, attribute = TASKS[name].split(":")
    return getattr(importlib.import_module(module), attribute)(num_classes, label_smoothing)


class Meter:
    """Sums over a validation split, kept on the device in one vector of float64 (float32 where there is none)."""

    def __init__(self, size: int, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(size, dtype=kind, device=device)

    def reduce(self) -> None:
        """Add up all ranks; call once, at the end."""
        self.sums = sum_over_ranks(self.sums)


def count_classes(classes: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """How often each class occurs where `counted` is true: int64 and bool [N] → int64 [num_classes].

    What `bincount` gives, which on a GPU makes the host wait for the highest class.
    """
    zeros = torch.zeros(num_classes, dtype=torch.int64, device=classes.device)
    return zeros.scatter_add_(0, classes, counted.long())


class Task(Protocol):
    """One way to learn from labels. Which of its metrics counts is in `train.metrics.TASK_METRICS`."""

    name: str

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss's sums are divided by, known before the forward pass: scalars by name."""

    def loss(
        self, output: DistilledOutput, batch: Batch, counts: Mapping[str, Tensor], mixing: Mixing | None
    ) -> Tensor | None:
        """This process's part of the mean task loss over all ranks and micro-batches; None: nothing to learn."""

    def new_meter(self, device: torch.device) -> Meter:
        """An empty meter for one validation."""

    def update(self, meter: Meter, output: DistilledOutput, batch: Batch) -> None:
        """Count a batch; samples of weight 0 do not count."""

    def metrics(self, meter: Meter) -> dict[str, float]:
        """Metrics of a reduced meter: fractions of 1 by name, and detail under names that start with `per_class_`."""
