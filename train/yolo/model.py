"""ultralytics' detection model with the distillation term in its loss."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

from train.distill.calibration import (
    SHARE,
    STEPS_PER_MEASUREMENT,
    Calibration,
    CalibrationState,
    measurements_of,
)
from train.distill.losses import feature_loss
from train.distill.projector import build_projector, channels_last_rows
from train.yolo.targets import LevelTargets, foreground_weights

# Inputs of the Detect head, in its order, and their strides in pixels.
LEVELS = ("P3", "P4", "P5")
# ultralytics' own name for a distillation term, so that its plots and tables treat it the same.
DISTILLATION_ITEM = "dis_loss"


def level_of(name: str) -> str:
    """The student's level that a head or its targets belong to; those of further teachers have a prefix."""
    return name.rpartition("/")[2]


class Distillation(nn.Module):
    """The distance between the student's maps and the teacher's grid: alignment heads and the settings of it."""

    calibration: Tensor

    def __init__(
        self,
        widths: dict[str, int],
        teacher_widths: dict[str, int],
        *,
        kind: str,
        hard_weight: float,
        soft_weight: float,
        foreground: float,
        align: bool,
        align_head: str,
        batches: int = 0,
    ) -> None:
        """`widths`, `teacher_widths`: level (P3, P4, P5; of a further teacher with its prefix) → channels of the student's map
        there, and of what it learns.

        `batches`: of the whole training, where the term's weight is found in the first ones (`train.distill.calibration`) and
        multiplied with `soft_weight`; 0: it was given.
        """
        super().__init__()
        self.wanted = measurements_of(batches) if batches else 0
        self.measured: int | None = None  # known once training has begun, or gone on
        if batches:
            # Number and sum of the logarithms of what was measured: in the state that a run is resumed from.
            self.register_buffer("calibration", torch.zeros(2))  # float32, as checkpoints keep it
        self.kind, self.foreground = kind, foreground
        self.hard_weight, self.soft_weight = hard_weight, soft_weight
        self.heads = nn.ModuleDict(
            {
                level: build_projector(width, teacher_widths[level], align_feature=align, kind=align_head)
                for level, width in widths.items()
            }
        )

    @property
    def weight(self) -> Tensor | float:
        """The weight of the term in the loss."""
        if not self.wanted:
            return self.soft_weight
        count, logarithms = self.calibration.float()
        found = SHARE * (logarithms / count.clamp_min(1)).exp()
        return self.soft_weight * torch.where(count > 0, found, 1.0)

    def calibrate(self, parameters: list[nn.Parameter], term: Tensor, others: Tensor) -> None:
        """Measure a batch, unless there are enough of them. `parameters`: of backbone and neck, in their order."""
        count, logarithms = self.calibration.tolist()
        state = CalibrationState(int(count), logarithms)
        calibration = Calibration(lambda: state, parameters, self.wanted * STEPS_PER_MEASUREMENT)
        calibration.add(term, others)
        calibration.finish()
        self.measured = state.count
        self.calibration.copy_(torch.tensor([state.count, state.log_ratio]))

    @property
    def calibrates(self) -> bool:
        """Whether the next batch is to be measured."""
        if self.measured is None and self.wanted:
            self.measured = int(self.calibration[0])
        return self.wanted > (self.measured or 0)

    def forward(self, maps: list[Tensor], batch: dict[str, Any], targets: LevelTargets) -> Tensor:
        """The mean over the teachers of the mean over their levels of the weighted mean distance; scalar float32.

        `maps`: the student's P3, P4 and P5, each [B, D, h, w].
        """
        terms: dict[str, list[Tensor]] = {}  # by teacher
        for level, head in self.heads.items():
            rows = channels_last_rows(maps[LEVELS.index(level_of(level))])
            height, width = rows.shape[1:3]
            target, weight = targets[level].at(batch, height, width)
            weight = weight * foreground_weights(batch, height, width, self.foreground)
            teacher = level.rpartition("/")[0]
            terms.setdefault(teacher, []).append(feature_loss(self.kind, head(rows), target, weight))
        return torch.stack([torch.stack(own).mean() for own in terms.values()]).mean()


class DistilledDetectionModel(DetectionModel):  # type: ignore[misc]
    """A DetectionModel that also learns the teacher's features while it trains.

    ultralytics' trainer, EMA, optimizer, gradient clipping and DDP treat the heads as part of the model;
    `plain_detector` gives the model without them.
    """

    # No defaults here: an attribute of the class would hide the sub-module of the same name.
    distillation: Distillation
    # Of the training and of the validation split, whose rows are counted apart.
    targets: tuple[LevelTargets, LevelTargets]

    def attach(self, distillation: Distillation, targets: tuple[LevelTargets, LevelTargets]) -> None:
        self.distillation = distillation
        self.targets = targets

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """ultralytics' loss vector (each part times the batch size) and items, with the distillation appended.

        The items are the terms themselves, before `hard_weight` and `soft_weight`.
        """
        if preds is None:
            preds = self.forward(batch["img"])
        loss, items = super().loss(batch, preds)
        if not is_distilled(self):
            return loss, items
        raw = preds[1] if isinstance(preds, tuple) else preds
        term = self.distillation(raw["feats"], batch, self.targets[0 if self.training else 1])
        items[DISTILLATION_ITEM] = term.detach()
        images = batch["img"].shape[0]
        if self.training and torch.is_grad_enabled() and self.distillation.calibrates:
            layers: Any = self.model
            body = [p for layer in layers[:-1] for p in layer.parameters()]
            self.distillation.calibrate(body, term, loss.sum() / images)
        scaled = term * self.distillation.weight * images
        return torch.cat([loss * self.distillation.hard_weight, scaled.reshape(1).to(loss)]), items


def plain_detector(model: DetectionModel) -> DetectionModel:
    """A copy of `model` that is ultralytics' own class and holds nothing of ours; LoRA is merged."""
    plain: Any = deepcopy(model)
    if is_distilled(plain):
        del plain.distillation, plain.targets
    plain.__class__ = DetectionModel
    plain.criterion = None
    detector: DetectionModel = plain
    return detector


def is_distilled(model: nn.Module) -> bool:
    """True once `attach` was called."""
    return "distillation" in model._modules
