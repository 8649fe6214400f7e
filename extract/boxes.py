"""What the stored grids of a data set with boxes are worth: objects found and told apart by a probe of every grid cell.

The probe learns which class of object has its middle in a cell, or none, from the cell's features (`extract.cells`). It
measures whether the features know where objects are and of what class. It predicts no boxes.

Coordinates are fractions of the teacher's view. Shapes: `s` side of the interpolated grid, `C` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from console.output import get_logger
from extract.cells import (
    LINEAR,
    TWO_LAYERS,
    CellProbe,
    FitPlan,
    Rows,
    blocks_of,
    fit_folds,
    labeled_rows_of,
    measured_split,
    plan_fit,
    predict_rows,
    sample_cells,
)
from extract.teachers.devices import pick_device
from imaging.geometry import resize_view
from store import format as names
from store.reader import Split, open_store

log = get_logger("extract")

#: A cell is in the middle of an object when its center is inside and at most so many cells from the object's center.
RADIUS = 1.5
#: Cells that do not count: letterbox padding.
OUTSIDE = -1


@dataclass(frozen=True)
class BoxResult:
    """What the stored grids are worth for detection, as fractions of 1. None where labeled rows are missing.

    objectness_ap: average precision of the cells' highest class score, for cells in the middle of an object.
    class_accuracy: of the cells in the middle of an object. `out_of_fold_…`: on the training split, each row judged by a
    probe that never saw it. `probe_…`: on the split `measured_on`. `network`: the form of the probe that was kept.
    """

    classes: int
    rows: int
    folds: int
    side: int
    network: str
    out_of_fold_objectness_ap: float
    out_of_fold_class_accuracy: float
    probe_objectness_ap: float | None
    probe_class_accuracy: float | None
    measured_on: str | None


def measure_boxes(path: Path | str, *, seed: int = 0, device: str = "auto") -> BoxResult:
    """Fit and measure; writes nothing.

    Raises:
        NoTargets: without a stored grid, or with fewer labeled rows than classes.
    """
    store = open_store(path)
    plan, place = plan_fit(store, "boxes", seed), pick_device(device)
    cells = sample_cells(
        plan,
        lambda rows: cell_classes(plan, plan.train, rows).unsqueeze(-1),
        lambda goal: goal[:, 0] != OUTSIDE,
    )
    measured = {}
    for network in (LINEAR, TWO_LAYERS):
        probes = fit_folds(plan, cells, class_entropy, plan.classes, network, place)
        figures = measure_rows(plan, plan.train, plan.labeled, probes, place)
        log.info("probe of cells, %s: objectness AP %.3f out of fold", network, figures["objectness_ap"])
        measured[network] = figures, probes
    network = max(measured, key=lambda name: measured[name][0]["objectness_ap"])
    figures, probes = measured[network]
    other = measured_split(store, plan.train, "boxes")
    rows = None if other is None else labeled_rows_of(other, "boxes")
    judged = None if other is None or rows is None else measure_rows(plan, other, rows, probes, place)
    return BoxResult(
        classes=plan.classes,
        rows=len(plan.labeled),
        folds=plan.folds,
        side=plan.side,
        network=network,
        out_of_fold_objectness_ap=figures["objectness_ap"],
        out_of_fold_class_accuracy=figures["class_accuracy"],
        probe_objectness_ap=judged["objectness_ap"] if judged else None,
        probe_class_accuracy=judged["class_accuracy"] if judged else None,
        measured_on=other.name if other is not None else None,
    )


def cell_classes(plan: FitPlan, split: Split, rows: Rows) -> Tensor:
    """float32 [n, s, s]: the class whose object has its middle there, C for none, OUTSIDE for padding."""
    side, shown = plan.side, plan.preprocessing
    sizes = np.maximum(split.gather(rows, [names.SIZES])[names.SIZES], 1)
    targets = np.zeros((len(rows), side, side), np.float32)
    boxes, labels = split.ragged(rows, names.BOXES), split.ragged(rows, names.BOX_CLASSES)
    for target, size, box, label in zip(targets, sizes, boxes, labels, strict=True):
        view = resize_view(shown.resize, (int(size[0]), int(size[1])), shown.image_size)
        target[...] = np.where(view.inside(side, side), plan.classes, OUTSIDE)
        cells = view.boxes_to_view(box.reshape(-1, 4) / np.tile(size, 2)) * side
        # The smallest object last: where two have their middle, it is the one in front.
        for number in np.argsort(-np.prod(cells[:, 2:] - cells[:, :2], axis=1)):
            target[middle_cells(cells[number], side)] = label[number]
    return torch.from_numpy(targets)


def middle_cells(
    box: npt.NDArray[np.float64], side: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices of the cells in the middle of a box (in cells), the nearest one where there is none."""
    centers, near = np.arange(side) + 0.5, []
    for axis in (1, 0):  # rows, columns
        middle = (box[axis] + box[axis + 2]) / 2
        inside = (centers > box[axis]) & (centers < box[axis + 2]) & (np.abs(centers - middle) < RADIUS)
        own = np.flatnonzero(inside)
        near.append(own if len(own) else np.clip(np.array([int(middle)]), 0, side - 1))
    rows, columns = np.meshgrid(*near, indexing="ij")
    return rows, columns


def class_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class [n, C], over the number of cells with an object."""
    classes = logits.shape[1]
    label = targets[:, 0].long()
    truth = functional.one_hot(label, classes + 1)[:, :classes].float()
    total = functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    return total / truth.sum().clamp_min(1)


def measure_rows(
    plan: FitPlan, split: Split, rows: Rows, probes: Sequence[CellProbe], device: torch.device
) -> dict[str, float]:
    """`objectness_ap` and `class_accuracy` of labeled rows, see `BoxResult`; 0 without an object."""
    from sklearn.metrics import average_precision_score

    logits, label = (
        torch.cat(parts) for parts in zip(*judge(plan, split, rows, probes, device), strict=True)
    )
    is_object = label < plan.classes
    if not is_object.any():
        return {"objectness_ap": 0.0, "class_accuracy": 0.0}
    return {
        "objectness_ap": float(average_precision_score(is_object, logits.max(1).values)),
        "class_accuracy": float((logits.argmax(1) == label)[is_object].float().mean()),
    }


def judge(
    plan: FitPlan, split: Split, rows: Rows, probes: Sequence[CellProbe], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Class logits [n, C] and true classes int64 [n] of the cells that count, some rows at a time."""
    for block in blocks_of(rows):
        outputs = predict_rows(plan, split, block, probes, device, lambda values: values.mean(0))
        target = cell_classes(plan, split, block)
        counted = target != OUTSIDE
        yield outputs[counted], target[counted].long()
