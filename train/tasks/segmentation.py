"""One class per pixel; 255 is ignored."""

from __future__ import annotations

import torch
from torch import Tensor

from train.data.batches import Batch
from train.distill.losses import IGNORE_INDEX, Mixing
from train.distill.losses.segmentation import dice_from_sums, dice_sums, pixel_entropy_sum
from train.distill.module import DistilledOutput
from train.ranks import differentiable_sum, world_size
from train.tasks.base import Meter, count_classes


class Segmentation:
    """Pixel cross-entropy + Dice over the whole batch of all ranks; mean IoU, pixel accuracy, IoU per class."""

    name = "segmentation"
    best_metric = "miou"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"hard": (counted_mask(batch) != IGNORE_INDEX).sum(), "images": batch.weight.sum()}

    def loss(
        self, output: DistilledOutput, batch: Batch, counts: dict[str, Tensor], mixing: Mixing | None
    ) -> Tensor | None:
        if output.logits is None:
            return None
        mask = counted_mask(batch).long()
        entropy = pixel_entropy_sum(output.logits, mask, label_smoothing=self.label_smoothing)
        # Dice is a ratio of sums: they are added up over ranks first, and every rank carries an equal part.
        dice = dice_from_sums(*(differentiable_sum(value) for value in dice_sums(output.logits, mask)))
        images = differentiable_sum(batch.weight.sum())
        share = images / (counts["images"].clamp_min(1) * world_size())
        return entropy / counts["hard"].clamp_min(1) + dice * share

    def new_meter(self, device: torch.device) -> Meter:
        # intersection, predicted pixels and labelled pixels of each class
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
