"""Cross-entropy with label smoothing, and the mixing of targets under MixUp and CutMix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from train.distill.losses.precision import full_precision


class Mixing(NamedTuple):
    """How a batch was mixed: sample i shows `weight[i]` of itself and the rest of sample `partner[i]`.

    `partner` int64 [B], `weight` float [B] in [0, 1]. MixUp: the blending factor; CutMix: the area that is left.
    """

    partner: Tensor
    weight: Tensor


def mix(
    term: Callable[[Tensor, Tensor], Tensor], target: Tensor, weight: Tensor, mixing: Mixing | None
) -> Tensor:
    """`term(target, weight)`, a weighted mean; under MixUp and CutMix against both targets.

    Each half has its own weight: what the image shows of a sample times that sample's `weight` [B, …], which is 0
    for padding and for samples without the target. `partner` is a permutation and every image is mixed by the same
    share, so the weights of both halves add up to Σ weight: the normalizer of the unmixed batch stays exact.
    """
    if mixing is None:
        return term(target, weight)
    share = mixing.weight.view(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)
    partner = term(target[mixing.partner], weight[mixing.partner] * (1 - share))
    return term(target, weight * share) + partner


def classification_losses(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every sample: logits [B, C], labels int64 [B] → float32 [B]."""
    with full_precision(logits):
        return functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=label_smoothing
        )
