"""One class per pixel: cross-entropy plus soft Dice; pixels labeled 255 belong to neither.

Dice: Milletari, Navab, Ahmadi, "V-Net", 2016, per class over the batch, averaged over the classes present.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from train.data.batches import Batch
from train.distill.losses import full_precision
from train.distill.mixing import Mixing
from train.distill.projector import DistilledOutput
from train.ranks import differentiable_sum, world_size
from train.tasks import Meter, count_classes

IGNORE_INDEX = 255


class Segmentation:
    """Pixel cross-entropy + Dice over the micro-batches of all ranks; mean IoU, pixel accuracy, IoU per class."""

    name = "segmentation"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        mask = counted_mask(batch)
        labeled = mask.flatten(1).ne(IGNORE_INDEX).any(1)
        return {"hard": (mask != IGNORE_INDEX).sum(), "images": labeled.sum()}

    def loss(
        self, output: DistilledOutput, batch: Batch, counts: Mapping[str, Tensor], mixing: Mixing | None
    ) -> Tensor | None:
        if output.logits is None:
            return None
        return mask_loss(
            output.logits,
            counted_mask(batch),
            pixels=counts["hard"],
            images=counts["images"],
            label_smoothing=self.label_smoothing,
        )

    def new_meter(self, device: torch.device) -> Meter:
        # intersection, predicted pixels and labeled pixels of each class
        return Meter(3 * self.num_classes, device)

    def update(self, meter: Meter, output: DistilledOutput, batch: Batch) -> None:
        if output.logits is None:
            return
        mask = counted_mask(batch).long().flatten()
        known, predicted = mask != IGNORE_INDEX, output.logits.argmax(1).flatten()
        labels = mask.masked_fill(~known, 0)
        counted = ((labels, known & (predicted == labels)), (predicted, known), (labels, known))
        meter.sums += torch.cat([count_classes(*pair, self.num_classes) for pair in counted])

    def metrics(self, meter: Meter) -> dict[str, float]:
        """Classes without a labeled pixel are left out: what they are worth is undefined, not 0."""
        both, predicted, actual = meter.sums.view(3, -1)
        union = predicted + actual - both
        if not actual.sum():
            return {}
        overlap, labeled = both / union.clamp_min(1), actual > 0
        result = {
            "miou": float(overlap[labeled].mean()),
            "pixel_accuracy": float(both.sum() / actual.sum()),
            "macro_precision": float((both / predicted.clamp_min(1))[labeled].mean()),
            "macro_recall": float((both / actual.clamp_min(1))[labeled].mean()),
        }
        for index in torch.nonzero(labeled).flatten().tolist():
            result[f"per_class_iou/{index}"] = float(overlap[index])
        return result


def counted_mask(batch: Batch) -> Tensor:
    """The class mask uint8 [B, H, W] in which padding samples are ignored everywhere."""
    assert batch.masks is not None
    return batch.masks.masked_fill((batch.weight == 0).view(-1, 1, 1), IGNORE_INDEX)


def mask_loss(
    logits: Tensor, mask: Tensor, *, pixels: Tensor, images: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy + Dice of logits [B, C, H, W] and a mask [B, H, W]: this process's part of the step's mean.

    `pixels`, `images`: the counted pixels, and the images that have any, over all ranks and micro-batches of the step.
    """
    mask = mask.long()
    entropy = pixel_entropy_sum(logits, mask, label_smoothing=label_smoothing)
    # Dice is a ratio of sums, so it is not a sum over ranks: the sums are added up over ranks first, every rank
    # computes the same Dice and contributes 1 / ranks of it, times this micro-batch's share of the step's images.
    dice = dice_from_sums(*(differentiable_sum(value) for value in dice_sums(logits, mask)))
    counted = differentiable_sum((mask != IGNORE_INDEX).flatten(1).any(1).sum().float())
    return entropy / pixels.clamp_min(1) + dice * counted / (images.clamp_min(1) * world_size())


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


def dice_from_sums(overlap: Tensor, size: Tensor, labeled: Tensor, *, smooth: float = 1.0) -> Tensor:
    """The loss from the sums [C] of `dice_sums`; scalar float32."""
    dice = (2 * overlap + smooth) / (size + smooth)
    present = (labeled > 0).float()
    return ((1 - dice) * present).sum() / present.sum().clamp_min(1)
