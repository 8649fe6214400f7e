"""Losses as pure functions: float32 inside, no gradient into targets, invariant to the order of the batch.

`B` samples, `N` rows, `D` width of the features, `C` classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context that switches autocast off for the tensor's device; cast the operands with `.float()` inside.

    Without it, autocast would run matrix products (pairwise similarities) in bfloat16 or float16 again.
    """
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()  # the meta device, which the tests use to find host synchronizations


FEATURE_LOSSES = ("mse", "cosine", "smooth_l1", "relation")

#: Values that are compared at once, each copy of them float32: on a CPU what stays in its caches, elsewhere few launches.
CPU_CHUNK, CHUNK = 1 << 18, 1 << 22

#: Distances float32 [N] of rows [N, D], and their gradients with respect to the student's rows [N, D].
Distances = tuple[Tensor, Tensor]


def _mse(student: Tensor, target: Tensor) -> Distances:
    difference = student.sub_(target)
    return difference.square().mean(-1), difference.mul_(2 / difference.shape[-1])


def _cosine(student: Tensor, target: Tensor) -> Distances:
    norm, target_norm = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (student, target))
    lengths = norm.clamp_min(1e-8) * target_norm.clamp_min(1e-8)
    cosine = (student * target).sum(-1, keepdim=True) / lengths
    # d(−s·t / |s||t|)/ds; a row of zeros has no direction, so its norm counts as a constant.
    along = torch.where(norm > 1e-8, cosine / norm.clamp_min(1e-8).square(), 0.0)
    return 1.0 - cosine.squeeze(-1), student.mul_(along).addcmul_(target, lengths.reciprocal(), value=-1)


def _smooth_l1(student: Tensor, target: Tensor) -> Distances:
    distances = functional.smooth_l1_loss(student, target, reduction="none").mean(-1)
    return distances, student.sub_(target).clamp_(-1, 1).div_(student.shape[-1])


#: Each may overwrite the student's rows, which are a copy.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Distances]] = {
    "mse": _mse,
    "cosine": _cosine,
    "smooth_l1": _smooth_l1,
}


