"""What a run learns from, as one loss: the task's labels, the teacher's stored features, the teacher's logits.

`B` samples, `h w` the student's cells (clips: `T` frames), `D` the teacher's width, `C` classes.

Every term is a weighted mean over the whole optimizer step, whatever it is split into. This process computes, for each of
its micro-batches, `Σ weight · value / N`, where `N` is the sum of the weights over all ranks and all micro-batches of
the step (`Targets.counts`, added up by `train.ranks.add_counts` before the first forward pass). The parts then simply
add up to the mean over all samples: padding has weight 0, and a short last batch does not count more than others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from store.format import FRAMES, GRID, LOGITS, MAP_STEPS, MAPS, POOLED, VIEWS_GRID, VIEWS_POOLED, layer_grid
from store.reader import Split
from train.data.batches import Batch
from train.distill.losses import feature_loss, logit_loss, relational_loss
from train.distill.mixing import Mixing, mix
from train.distill.phi_s import rotation_of
from train.distill.projector import Aligned, DistilledOutput, TargetStandardizer
from train.distill.transport import (
    TransportWeights,
    apply_transport,
    mirrored_views,
    region_mean,
    relate_views,
    transport_weights,
)
from train.errors import TrainError
from train.ranks import gather_rows, world_size
from train.tasks import Task
from train.tasks.segmentation import IGNORE_INDEX, mask_loss

#: The student's cells where it has no feature map: only their mean is used then, as the pooled target.
CELLS_OF_A_MEAN = (4, 4)
#: What the names of the student's chosen levels begin with, in counts, standardizers and transport weights.
LEVEL = "level"
#: The same for soft class maps.
MAP = "map"
#: A cell of a soft class map has the class that is at least this probable; others, mostly at edges, are ignored. Students
#: learned faster from them than from the probabilities themselves, which blur what masks show sharply (docs/benchmarks.md).
SURE = 0.8


@dataclass(frozen=True, kw_only=True)
class DistillationPlan:
    """What is distilled, resolved from options, store and student (`train.distill.resolve`); the defaults: nothing.

    `pooled`, `cells`: which features are compared, of the teacher's last layer; `levels`: further maps of the student by
    name, each with the teacher's layer that it learns (None: the last); `grid`: targets are computed from a stored grid, so that they follow
    the view; `recorded`: recorded views are replayed; `exact_flip`: flipped samples learn the stored features of the
    mirror image; `frames`: the samples are clips; `logits`: name of the stored
    logits, or None; `maps`: name of the stored soft class maps, or None.
    """

    pooled: bool = False
    cells: bool = False
    levels: tuple[tuple[str, int | None], ...] = ()
    grid: bool = False
    recorded: bool = False
    exact_flip: bool = False
    frames: bool = False
    logits: str | None = None
    maps: str | None = None

    @property
    def features(self) -> bool:
        return self.pooled or self.cells or bool(self.levels)

    @property
    def anything(self) -> bool:
        return self.features or self.logits is not None or self.maps is not None

    @property
    def carries_grids(self) -> bool:
        """Whether stored grids are carried to the student's cells."""
        return self.features and self.grid and not self.frames

    @property
    def grid_array(self) -> str:
        return VIEWS_GRID if self.recorded else GRID

    @property
    def pooled_array(self) -> str:
        return VIEWS_POOLED if self.recorded else POOLED

    @property
    def arrays(self) -> list[str]:
        """Names of the stored arrays that each batch needs."""
        names = [self.grid_array] if (self.pooled or self.cells) and self.grid else []
        names += [name for name in dict.fromkeys(self.level_arrays) if name not in names]
        names += [self.pooled_array] if self.pooled and not self.grid else []
        names += [f"{LOGITS}/{self.logits}"] if self.logits else []
        return [*names, self.map_array] if self.maps else names

    @property
    def level_arrays(self) -> list[str]:
        """The stored grids that the levels learn, in their order."""
        return [layer_grid(layer, self.grid_array) for _, layer in self.levels]

    @property
    def map_array(self) -> str:
        return f"{MAPS}/{self.maps}"

    def reduced_to(self, split: Split) -> DistillationPlan:
        """What of the plan another split has, without recorded views and flips; its masks are known, so without maps."""
        logits = self.logits if f"{LOGITS}/{self.logits}" in split.names else None
        grid = self.grid and GRID in split.names
        cells = self.cells and (grid or self.frames)
        whole = replace(
            self, recorded=False, exact_flip=False, logits=logits, maps=None, grid=grid, cells=cells
        )
        return whole if set(whole.level_arrays) <= set(split.names) else replace(whole, levels=())


