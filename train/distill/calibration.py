"""The weight of the feature term, found from gradients in the first steps of a training.

A distance is a mean over a thousand standardized channels. How large its gradient is compared with the task's depends on
student, loss and task: a thirtieth on the last layer of a ResNet (mse, clothing photos), ten times as large on the bottleneck of a
U-Net (cosine, CamVid). So the weight that balances them is measured: on the last layer that both reach, the feature term's
gradient is to be SHARE times that of the task and logit terms together.

The measurements are sums over all micro-batches and ranks of a step, and their geometric mean is part of the run's state,
so a resumed run has the same weight, and so has one of other ranks or micro-batches up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.distill.losses import repeatable_backward
from train.ranks import sum_over_ranks

#: Norm of the weighted feature term's gradient over that of the task and logit terms, at weights 1. For classifiers it comes to
#: a weight of about 20, which an ablation chose (benchmarks/learning.py --ablation).
SHARE = 0.75
#: At most so many steps are measured, and at most one of STEPS_PER_MEASUREMENT: a measurement costs up to a step.
MEASUREMENTS, STEPS_PER_MEASUREMENT = 8, 50
#: Gradients in half precision are computed from losses that are larger by this factor.
HALF_PRECISION_FACTOR = 1024.0


def measurements_of(steps: int) -> int:
    """How many of a training's steps are measured."""
    return min(MEASUREMENTS, max(1, steps // STEPS_PER_MEASUREMENT))


@dataclass
class CalibrationState:
    """What was measured so far: the sum of the logarithms of `count` ratios."""

    count: int = 0
    log_ratio: float = 0.0

    @property
    def weight(self) -> float:
        """The feature term's weight; 1 before anything was measured."""
        return SHARE * math.exp(self.log_ratio / self.count) if self.count else 1.0


class Calibration:
    """Measures steps until there are enough of them. `parameters`: of the student without its head, in their order."""

    def __init__(
        self, state: Callable[[], CalibrationState], parameters: Iterable[nn.Parameter], steps: int
    ) -> None:
        self.state = state
        self.parameters = [value for value in parameters if value.requires_grad and value.ndim >= 2]
        self.wanted = measurements_of(steps)
        self.shared: nn.Parameter | None = None
        self.sums: list[Tensor] = []

    @property
    def measures(self) -> bool:
        """Whether the next step is to be measured."""
        return self.state().count < self.wanted

    def add(self, feature: Tensor, others: Tensor | None) -> None:
        """Add the gradients of a micro-batch's terms, before its backward pass. Scalars with gradient; None: no other term."""
        if others is None or not others.requires_grad or not feature.requires_grad:
            return
        with repeatable_backward():
            if self.shared is None:
                self.shared = self.last_shared(feature, others)
            if self.shared is None:
                return
            found = [self.gradient(term, self.shared) for term in (feature, others)]
        gradients = [value for value in found if value is not None]
        if len(gradients) < len(found):
            return
        self.sums = [a + b for a, b in zip(self.sums, gradients, strict=True)] if self.sums else gradients

    def last_shared(self, feature: Tensor, others: Tensor) -> nn.Parameter | None:
        """The last parameter that both terms depend on."""
        for parameter in reversed(self.parameters):
            if all(self.gradient(term, parameter) is not None for term in (feature, others)):
                return parameter
        return None

    def gradient(self, term: Tensor, parameter: nn.Parameter) -> Tensor | None:
        (found,) = torch.autograd.grad(
            term * HALF_PRECISION_FACTOR, parameter, retain_graph=True, allow_unused=True
        )
        return None if found is None else found.float()

    def finish(self) -> None:
        """The step's micro-batches are complete: take the ratio of their gradients into the mean.

        A step whose gradients vanish or overflow (no labeled sample, no cell that the teacher saw) does not count.
        """
        sums, self.sums = self.sums, []
        if not sums:
            return
        norms = torch.stack([sum_over_ranks(value).norm() for value in sums])
        feature, others = norms.tolist()
        if min(feature, others) > 0 and math.isfinite(feature) and math.isfinite(others):
            state = self.state()
            state.count += 1
            state.log_ratio += math.log(others / feature)


def other_terms(terms: Mapping[str, Tensor], weight_of: Callable[[str], float]) -> Tensor | None:
    """The task's and the logits' term together, relative to each other as `weight_of` says; None without any."""
    found = [weight_of(name) * terms[name] for name in ("hard_loss", "logit_loss") if name in terms]
    return torch.stack(found).sum() if found else None