class _WeightedSum(torch.autograd.Function):
    """Σ weight · distance of rows, with the gradient worked out in the same pass, some rows at a time.

    Left to autograd, float32 copies of the student's rows, of the targets without the rows of weight 0 and of their
    differences stay in memory until the backward pass: for a ViT-B with a batch of 256, each is 257 MB.
    Here one tensor stays, the gradient in the student's own dtype.
    """

    repeatable = False  # see repeatable_backward

    @staticmethod
    def forward(ctx: Any, kind: str, student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """`student`, `target` [N, D], `weight` float32 [N] → scalar float32."""
        differentiable = ctx.needs_input_grad[1]
        gradient = torch.empty_like(student) if differentiable else None
        distances = torch.empty(len(student), dtype=torch.float32, device=student.device)
        counted, values = weight > 0, CPU_CHUNK if student.device.type == "cpu" else CHUNK
        step = max(1, values // max(1, student.shape[1]))
        for start in range(0, len(student), step):
            part = slice(start, start + step)
            rows = student[part].to(torch.float32, copy=True)
            # A target of weight 0 may hold anything, also NaN, and 0 · NaN is NaN.
            clean = torch.where(counted[part, None], target[part].float(), 0.0)
            distances[part], slope = DISTANCES[kind](rows, clean)
            if gradient is not None:
                gradient[part] = slope.mul_(weight[part, None])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.where(counted, distances * weight, 0.0).sum()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if _WeightedSum.repeatable:
            return None, gradient * factor, None, None
        # In place: the memory's peak is here, and autograd refuses a second pass over what was changed.
        return None, gradient.mul_(factor), None, None


@contextlib.contextmanager
def repeatable_backward() -> Iterator[None]:
    """Inside, the backward pass of `feature_loss` leaves what it needs for another one."""
    _WeightedSum.repeatable = True
    try:
        yield
    finally:
        _WeightedSum.repeatable = False


def weighted_mean(
    values: Tensor, weight: Tensor | None = None, normalizer: Tensor | float | None = None
) -> Tensor:
    """Σ weight·values / Σ weight; scalar float32.

    `weight` [...] like `values` (None: ones). Entries of weight 0 have no influence, not even as NaN: a target
    outside the image may hold anything. `normalizer` replaces Σ weight, e.g. by the mean over DDP ranks of it,
    so that every sample weighs the same in the global batch. All weights 0 gives 0 with a zero gradient.
    """
    weight = torch.ones_like(values) if weight is None else weight.detach().to(values.dtype).expand_as(values)
    total = torch.where(weight > 0, values * weight, 0.0).sum()
    return divide(total, weight.sum() if normalizer is None else normalizer)


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """`total / count`, 0 where nothing counts."""
    return total / count.clamp_min(1e-12) if isinstance(count, Tensor) else total / max(count, 1e-12)


def feature_loss(
    kind: str,
    student: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Weighted mean distance of `student` and `target` [..., D] with `weight` [...]; scalar float32.

    `kind`: mse and smooth_l1 (beta 1) are means over D; cosine is 1 − cosine similarity. (`relation` compares rows with
    each other: `relational_loss`.) `weight` and `normalizer` as in `weighted_mean`. The backward pass can run once.
    Raises ValueError for an unknown kind or shapes that differ (never broadcasts).
    """
    if kind not in DISTANCES:
        raise ValueError(f"feature_loss_type {kind!r}: expected one of {', '.join(FEATURE_LOSSES)}")
    if student.shape != target.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and targets {tuple(target.shape)} must have one shape"
        )
    rows, goal = student.flatten(0, -2), target.detach().flatten(0, -2)
    if weight is None:
        weights = torch.ones(len(rows), device=rows.device)
    else:
        weights = weight.detach().float().expand(student.shape[:-1]).flatten()
    with full_precision(student):
        total: Tensor = _WeightedSum.apply(kind, rows, goal, weights)  # type: ignore[no-untyped-call]
        return divide(total, weights.sum() if normalizer is None else normalizer)


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Weighted mean over samples of T² · KL(teacher ‖ student): logits [B, Cs] and [B, Ct]; scalar float32.

    Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015: T² keeps the size of the gradient
    independent of the temperature. A head wider than the teacher's classes is allowed: the teacher gives the extra
    classes probability 0. Rows of weight 0 may hold NaN.
    Raises ValueError for a narrower head or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    extra = student.shape[-1] - teacher.shape[-1]
    if extra < 0 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student.shape)} do not cover teacher logits {tuple(teacher.shape)}"
        )
    if weight is not None:
        teacher = torch.where(weight.unsqueeze(-1) > 0, teacher, 0.0)
    with full_precision(student):
        log_student = (student.float() / temperature).log_softmax(-1)
        wide = functional.pad(teacher.detach().float() / temperature, (0, extra), value=float("-inf"))
        probabilities = wide.softmax(-1)
        terms = torch.xlogy(probabilities, probabilities) - probabilities * log_student
        return weighted_mean(terms.sum(-1) * temperature**2, weight, normalizer)


def relational_loss(student: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of pairwise cosine similarities; scalar float32.

    The student copies which samples of the batch resemble each other: Tung and Mori, "Similarity-Preserving Knowledge
    Distillation", ICCV 2019, and Park et al., "Relational Knowledge Distillation", CVPR 2019. With cosine similarity
    neither the norms nor the widths of the two feature spaces matter; the diagonal, always 1, is left out of the mean.

    `student` [N, Ds], `target` [N, Dt] (widths may differ), `weight` [N]: a pair weighs the product of its
    samples' weights. Under DDP pass features gathered over the ranks (with gradients), since pairs across
    ranks belong to the loss. Fewer than two samples of weight above 0 give 0.
    Raises ValueError when the row counts differ.
    """
    if student.ndim != 2 or target.ndim != 2 or student.shape[0] != target.shape[0]:
        raise ValueError(
            f"expected [N, D] features of equal N, got {tuple(student.shape)} and {tuple(target.shape)}"
        )
    with full_precision(student):
        rows = torch.ones(len(student), device=student.device) if weight is None else weight.detach().float()
        clean = torch.where(rows.unsqueeze(1) > 0, target.detach().float(), 0.0)
        own, goal = (functional.normalize(side, dim=-1, eps=1e-8) for side in (student.float(), clean))
        pairs = torch.outer(rows, rows).fill_diagonal_(0.0)
        return ((own @ own.T - goal @ goal.T).square() * pairs).sum() / pairs.sum().clamp_min(1e-12)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted mean cross-entropy of logits [B, C] and labels int64 [B] with `weight` [B]; scalar float32."""
    with full_precision(logits):
        losses = functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=label_smoothing
        )
    return weighted_mean(losses, weight, normalizer)