@dataclass
class Targets:
    """Standardized float32 targets of one batch and their weights (0: no influence).

    `pooled` [B, D] with [B]; `cells` [B, h, w, D] or [B, T, D] with [B, h, w] or [B, T]; `logits` [B, C] with [B];
    `mask` uint8 [B, S, S]: classes of soft class maps where the teacher is sure of one and the image has no mask, else 255;
    `levels`: cells of the student's chosen levels, each with its weight.
    `counts`: Σ weight of each term in this batch, the task's too; scalars by name.
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    pooled: Tensor | None = None
    pooled_weight: Tensor | None = None
    cells: Tensor | None = None
    cell_weight: Tensor | None = None
    logits: Tensor | None = None
    logit_weight: Tensor | None = None
    mask: Tensor | None = None
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    others: list[Targets] = field(default_factory=list)  # of further teachers


def other_teacher(number: int) -> str:
    """What the names begin with that belong to a further teacher: features, counts and transport weights of batches."""
    return f"teacher{number}/"


class Objective:
    """total = Σ weight of a term · term, over `hard_loss`, `feature_loss` and `logit_loss`; at weight 0, labels are not learned.

    Without a plan, the task alone. `feature_loss` is the mean over the teachers of the mean over their kinds of targets;
    `others`: the objectives of further teachers, of which only the features count. `standardizers`: of `pooled`, `cells` and
    levels, on the device. `teacher_views` float64 [N, 2, 3]: what part of each image the teacher saw; `cell_shapes`: (h, w)
    of the student's map and of its chosen levels, none when it has no map.
    """

    def __init__(
        self,
        task: Task,
        plan: DistillationPlan | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        loss_type: str = "mse",
        temperature: float = 4.0,
        standardizers: Mapping[str, TargetStandardizer] | None = None,
        teacher_views: NDArray[np.float64] | None = None,
        cell_shapes: Sequence[tuple[int, int]] = (),
        others: Sequence[Objective] = (),
    ) -> None:
        self.others = list(others)
        self.task, self.plan = task, plan or DistillationPlan()
        self.weights = dict(weights or {"hard_loss": 1.0})
        self.loss_type, self.temperature = loss_type, temperature
        self.standardizers = standardizers or {}
        self.teacher_views = teacher_views
        self.cell_shape, *self.level_shapes = cell_shapes or [CELLS_OF_A_MEAN]

    def transport(self, batch: Batch) -> TransportWeights:
        """How the grids and soft class maps of a batch that is still on the host are carried to the student's cells.

        The loader calls this where it gathers features, so that the matrices reach a GPU together with them.
        """
        plan, weights = self.plan, dict[str, Tensor]()
        geometry = None  # a recorded view is the very view that the teacher saw
        if self.teacher_views is not None:
            geometry = relate_views(batch.views, self.teacher_views[batch.rows])
        if plan.carries_grids:
            seen = None if plan.recorded else geometry
            if batch.flipped is not None and self.teacher_views is not None:
                # These grids are the mirror images' own: a flip moves nothing.
                teacher = mirrored_views(self.teacher_views[batch.rows], batch.flipped)
                seen = relate_views(batch.views, teacher)
            if plan.pooled or plan.cells:
                tokens = grid_shape(batch.features[plan.grid_array])
                weights |= transport_weights(seen, *self.cell_shape, tokens)
            for index, (shape, name) in enumerate(zip(self.level_shapes, plan.level_arrays, strict=False)):
                tokens = grid_shape(batch.features[name])
                weights |= prefixed(f"{LEVEL}{index}/", transport_weights(seen, *shape, tokens))
        if plan.maps:
            tokens = grid_shape(batch.features[plan.map_array])
            side = map_cells(batch.images.shape[1], tokens[0])
            weights |= prefixed(f"{MAP}/", transport_weights(geometry, side, side, tokens))
        for number, other in enumerate(self.others):
            weights |= prefixed(other_teacher(number), other.transport(batch_of(batch, number)))
        return weights

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Targets:
        """The targets of a batch that is on the device already, in the geometry of its views."""
        targets = self.prepare_own(batch, self.task.counts(batch))
        for number, other in enumerate(self.others):
            found = other.prepare_own(batch_of(batch, number), {})
            targets.others.append(found)
            targets.counts |= prefixed(other_teacher(number), found.counts)
        return targets

    def prepare_own(self, batch: Batch, counts: dict[str, Tensor]) -> Targets:
        """The targets of the first teacher alone."""
        plan, targets = self.plan, Targets(counts)
        if plan.carries_grids:
            for index, name in enumerate(plan.level_arrays):
                level = apply_transport(
                    batch.features[name], without_prefix(f"{LEVEL}{index}/", batch.transport)
                )
                seen = level.weight * batch.weight.view(-1, 1, 1)
                targets.levels.append((self.standardizers[f"{LEVEL}{index}"](level.cells), seen))
        if plan.carries_grids and (plan.pooled or plan.cells):
            carried = apply_transport(batch.features[plan.grid_array], batch.transport)
            if plan.pooled:
                mean, share = region_mean(carried)
                targets.pooled = self.standardizers["pooled"](mean)
                targets.pooled_weight = batch.weight * (share > 0)
            if plan.cells:
                targets.cells = self.standardizers["cells"](carried.cells)
                targets.cell_weight = carried.weight * batch.weight.view(-1, 1, 1)
        elif plan.pooled:
            # The stored row of the whole image or clip, or of the recorded view.
            targets.pooled = self.standardizers["pooled"](batch.features[plan.pooled_array])
            targets.pooled_weight = batch.weight
        if plan.frames and plan.cells:
            # The loader has repeated each stored row for the frames that it stands for.
            targets.cells = self.standardizers["cells"](batch.features["frames"])
            targets.cell_weight = batch.features["frame_mask"] * batch.weight.unsqueeze(1)
        if plan.logits:
            targets.logits = batch.features[f"{LOGITS}/{plan.logits}"].float()
            targets.logit_weight = batch.weight * torch.isfinite(targets.logits).all(-1).float()
        if plan.maps:
            stored = batch.features[plan.map_array]
            maps = apply_transport(stored, without_prefix(f"{MAP}/", batch.transport))
            targets.mask = sure_classes((maps.cells / -MAP_STEPS).softmax(-1), maps.weight, batch)
            if self.weights["hard_loss"]:  # else masks are not learned: maps teach every image
                targets.mask.masked_fill_(has_mask(batch), IGNORE_INDEX)
            targets.counts["logit"] = (targets.mask != IGNORE_INDEX).sum()
            targets.counts["maps"] = targets.mask.flatten(1).ne(IGNORE_INDEX).any(1).sum()
        for name, weight in (
            ("pooled", targets.pooled_weight),
            ("cells", targets.cell_weight),
            ("logit", targets.logit_weight),
            *((f"{LEVEL}{index}", weight) for index, (_, weight) in enumerate(targets.levels)),
        ):
            if weight is not None:
                targets.counts[name] = weight.sum()
        return targets

    def losses(
        self,
        output: DistilledOutput,
        batch: Batch,
        targets: Targets,
        counts: Mapping[str, Tensor],
        mixing: Mixing | None = None,
    ) -> dict[str, Tensor]:
        """`loss` (with gradient) and the named terms, this batch's part of the step's means; scalars float32.

        `counts`: the sums of `Targets.counts` over the step.
        """
        terms: dict[str, Tensor] = {}
        hard = self.task.loss(output, batch, counts, mixing) if self.weights["hard_loss"] else None
        if hard is not None:
            terms["hard_loss"] = hard
        features = [self.feature_term(Aligned(*output[1:4]), targets, counts, mixing)]
        for number, other in enumerate(self.others):
            own = without_prefix(other_teacher(number), counts)
            features.append(other.feature_term(output.others[number], targets.others[number], own, mixing))
        if learned := [term for term in features if term is not None]:
            terms["feature_loss"] = torch.stack(learned).mean()
        if output.logits is not None and targets.logits is not None and targets.logit_weight is not None:
            divergence = partial(
                logit_loss, output.logits, temperature=self.temperature, normalizer=counts["logit"]
            )
            terms["logit_loss"] = mix(divergence, targets.logits, targets.logit_weight, mixing)
        if output.logits is not None and targets.mask is not None:
            terms["logit_loss"] = mask_loss(
                output.logits, targets.mask, pixels=counts["logit"], images=counts["maps"]
            )
        return {"loss": self.total(terms), **terms}

    def feature_term(
        self, output: Aligned, targets: Targets, counts: Mapping[str, Tensor], mixing: Mixing | None
    ) -> Tensor | None:
        """The mean of the distances to one teacher's features, scalar float32; None where nothing is compared."""
        distances = []
        for name, student, target, weight in (
            ("pooled", output.pooled, targets.pooled, targets.pooled_weight),
            ("cells", output.cells, targets.cells, targets.cell_weight),
            *(
                (f"{LEVEL}{index}", student, *target)
                for index, (student, target) in enumerate(zip(output.levels, targets.levels, strict=False))
            ),
        ):
            if student is None or target is None or weight is None:
                continue
            if self.loss_type == "relation":
                # Pairs across ranks belong to the loss: every rank compares all rows and contributes an equal part.
                everywhere = gather_rows(weight)
                distance = relational_loss(gather_rows(student), gather_rows(target), everywhere)
                share = everywhere.sum() / (counts[name].clamp_min(1e-12) * world_size())
                distances.append(distance * share)
            else:
                term = partial(feature_loss, self.loss_type, student, normalizer=counts[name])
                distances.append(mix(term, target, weight, mixing))
        return torch.stack(distances).mean() if distances else None

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the named terms; scalar float32."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def grid_shape(grid: Tensor) -> tuple[int, int]:
    """Rows and columns of grids [B, h, w, D]."""
    return grid.shape[1], grid.shape[2]


