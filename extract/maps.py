"""`maps/probe` of a store with masks: soft class maps of a probe of every grid cell, predicted out of fold.

The probe learns which share of a cell's pixels each class has (soft labels) from the cell's features (`extract.cells`).
Two forms are fitted, linear and with one hidden layer; the one with the lower cross-entropy on the rows that it did not
see is kept.

Shapes: `g` side of the last layer's grid, `s` side of the maps, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from console.output import get_logger
from extract.cells import (
    FIT_CELLS,
    LINEAR,
    TWO_LAYERS,
    CellProbe,
    FitPlan,
    Rows,
    blocks_of,
    fit_folds,
    interpolate,
    labeled_rows_of,
    measured_split,
    plan_fit,
    predict_rows,
    sample_cells,
)
from extract.teachers.devices import pick_device
from files.writing import check_writable
from imaging.geometry import resize_view
from imaging.masks import IGNORE, decode_mask
from store import format as names
from store.create import add_arrays
from store.finalize import finalize_store
from store.format import map_array
from store.reader import Split, Store, open_store
from store.writer import StoreWriter

log = get_logger("extract")

#: Sample points of a mask along a side of a map's cell: a cell's soft label is the histogram of 64 pixels.
POINTS = 8


@dataclass(frozen=True)
class MapResult:
    """What the stored grids are worth for segmentation, mean IoU as fractions of 1. None where masks are missing.

    `cell_…`: every grid cell has one class, that of most of its pixels. The others: maps interpolated to `POINTS` sample
    points a cell, compared with the mask there. `out_of_fold_…`: on the training split, each row judged by a probe that
    never saw it. `probe_…`: on the split `measured_on`. `network`: the form of the probe that was kept.
    """

    classes: int
    rows: int
    folds: int
    side: int
    network: str
    out_of_fold_cell_miou: float
    out_of_fold_miou: float
    probe_cell_miou: float | None
    probe_miou: float | None
    measured_on: str | None


def add_maps(path: Path | str, *, seed: int = 0, device: str = "auto") -> MapResult:
    """Write `maps/probe` [N, s, s, C] to every split and measure the grids.

    Raises:
        NoTargets: without a stored grid, or with fewer labeled rows than classes.
    """
    store = open_store(path)
    check_writable(store.path, "store")
    plan, place = plan_fit(store, "mask", seed), pick_device(device)
    cells = sample_cells(
        plan, lambda rows: class_shares_of(plan, plan.train, rows), lambda goal: goal.sum(-1) > 0
    )
    fitted = {
        network: fit_folds(plan, cells, soft_entropy, plan.classes, network, place)
        for network in (LINEAR, TWO_LAYERS)
    }
    entropy = {network: out_of_fold_entropy(plan, probes, place) for network, probes in fitted.items()}
    network = min(entropy, key=entropy.__getitem__)
    for kind, value in entropy.items():
        log.info("probe of cells, %s: cross-entropy %.3f out of fold", kind, value)
    write_maps(path, plan, fitted[network], place)
    return measure_maps(open_store(path), plan, network)


# -- soft labels of cells ----------------------------------------------------------------------------------------------


def read_masks(plan: FitPlan, split: Split, rows: Rows) -> npt.NDArray[np.uint8]:
    """The masks in the teacher's view, at the sample points: uint8 [n, s·POINTS, s·POINTS], 255 ignored."""
    size = plan.side * POINTS
    shown = plan.preprocessing
    masks = np.full((len(rows), size, size), IGNORE, np.uint8)
    for mask, data in zip(masks, split.ragged(rows, names.MASK), strict=True):
        if data.size:
            image = Image.fromarray(decode_mask(data.tobytes()))
            view = resize_view(shown.resize, image.size, shown.image_size)
            mask[...] = np.asarray(view.render(image, size, IGNORE, Image.Resampling.NEAREST))
    return masks


def class_shares(masks: npt.NDArray[np.uint8], side: int, classes: int) -> Tensor:
    """The share of every class in each cell: masks uint8 [n, S, S] → float32 [n, side, side, C].

    Sums to the share of the cell that is labeled.
    """
    ids = torch.from_numpy(masks).long()
    points = ids.shape[1] // side
    one_hot = torch.zeros(len(ids), side, side, classes + 1)
    cells = ids.unflatten(1, (side, points)).unflatten(3, (side, points)).transpose(2, 3).flatten(3)
    cells = torch.where(cells < classes, cells, classes)
    one_hot.scatter_add_(3, cells, torch.ones(cells.shape))
    return one_hot[..., :classes] / points**2


def class_shares_of(plan: FitPlan, split: Split, rows: Rows) -> Tensor:
    return class_shares(read_masks(plan, split, rows), plan.side, plan.classes)


