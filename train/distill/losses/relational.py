"""Relational distillation: the student copies which samples of the batch resemble each other.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, and Park et al., "Relational Knowledge
Distillation", CVPR 2019. Here the relation is the cosine similarity, so that neither the norms nor the widths of
the two feature spaces matter; the diagonal, always 1, is left out of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from train.distill.losses.precision import full_precision


def relational_loss(student: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of pairwise cosine similarities; scalar float32.

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
        difference = cosine_similarities(student.float()) - cosine_similarities(clean)
        pairs = torch.outer(rows, rows).fill_diagonal_(0.0)
        return (difference.square() * pairs).sum() / pairs.sum().clamp_min(1e-12)


def cosine_similarities(features: Tensor) -> Tensor:
    """[N, D] → [N, N] cosine similarities of all pairs."""
    unit = functional.normalize(features, dim=-1, eps=1e-8)
    return unit @ unit.T
