"""Distillation of class probabilities.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015: T² keeps the gradient's size
independent of the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from train.distill.losses.feature import weighted_mean
from train.distill.losses.precision import full_precision


def logit_divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of every row: logits [B, Cs] and [B, Ct] → float32 [B].

    A head wider than the teacher's classes is allowed: the teacher gives the extra classes probability 0.
    Raises ValueError for a narrower head or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    extra = student.shape[-1] - teacher.shape[-1]
    if extra < 0 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student.shape)} do not cover teacher logits {tuple(teacher.shape)}"
        )
    with full_precision(student):
        log_student = (student.float() / temperature).log_softmax(-1)
        wide = functional.pad(teacher.detach().float() / temperature, (0, extra), value=float("-inf"))
        probabilities = wide.softmax(-1)
        terms = torch.xlogy(probabilities, probabilities) - probabilities * log_student
        return terms.sum(-1) * temperature**2


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Weighted mean over samples of `logit_divergences`; scalar float32. Rows of weight 0 may hold NaN."""
    if weight is not None:
        teacher = torch.where(weight.unsqueeze(-1) > 0, teacher, 0.0)
    return weighted_mean(logit_divergences(student, teacher, temperature), weight, normalizer)
