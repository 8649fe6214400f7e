"""Losses and metrics of a student on a split; every sample counts once, however many ranks there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from train.data.batches import Batch
from train.distill.objective import Objective, Targets
from train.distill.projector import DistilledOutput, DistilledStudent
from train.ranks import add_counts, sum_over_ranks
from train.tasks import Meter


@torch.no_grad()
def evaluate(
    module: DistilledStudent,
    batches: Iterable[Batch],
    objective: Objective,
    device: torch.device,
    normalize: Callable[[Tensor], Tensor],
    autocast: Callable[[], torch.autocast | object],
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means of the losses under `val_…` names, the task's metrics, and `cosine` where features are distilled.

    Only the end of it reads from the device (`means`, `metrics`); `add_up` never waits.
    """
    meter, sums = add_up(module, batches, objective, device, normalize, autocast, check_stop)
    meter.reduce()
    return {**sums.means(), **objective.task.metrics(meter)}


def add_up(
    module: DistilledStudent,
    batches: Iterable[Batch],
    objective: Objective,
    device: torch.device,
    normalize: Callable[[Tensor], Tensor],
    autocast: Callable[[], torch.autocast | object],
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[Meter, LossSums]:
    """The task's meter and the sums of the losses over all batches, on the device."""
    module.eval()
    meter, sums = objective.task.new_meter(device), LossSums(device)
    for batch in batches:
        check_stop()
        targets = objective.prepare(batch)
        counts = add_counts([targets.counts])
        with autocast():  # type: ignore[attr-defined]
            output = module(normalize(batch.images), batch.lengths)
        sums.add(objective.losses(output, batch, targets, counts), batch, cosine(output, targets))
        objective.task.update(meter, output, batch)
    return meter, sums


class LossSums(Meter):
    """Σ loss · samples by name, Σ samples, and the cosine to the targets with its weight."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(3, device)
        self.losses: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Tensor], batch: Batch, similarity: tuple[Tensor, Tensor] | None) -> None:
        own = batch.weight.sum().double()
        samples = sum_over_ranks(own)
        # Zeros on the same device as the weights: a scalar on the CPU cannot be stacked with sums on a GPU.
        total, weight = similarity or (own.new_zeros(()), own.new_zeros(()))
        self.sums += torch.stack([own, total.double(), weight.double()])
        for name, value in losses.items():
            # A loss is this rank's part of the batch's mean already: summed over ranks it is the mean.
            self.losses[name] = self.losses.get(name, torch.zeros_like(samples)) + value.double() * samples

    def means(self) -> dict[str, float]:
        self.reduce()
        samples, total, weight = self.sums.tolist()
        means = {
            f"val_{name}": float(sum_over_ranks(value)) / max(samples, 1.0)
            for name, value in self.losses.items()
        }
        return {**means, **({"cosine": total / weight} if weight else {})}


def cosine(output: DistilledOutput, targets: Targets) -> tuple[Tensor, Tensor] | None:
    """Σ weight · cosine between aligned student features and standardized targets, and Σ weight; None without."""
    for student, target, weight in (
        (output.cells, targets.cells, targets.cell_weight),
        (output.pooled, targets.pooled, targets.pooled_weight),
    ):
        if (
            student is not None
            and target is not None
            and weight is not None
            and student.shape == target.shape
        ):
            similarity = functional.cosine_similarity(student.float(), target, dim=-1)
            return (similarity * weight).sum(), weight.sum()
    return None
