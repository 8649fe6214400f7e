"""Label-free: the student only learns the teacher's features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from train.data.batches import Batch
from train.distill.mixing import Mixing
from train.distill.projector import DistilledOutput
from train.tasks import Meter


class Features:
    """No task loss; the quality is the cosine between aligned student features and standardized targets."""

    name = "features"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes, self.label_smoothing = 0, 0.0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def loss(
        self, output: DistilledOutput, batch: Batch, counts: Mapping[str, Tensor], mixing: Mixing | None
    ) -> Tensor | None:
        return None

    def new_meter(self, device: torch.device) -> Meter:
        return Meter(0, device)

    def update(self, meter: Meter, output: DistilledOutput, batch: Batch) -> None:
        pass

    def metrics(self, meter: Meter) -> dict[str, float]:
        """The cosine is measured by the evaluation itself, for every task that distills features."""
        return {}