def map_cells(image_size: int, side: int) -> int:
    """Cells a side that soft class maps of `side` are compared in: whole pixels, and not coarser than the maps."""
    return next(cells for cells in range(min(side, image_size), image_size + 1) if image_size % cells == 0)


def sure_classes(probabilities: Tensor, seen: Tensor, batch: Batch) -> Tensor:
    """Masks uint8 [B, S, S] from probabilities [B, m, m, C] carried to the view and `seen` [B, m, m], the part the teacher saw.

    255 where the teacher is not sure, and in padding.
    """
    assert batch.masks is not None
    best, classes = probabilities.max(-1)
    known = (best >= SURE) & (seen > 0.5) & (batch.weight > 0).view(-1, 1, 1)
    cells = classes.masked_fill(~known, IGNORE_INDEX).to(torch.uint8)
    pixels = batch.masks.shape[1] // cells.shape[1]
    return cells.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)


def has_mask(batch: Batch) -> Tensor:
    """bool [B, 1, 1]: whether an image has a mask of its own."""
    assert batch.masks is not None
    return (batch.masks != IGNORE_INDEX).flatten(1).any(1).view(-1, 1, 1)


def batch_of(batch: Batch, number: int) -> Batch:
    """The batch as a further teacher's objective sees it."""
    prefix = other_teacher(number)
    return replace(
        batch,
        features=without_prefix(prefix, batch.features),
        transport=without_prefix(prefix, batch.transport),
    )


