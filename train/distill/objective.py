"""The loss of a run: task and distillation terms with their weights.

Every value is this process's part of the mean over all ranks and micro-batches of a step, so parts simply add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data.batches import Batch
from train.distill.mixing import Mixing
from train.distill.projector import DistilledOutput
from train.distill.targets import Distillation, Targets
from train.ranks import sum_over_ranks
from train.tasks.base import Task

TERMS = ("hard_loss", "feature_loss", "logit_loss")


class Objective:
    """total = `hard_weight` · task loss + `soft_weight` · (feature and logit terms with their own weights).

    `distillation` None: the task alone.
    """

    def __init__(
        self, task: Task, distillation: Distillation | None, hard_weight: float, soft_weight: float
    ) -> None:
        self.task, self.distillation = task, distillation
        self.hard_weight, self.soft_weight = hard_weight, soft_weight

    def prepare(self, batch: Batch) -> Targets:
        """Teacher targets in the geometry of the batch's views; empty without distillation."""
        return self.distillation.prepare(batch) if self.distillation is not None else Targets()

    def counts(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """What each term's sum is divided by, of this batch alone."""
        return {**self.task.counts(batch), **targets.counts()}

    def losses(
        self,
        output: DistilledOutput,
        batch: Batch,
        targets: Targets,
        counts: dict[str, Tensor],
        mixing: Mixing | None = None,
    ) -> dict[str, Tensor]:
        """`loss` (with gradient) and the named terms; scalars float32."""
        terms: dict[str, Tensor] = {}
        hard = self.task.loss(output, batch, counts, mixing)
        if hard is not None:
            terms["hard_loss"] = hard
        if self.distillation is not None:
            terms |= self.distillation.terms(output, targets, counts, mixing)
        loss = torch.stack([self.weight(name) * value for name, value in terms.items()]).sum()
        return {"loss": loss, **terms}

    def weight(self, term: str) -> float:
        """The weight of a term in the total."""
        if term == "hard_loss" or self.distillation is None:
            return self.hard_weight
        plan = self.distillation.plan
        return self.soft_weight * (plan.feature_weight if term == "feature_loss" else plan.logit_weight)


def add_counts(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Counts of one step: the sum over its micro-batches and all ranks."""
    names = sorted(parts[0])
    if not names:
        return {}
    local = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).sum(0)
    return dict(zip(names, sum_over_ranks(local).unbind(), strict=True))