def soft_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of class logits with the shares [n, C], weighted by the labeled part of each cell."""
    return -(shares * logits.log_softmax(1)).sum() / shares.sum()


def mean_distribution(logits: Tensor) -> Tensor:
    """Logits of several probes [P, …, C] → log of their mean probabilities [..., C]."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def predict_maps(
    plan: FitPlan, split: Split, rows: Rows, probes: Sequence[CellProbe], device: torch.device
) -> Tensor:
    """Log-probabilities float32 [n, s, s, C] of rows, out of fold."""
    return predict_rows(plan, split, rows, probes, device, mean_distribution)


def out_of_fold_entropy(plan: FitPlan, probes: Sequence[CellProbe], device: torch.device) -> float:
    """Mean cross-entropy of the labeled cells of at most FIT_CELLS / s² labeled rows, out of fold."""
    rows = plan.labeled
    most = max(1, FIT_CELLS // plan.side**2)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(plan.seed).choice(rows, most, replace=False))
    total = count = 0.0
    for block in blocks_of(rows):
        shares = class_shares_of(plan, plan.train, block)
        total -= float((shares * predict_maps(plan, plan.train, block, probes, device)).sum())
        count += float(shares.sum())
    return total / max(count, 1e-12)


# -- writing and measuring ---------------------------------------------------------------------------------------------


def write_maps(path: Path | str, plan: FitPlan, probes: Sequence[CellProbe], device: torch.device) -> None:
    """Write `maps/probe` of every split; existing ones are replaced, an interrupted run resumes."""
    job = add_arrays(path, [map_array(names.PROBE, plan.side, plan.classes)], replace=True)
    for name, split in open_store(path).items():
        with StoreWriter(path, name, job=job) as writer:
            for rows in blocks_of(np.arange(writer.next_row, len(split))):
                stored = encode_maps(predict_maps(plan, split, rows, probes, device))
                stored[~split.valid[rows]] = 0  # all classes equally likely: of no weight in training
                writer.append({f"{names.MAPS}/{names.PROBE}": stored})
    finalize_store(path, job=job)


def encode_maps(log_probabilities: Tensor) -> npt.NDArray[np.uint8]:
    """Log-probabilities, at most 0, as they are stored: uint8, see `store.format.MAP_STEPS`."""
    return (log_probabilities * -names.MAP_STEPS).round().clamp(0, 255).to(torch.uint8).numpy()


def measure_maps(store: Store, plan: FitPlan, network: str) -> MapResult:
    """Mean IoU of the maps just written, see `MapResult`."""
    train, other = store[plan.train.name], measured_split(store, plan.train, "mask")
    out_of_fold = mean_ious(plan, train, plan.labeled)
    # A copy of a training image is predicted out of fold, so no row has to be left out.
    measured = None if other is None else mean_ious(plan, other, labeled_rows_of(other, "mask"))
    return MapResult(
        classes=plan.classes,
        rows=len(plan.labeled),
        folds=plan.folds,
        side=plan.side,
        network=network,
        out_of_fold_cell_miou=out_of_fold[0],
        out_of_fold_miou=out_of_fold[1],
        probe_cell_miou=measured[0] if measured else None,
        probe_miou=measured[1] if measured else None,
        measured_on=other.name if other is not None else None,
    )


def mean_ious(plan: FitPlan, split: Split, rows: Rows) -> tuple[float, float]:
    """Mean IoU of the grid's cells and of the sample points, of stored maps."""
    array, grid = f"{names.MAPS}/{names.PROBE}", split.specs[names.GRID].row_shape[0]
    cells, points = (torch.zeros(plan.classes, plan.classes, dtype=torch.int64) for _ in range(2))
    for block in blocks_of(rows):
        masks = read_masks(plan, split, block)
        log_p = torch.from_numpy(split.gather(block, [array])[array]).float() / -names.MAP_STEPS
        fine = interpolate(log_p, masks.shape[1]).argmax(-1)
        points += confusion(torch.from_numpy(masks).long(), fine, plan.classes)
        shares = class_shares(masks, grid, plan.classes)
        most = torch.where(shares.sum(-1) > 0, shares.argmax(-1), IGNORE)
        coarse = functional.avg_pool2d(log_p.exp().permute(0, 3, 1, 2), plan.side // grid).argmax(1)
        cells += confusion(most, coarse, plan.classes)
    return mean_iou(cells), mean_iou(points)


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts int64 [C, C], true class first; ids of `truth` beyond the classes do not count."""
    known = truth < classes
    pairs = truth[known] * classes + predicted[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over the classes that occur."""
    both, truth = counts.diagonal().double(), counts.sum(1)
    union = (truth + counts.sum(0)).double() - both
    present = truth > 0
    return float((both / union.clamp_min(1))[present].mean())