def prefixed(prefix: str, weights: TransportWeights) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def without_prefix(prefix: str, weights: TransportWeights) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def build_standardizers(
    plan: DistillationPlan, split: Split, device: torch.device, rotations: Path | None = None
) -> dict[str, TargetStandardizer]:
    """The standardizer of each kind of target that the plan has, see `build_standardizer`."""
    found = {}
    if plan.pooled:
        # The mean over a grid's cells has the scale of the stored grid, but varies as pooled rows do.
        stored = plan.grid_array if plan.grid else plan.pooled_array
        found["pooled"] = build_standardizer(split, POOLED, stored, rotations).to(device)
    if plan.cells:
        kind, stored = (FRAMES, FRAMES) if plan.frames else (GRID, plan.grid_array)
        found["cells"] = build_standardizer(split, kind, stored, rotations).to(device)
    for index, ((_, layer), stored) in enumerate(zip(plan.levels, plan.level_arrays, strict=True)):
        own = build_standardizer(split, layer_grid(layer), stored, rotations)
        found[f"{LEVEL}{index}"] = own.to(device)
    return found


def build_standardizer(
    split: Split, statistics: str, stored: str, rotations: Path | None = None
) -> TargetStandardizer:
    """Standardizes stored values of array `stored`, with the statistics of another or the same.

    rotations: the folder that keeps the rotations of `--standardize phi-s`; None: each channel on its own.
    Raises TrainError when the store lacks them.
    """
    found = split.statistics.get(statistics)
    if found is None:
        raise TrainError(
            f"{split.path}: no statistics of {statistics}, which standardize the targets: extract again, or run "
            "the extraction to its end"
        )
    rotation = None if rotations is None else rotation_of(split, statistics, rotations)
    return TargetStandardizer(found.mean, found.std, split.scale.get(stored), rotation=rotation)
