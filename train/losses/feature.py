"""Distances between student features and stored teacher features.

All arithmetic is float32 whatever the autocast state, and no gradient flows into targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from train.losses.precision import full_precision

FEATURE_LOSSES = ("mse", "cosine", "smooth_l1", "relation")


def _mse(student: Tensor, target: Tensor) -> Tensor:
    return (student - target).square().mean(-1)


def _cosine(student: Tensor, target: Tensor) -> Tensor:
    # torch's cosine_similarity makes normalised copies of both sides and costs twice as much, forward and backward.
    lengths = [torch.linalg.vector_norm(side, dim=-1).clamp_min(1e-8) for side in (student, target)]
    return 1.0 - (student * target).sum(-1) / (lengths[0] * lengths[1])


def _smooth_l1(student: Tensor, target: Tensor) -> Tensor:
    return functional.smooth_l1_loss(student, target, reduction="none").mean(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mse,
    "cosine": _cosine,
    "smooth_l1": _smooth_l1,
}


def feature_distances(kind: str, student: Tensor, target: Tensor) -> Tensor:
    """Distance of every row: `student`, `target` [..., D] → float32 [...].

    `mse` and `smooth_l1` (beta 1) are means over D; `cosine` is 1 − cosine similarity.
    Raises ValueError for an unknown kind or shapes that differ (never broadcasts).
    """
    if kind not in DISTANCES:
        raise ValueError(f"feature_loss_type {kind!r}: expected one of {', '.join(FEATURE_LOSSES)}")
    if student.shape != target.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and targets {tuple(target.shape)} must have one shape"
        )
    with full_precision(student):
        return DISTANCES[kind](student.float(), target.detach().float())


def weighted_mean(
    values: Tensor, weight: Tensor | None = None, normalizer: Tensor | float | None = None
) -> Tensor:
    """Σ weight·values / Σ weight; scalar float32.

    `weight` [...] like `values` (None: ones). Entries of weight 0 have no influence, not even as NaN: a target
    outside the image may hold anything. `normalizer` replaces Σ weight, e.g. by the mean over DDP ranks of it,
    so that every sample weighs the same in the global batch. All weights 0 gives 0 with a zero gradient.
    """
    if weight is None:
        total = values.sum()
        count: Tensor | float = float(max(values.numel(), 1))
    else:
        weight = weight.detach().to(values.dtype).expand_as(values)
        total = torch.where(weight > 0, values * weight, 0.0).sum()
        count = weight.sum()
    if normalizer is not None:
        count = normalizer
    return total / count.clamp_min(1e-12) if isinstance(count, Tensor) else total / max(count, 1e-12)


def feature_loss(
    kind: str,
    student: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Weighted mean distance of `student` and `target` [..., D] with `weight` [...]; scalar float32.

    `kind`: mse, cosine, smooth_l1. (`relation` compares rows with each other: `relational_loss`.)
    """
    if weight is not None:
        # A NaN target would poison the gradient through 0·NaN, so it is replaced before the distance.
        target = torch.where(weight.unsqueeze(-1) > 0, target, 0.0)
    return weighted_mean(feature_distances(kind, student, target), weight, normalizer)
