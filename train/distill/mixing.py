"""MixUp and CutMix: images mixed with a partner of the batch, and the losses with the same weights.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018; Yun et al., "CutMix", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.data.prefetch import to_device


class Mixing(NamedTuple):
    """How a batch was mixed: sample i shows `weight[i]` of itself and the rest of sample `partner[i]`.

    `partner` int64 [B], `weight` float [B] in [0, 1]. MixUp: the blending factor; CutMix: the area that is left.
    """

    partner: Tensor
    weight: Tensor


def mix(term: Callable[..., Tensor], target: Tensor, weight: Tensor, mixing: Mixing | None) -> Tensor:
    """`term(target, weight=weight)`, a weighted mean; under MixUp and CutMix against both targets.

    Each half has its own weight: what the image shows of a sample times that sample's `weight` [B, …], which is 0
    for padding and for samples without the target. `partner` is a permutation and every image is mixed by the same
    share, so the weights of both halves add up to Σ weight: the normalizer of the unmixed batch stays exact.
    """
    if mixing is None:
        return term(target, weight=weight)
    share = mixing.weight.view(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)
    partner = term(target[mixing.partner], weight=weight[mixing.partner] * (1 - share))
    return term(target, weight=weight * share) + partner


Box = tuple[int, int, int, int]


def draw_mixing(mixup_alpha: float, cutmix_alpha: float, images: Tensor) -> tuple[Mixing, Box | None]:
    """Partners and weights for images [B, 3, S, S]; for CutMix also the box (y0, y1, x0, x1) that is replaced.

    Random numbers come from torch's generator, which the loop has seeded for this step.
    """
    batch, height, width = len(images), images.shape[-2], images.shape[-1]
    partner = to_device(torch.randperm(batch), images.device)
    alpha = mixup_alpha or cutmix_alpha
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    box = None
    if cutmix_alpha:
        box = draw_box(share, height, width)
        share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
    return Mixing(partner, torch.full((batch,), share, device=images.device)), box


def draw_box(share: float, height: int, width: int) -> Box:
    """A box of about `1 - share` of the area around a random point, clipped to the image."""
    side = math.sqrt(1 - share)
    half_y, half_x = int(height * side / 2), int(width * side / 2)
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    return max(0, y - half_y), min(height, y + half_y), max(0, x - half_x), min(width, x + half_x)


def mix_images(images: Tensor, mixing: Mixing, box: Box | None) -> Tensor:
    """Blend whole images (MixUp), or paste the partner's box (CutMix)."""
    if box is None:
        share = mixing.weight.view(-1, 1, 1, 1)
        return share * images + (1 - share) * images[mixing.partner]
    y0, y1, x0, x1 = box
    mixed = images.clone()
    mixed[..., y0:y1, x0:x1] = images[mixing.partner][..., y0:y1, x0:x1]
    return mixed
