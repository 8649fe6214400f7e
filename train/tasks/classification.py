"""One class per image, or per clip."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from train.data.batches import Batch
from train.distill.losses import cross_entropy
from train.distill.mixing import Mixing, mix
from train.distill.projector import DistilledOutput
from train.tasks import Meter, count_classes


class Classification:
    """Cross-entropy; top-1, top-5, means over classes, and the recall of each class.

    `macro_precision`, `macro_recall` and `macro_f1` are means over the classes that have labels: without any, what
    a class is worth is undefined, not 0. The precision of a class that has labels and is never predicted is 0.
    """

    name = "classification"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"hard": sample_weight(batch).sum()}

    def loss(
        self, output: DistilledOutput, batch: Batch, counts: Mapping[str, Tensor], mixing: Mixing | None
    ) -> Tensor | None:
        """Samples without a label (-1) are learned from the teacher alone, mixed with others too."""
        if output.logits is None or batch.labels is None:
            return None
        term = partial(
            cross_entropy, output.logits, normalizer=counts["hard"], label_smoothing=self.label_smoothing
        )
        # Clamped labels have weight 0.
        return mix(term, batch.labels.clamp_min(0), sample_weight(batch), mixing)

    def new_meter(self, device: torch.device) -> Meter:
        # samples, top-1 hits, top-5 hits, then true positives, predictions and labels of each class
        return Meter(3 + 3 * self.num_classes, device)

    def update(self, meter: Meter, output: DistilledOutput, batch: Batch) -> None:
        if output.logits is None or batch.labels is None:
            return
        # Every sample is counted, the unlabeled ones as 0: selecting the labeled ones would make the host wait.
        known, labels = sample_weight(batch) > 0, batch.labels.clamp_min(0)
        best = output.logits.float().topk(min(5, self.num_classes), dim=1).indices
        hits = (best == labels.unsqueeze(1)) & known.unsqueeze(1)
        predicted, right = best[:, 0], hits[:, 0]
        head = torch.stack([known.sum(), right.sum(), hits.any(1).sum()])
        meter.sums += torch.cat(
            [
                head,
                count_classes(labels, right, self.num_classes),
                count_classes(predicted, known, self.num_classes),
                count_classes(labels, known, self.num_classes),
            ]
        )

    def metrics(self, meter: Meter) -> dict[str, float]:
        samples, top1, top5 = (float(value) for value in meter.sums[:3])
        if not samples:
            return {}
        right, predicted, actual = meter.sums[3:].view(3, -1)
        labeled = actual > 0
        per_class = {
            "macro_precision": right / predicted.clamp_min(1),
            "macro_recall": right / actual.clamp_min(1),
            "macro_f1": 2 * right / (predicted + actual).clamp_min(1),
        }
        means = {name: float(values[labeled].mean()) for name, values in per_class.items()}
        recall = {
            f"per_class_recall/{index}": float(per_class["macro_recall"][index])
            for index in torch.nonzero(labeled).flatten().tolist()
        }
        return {"top1": top1 / samples, "top5": top5 / samples, **means, **recall}


class SequenceClassification(Classification):
    """The same for clips: one class per sequence of frames."""

    name = "sequence"


def sample_weight(batch: Batch) -> Tensor:
    """1 for labeled samples, 0 for padding and unlabeled ones; float32 [B]."""
    if batch.labels is None:
        return torch.zeros_like(batch.weight)
    return batch.weight * (batch.labels >= 0)
