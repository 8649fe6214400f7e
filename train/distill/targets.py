"""The distillation terms: stored features → targets in the student's geometry → losses.

`B` samples, `h w` the student's cells (clips: `T` frames), `D` the teacher's width, `C` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from store.format import FRAMES, GRID, POOLED, VIEWS_GRID, VIEWS_POOLED
from train.data.batches import Batch
from train.distill.losses import feature_loss, logit_loss, relational_loss
from train.distill.mixing import Mixing, mix
from train.distill.projector import DistilledOutput, TargetStandardizer
from train.distill.transport import (
    Geometry,
    TransportWeights,
    apply_transport,
    region_mean,
    relate_views,
    transport_weights,
)
from train.errors import TrainError
from train.ranks import gather_rows, world_size

Counts = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DistillationPlan:
    """What a run distils, resolved from options, store and student.

    `pooled`, `cells`: which features are compared; `grid`: whether pooled targets follow the view through a
    stored grid; `recorded`: recorded views are replayed; `logits`: name of the stored logits, or None;
    `cell_shape`: the student's (h, w), None when it has no map.
    """

    pooled: bool = False
    cells: bool = False
    grid: bool = False
    recorded: bool = False
    frames: bool = False
    logits: str | None = None
    cell_shape: tuple[int, int] | None = None
    loss_type: str = "mse"
    temperature: float = 4.0
    feature_weight: float = 1.0
    logit_weight: float = 1.0

    @property
    def distils_features(self) -> bool:
        return self.pooled or self.cells

    @property
    def arrays(self) -> list[str]:
        """Names of the stored arrays that each batch needs."""
        names = []
        if self.distils_features and self.grid:
            names.append(VIEWS_GRID if self.recorded else GRID)
        if self.pooled and not self.grid:
            names.append(VIEWS_POOLED if self.recorded else POOLED)
        if self.logits:
            names.append(f"logits/{self.logits}")
        return names


@dataclass
class Targets:
    """Standardised float32 targets of one batch and their weights (0: no influence).

    `pooled` [B, D] with [B]; `cells` [B, h, w, D] or [B, T, D] with [B, h, w] or [B, T]; `logits` [B, C] with [B].
    """

    pooled: Tensor | None = None
    pooled_weight: Tensor | None = None
    cells: Tensor | None = None
    cell_weight: Tensor | None = None
    logits: Tensor | None = None
    logit_weight: Tensor | None = None

    def counts(self) -> dict[str, Tensor]:
        """Σ weight of each term, which its sum is divided by once it is known for all ranks and micro-batches."""
        weights = {"pooled": self.pooled_weight, "cells": self.cell_weight, "logit": self.logit_weight}
        return {name: weight.sum() for name, weight in weights.items() if weight is not None}


class Distillation(nn.Module):
    """Prepares targets and computes the terms; its only state are the stored statistics (no parameters)."""

    def __init__(self, plan: DistillationPlan, split: Any, teacher_views: NDArray[np.float64] | None) -> None:
        super().__init__()
        self.plan, self.teacher_views = plan, teacher_views
        self.standardizers = nn.ModuleDict(
            {
                kind: build_standardizer(split, statistics, stored)
                for kind, (statistics, stored) in standardized_arrays(plan, split).items()
            }
        )

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Targets:
        """Targets of a batch that is on the device already."""
        targets = Targets()
        if self.plan.frames:
            self.prepare_frames(batch, targets)
        elif self.plan.distils_features and self.plan.grid:
            self.prepare_grid(batch, targets)
        elif self.plan.pooled:
            self.prepare_pooled(batch, targets)
        if self.plan.logits:
            logits = batch.features[f"logits/{self.plan.logits}"].float()
            known = torch.isfinite(logits).all(-1).float()
            targets.logits, targets.logit_weight = logits, batch.weight * known
        return targets

    def prepare_pooled(self, batch: Batch, targets: Targets) -> None:
        """Without a grid: the stored row of the whole image (or of the recorded view)."""
        stored = batch.features[VIEWS_POOLED if self.plan.recorded else POOLED]
        targets.pooled = self.standardizers["pooled"](stored)
        targets.pooled_weight = batch.weight

    def prepare_grid(self, batch: Batch, targets: Targets) -> None:
        """Carry the grid to the student's cells; the pooled target is their mean."""
        # The matrices came with the batch (`transport`).
        grid = batch.features[VIEWS_GRID if self.plan.recorded else GRID]
        transported = apply_transport(grid, batch.transport)
        sample_weight = batch.weight.view(-1, 1, 1)
        if self.plan.cells:
            targets.cells = self.standardizers["cells"](transported.cells)
            targets.cell_weight = transported.weight * sample_weight
        if self.plan.pooled:
            mean, share = region_mean(transported)
            targets.pooled = self.standardizers["pooled"](mean)
            targets.pooled_weight = batch.weight * (share > 0)

    def transport(self, batch: Batch) -> TransportWeights:
        """How the grids of a batch that is still on the host are carried to the student's cells; empty without grids.

        The loader calls this where it gathers features, so that the matrices reach a GPU together with them.
        """
        if self.plan.frames or not (self.plan.distils_features and self.plan.grid):
            return {}
        height, width = self.plan.cell_shape or (4, 4)
        tokens = batch.features[VIEWS_GRID if self.plan.recorded else GRID].shape[1:3]
        geometry: Geometry | None = None
        if not self.plan.recorded:
            assert self.teacher_views is not None
            geometry = relate_views(batch.views, self.teacher_views[batch.rows])
        return transport_weights(geometry, height, width, (tokens[0], tokens[1]))

    def prepare_frames(self, batch: Batch, targets: Targets) -> None:
        """Clips: one row per frame, already spread over the student's frames by the clip loader."""
        if self.plan.cells:
            targets.cells = self.standardizers["cells"](batch.features["frames"])
            targets.cell_weight = batch.features["frame_mask"] * batch.weight.unsqueeze(1)
        if self.plan.pooled:
            self.prepare_pooled(batch, targets)

    def terms(
        self, output: DistilledOutput, targets: Targets, counts: Counts, mixing: Mixing | None = None
    ) -> dict[str, Tensor]:
        """`feature_loss` and `logit_loss`, this process's part of the mean over all ranks and micro-batches."""
        terms: dict[str, Tensor] = {}
        if self.plan.distils_features:
            terms["feature_loss"] = self.feature_term(output, targets, counts, mixing)
        student = output.logits
        if targets.logits is not None and student is not None and targets.logit_weight is not None:
            terms["logit_loss"] = mix(
                lambda target, weight: logit_loss(
                    student, target, self.plan.temperature, weight, counts["logit"]
                ),
                targets.logits,
                targets.logit_weight,
                mixing,
            )
        return terms

    def feature_term(
        self, output: DistilledOutput, targets: Targets, counts: Counts, mixing: Mixing | None
    ) -> Tensor:
        """The mean of the pooled and the per-cell distance, of those that the plan has."""
        if self.plan.loss_type == "relation":
            return self.relation_term(output, targets, counts)
        parts = []
        for name, student, target, weight in (
            ("pooled", output.pooled, targets.pooled, targets.pooled_weight),
            ("cells", output.cells, targets.cells, targets.cell_weight),
        ):
            if student is not None and target is not None and weight is not None:
                parts.append(self.distance(name, student, target, weight, counts, mixing))
        return torch.stack(parts).mean()

    def distance(
        self,
        name: str,
        student: Tensor,
        target: Tensor,
        weight: Tensor,
        counts: Counts,
        mixing: Mixing | None,
    ) -> Tensor:
        kind = self.plan.loss_type
        return mix(lambda t, w: feature_loss(kind, student, t, w, counts[name]), target, weight, mixing)

    def relation_term(self, output: DistilledOutput, targets: Targets, counts: Counts) -> Tensor:
        """Pairs across ranks belong to the loss: rows are gathered, and each rank contributes its share."""
        assert output.pooled is not None
        assert targets.pooled is not None
        assert targets.pooled_weight is not None
        weight = gather_rows(targets.pooled_weight)
        loss = relational_loss(gather_rows(output.pooled), gather_rows(targets.pooled), weight)
        return loss * weight.sum() / (counts["pooled"].clamp_min(1e-12) * world_size())


def standardized_arrays(plan: DistillationPlan, split: Any) -> dict[str, tuple[str, str]]:
    """Target → (whose statistics standardise it, whose scale its stored values carry).

    A pooled target that is the mean over grid cells carries the grid's scale, but varies as pooled rows do.
    """
    views = {GRID: VIEWS_GRID, POOLED: VIEWS_POOLED} if plan.recorded else {GRID: GRID, POOLED: POOLED}
    arrays: dict[str, tuple[str, str]] = {}
    if plan.pooled:
        arrays["pooled"] = (POOLED, views[GRID] if plan.grid else views[POOLED])
    if plan.cells:
        arrays["cells"] = (FRAMES, FRAMES) if plan.frames else (GRID, views[GRID])
    return arrays


def build_standardizer(split: Any, statistics: str, stored: str) -> TargetStandardizer:
    """Standardises stored values of array `stored` per channel, with the statistics of another or the same.

    Raises TrainError when the store lacks them.
    """
    found = split.statistics.get(statistics)
    if found is None:
        raise TrainError(
            f"{split.path}: no statistics of {statistics}, which standardise the targets: extract again, or run "
            "the extraction to its end"
        )
    return TargetStandardizer(found.mean, found.std, split.scale.get(stored))
