"""Pixel cross-entropy plus soft Dice; pixels labelled 255 belong to neither.

Dice: Milletari, Navab, Ahmadi, "V-Net", 2016, per class over the batch, averaged over the classes present.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from train.distill.losses.precision import full_precision

IGNORE_INDEX = 255


def pixel_entropy_sum(logits: Tensor, mask: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Σ cross-entropy over counted pixels: logits [B, C, H, W], mask integer [B, H, W]; scalar float32."""
    with full_precision(logits):
        # One row per pixel: the 2-D kernel has no deterministic version on CUDA. Summed afterwards, because the
        # reduction of the 1-D kernel runs in a single block.
        rows = logits.float().movedim(1, -1).reshape(-1, logits.shape[1])
        return functional.cross_entropy(
            rows,
            mask.reshape(-1).long(),
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=label_smoothing,
        ).sum()


def pixel_cross_entropy(logits: Tensor, mask: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over counted pixels: logits [B, C, H, W], mask integer [B, H, W]; scalar float32, 0 if none count."""
    total = pixel_entropy_sum(logits, mask, label_smoothing=label_smoothing)
    return total / (mask != IGNORE_INDEX).sum().clamp_min(1)


def dice_loss(logits: Tensor, mask: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 − mean soft Dice over the classes that occur in `mask`; shapes as above; scalar float32, 0 if none."""
    return dice_from_sums(*dice_sums(logits, mask), smooth=smooth)


def dice_sums(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Dice is a ratio of, float32 [C] each: overlap, probabilities + labels, labels.

    Sums of several batches (ranks) may be added before `dice_from_sums`.
    """
    classes = logits.shape[1]
    with full_precision(logits):
        counted = (mask != IGNORE_INDEX).unsqueeze(1)
        probabilities = logits.float().softmax(1) * counted
        numbers = torch.arange(classes, dtype=mask.dtype, device=mask.device).view(1, -1, 1, 1)
        # 255 is none of them: ignored pixels are true of no class.
        truth = ((mask.unsqueeze(1) == numbers) & counted).float()
        dims = (0, 2, 3)
        return (probabilities * truth).sum(dims), (probabilities + truth).sum(dims), truth.sum(dims)


def dice_from_sums(overlap: Tensor, size: Tensor, labelled: Tensor, *, smooth: float = 1.0) -> Tensor:
    """The loss from the sums [C] of `dice_sums`; scalar float32."""
    dice = (2 * overlap + smooth) / (size + smooth)
    present = (labelled > 0).float()
    return ((1 - dice) * present).sum() / present.sum().clamp_min(1)


def segmentation_loss(
    logits: Tensor, mask: Tensor, *, label_smoothing: float = 0.0, dice_weight: float = 1.0
) -> Tensor:
    """Cross-entropy + `dice_weight` · Dice; logits [B, C, H, W], mask integer [B, H, W]; scalar float32."""
    _check_range(mask, logits.shape[1])
    entropy = pixel_cross_entropy(logits, mask, label_smoothing=label_smoothing)
    return entropy + dice_weight * dice_loss(logits, mask) if dice_weight else entropy


def _check_range(mask: Tensor, classes: int) -> None:
    """On the CPU a class id beyond the head is an error that says so; on a GPU torch's own assertion tells."""
    if mask.device.type != "cpu" or mask.numel() == 0:
        return
    highest = int(torch.where(mask == IGNORE_INDEX, torch.zeros_like(mask), mask).max())
    if highest >= classes:
        raise ValueError(
            f"mask holds class {highest}, the head has {classes} classes (0..{classes - 1}, 255 ignored)"
        )
