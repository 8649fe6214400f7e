"""`maps/probe` of a store with masks: soft class maps of a probe of every grid cell, predicted out of fold.

The probe learns which share of a cell's pixels each class has (soft labels), from the cell's features. It is fitted on
the labeled rows of the training split, a fold at a time, so that no row's map comes from a probe that saw the row or a
copy of its file. Rows without a mask get the mean of all folds' predictions. Both forms are fitted, linear and with one
hidden layer; the one with the lower cross-entropy on the rows that it did not see is kept.

Shapes: `N` rows, `g` side of the stored grid, `s` side of the maps, `D` width of the features, `C` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from console.log import get_logger
from extract.folds import FOLDS, content_groups, folds_of_copies, training_split
from files.writing import check_writable
from imaging.geometry import resize_view
from imaging.masks import IGNORE, decode_mask
from store import format as names
from store.create import add_arrays
from store.errors import DistillError
from store.finalize import finalize_store
from store.format import Preprocessing, map_array
from store.quality import assign_folds
from store.reader import Split, Store, open_store
from store.writer import StoreWriter

log = get_logger("extract")

PROBE = "probe"
LINEAR, TWO_LAYERS = "linear", "two layers"

#: A map's side is a multiple of the grid's, at most four times it, and at most this.
MOST_SIDE = 32
#: Sample points of a mask along a side of a map's cell: a cell's soft label is the histogram of 64 pixels.
POINTS = 8
#: Cells that a fit sees at most: 1,280 channels of float32 are half a gigabyte.
FIT_CELLS = 100_000
#: Rows that are read at once: a native grid of Qwen2.5-VL at 448 px has 5 MB in float32.
BLOCK_ROWS = 16

STEPS, BATCH_CELLS, LEARNING_RATE, WEIGHT_DECAY = 400, 1024, 2e-3, 0.1
HIDDEN, DROPOUT = 128, 0.3
#: Standard deviations: a channel that the labeled rows hardly excite has a tiny one, and a new image excites it.
OUTLIER = 5.0

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class NoMasks(DistillError):
    """A probe of cells cannot be fitted: too few masks, or no grid."""


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
        NoMasks: without a stored grid, or with fewer labeled rows than classes.
    """
    store = open_store(path)
    check_writable(store.path, "store")
    plan = plan_fit(store, seed)
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    cells = sample_cells(plan)
    fitted = {network: fit_folds(plan, cells, network, place) for network in (LINEAR, TWO_LAYERS)}
    entropy = {network: out_of_fold_entropy(plan, probes, place) for network, probes in fitted.items()}
    network = min(entropy, key=entropy.__getitem__)
    for kind, value in entropy.items():
        log.info("probe of cells, %s: cross-entropy %.3f out of fold", kind, value)
    write_maps(path, plan, fitted[network], place)
    return measure_maps(open_store(path), plan, network)


# -- what is fitted on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitPlan:
    """Which rows a fit may see. `fold`: split → [N], the fold that holds a labeled copy of each row, -1 where none does.

    `labeled`: rows of the training split with a mask, in ascending order.
    """

    store: Store
    train: Split
    labeled: Rows
    fold: dict[str, npt.NDArray[Any]]
    folds: int
    classes: int
    side: int
    seed: int

    @property
    def preprocessing(self) -> Preprocessing:
        return self.store.manifest.preprocessing


def plan_fit(store: Store, seed: int) -> FitPlan:
    """Raises NoMasks for a store that cannot serve it."""
    train = training_split(store)
    classes = len(store.manifest.class_names)
    if names.GRID not in train.names:
        raise NoMasks(f"{store.location}: a probe of cells needs a stored grid: extract with --grid 16")
    labeled = np.flatnonzero(train.valid & has_mask(train))
    if len(labeled) < max(2, classes):
        raise NoMasks(
            f"{store.location}: {len(labeled)} of {len(train)} rows of {train.name} have a mask, a probe of {classes} classes "
            f"needs {max(2, classes)} or more: label more images"
        )
    usable = np.zeros(len(train), dtype=bool)
    usable[labeled] = True
    groups = content_groups(store)
    fold = assign_folds(np.zeros(len(train), np.int32), usable, groups[train.name], FOLDS, seed)
    fold = np.where(usable, fold, -1)
    grid = train.specs[names.GRID].row_shape[0]
    return FitPlan(
        store=store,
        train=train,
        labeled=labeled,
        fold=folds_of_copies(groups, train.name, fold),
        folds=int(fold.max()) + 1,
        classes=classes,
        side=map_side(grid),
        seed=seed,
    )


def map_side(grid: int) -> int:
    """The side of the maps of a grid: finer than the grid where that is coarse."""
    return grid * max(1, min(4, MOST_SIDE // grid))


def has_mask(split: Split) -> npt.NDArray[np.bool_]:
    """Bool [N]: rows with a mask."""
    if names.MASK not in split.names:
        return np.zeros(len(split), dtype=bool)
    return np.asarray(np.diff(split.read(split.specs[names.MASK].offsets_name)) > 0)


def read_grids(split: Split, rows: Rows) -> Tensor:
    """Grids float32 [n, g, g, D] in true units; zeros for bad rows."""
    return torch.from_numpy(np.nan_to_num(split.true_values(rows, names.GRID)))


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


def interpolate(values: Tensor, side: int) -> Tensor:
    """[n, h, w, K] → [n, side, side, K], bilinear between the centers of cells."""
    maps = values.permute(0, 3, 1, 2)
    return functional.interpolate(maps, size=(side, side), mode="bilinear").permute(0, 2, 3, 1)


def blocks_of(rows: Rows) -> Iterator[Rows]:
    for first in range(0, len(rows), BLOCK_ROWS):
        yield rows[first : first + BLOCK_ROWS]


# -- the probe ---------------------------------------------------------------------------------------------------------


class CellProbe(nn.Module):
    """Features of cells [..., D], true units → class logits [..., C]."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int, network: str) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        varies = std > 1e-6 * std.max().clamp_min(1e-12)
        self.register_buffer("inverse", torch.where(varies, 1 / std.clamp_min(1e-30), 0.0))
        width = len(mean)
        if network == LINEAR:
            self.layers: nn.Module = nn.Linear(width, classes)
        else:
            self.layers = nn.Sequential(
                nn.Dropout(DROPOUT),
                nn.Linear(width, HIDDEN),
                nn.GELU(),
                nn.Dropout(DROPOUT),
                nn.Linear(HIDDEN, classes),
            )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(((features - self.mean) * self.inverse).clamp(-OUTLIER, OUTLIER))
        return logits


class Cells(NamedTuple):
    """Labeled cells that fits may see: features [n, D], class shares [n, C], fold int64 [n]."""

    features: Tensor
    shares: Tensor
    fold: Tensor

    def without(self, fold: int) -> Cells:
        kept = self.fold != fold
        return Cells(*(values[kept] for values in self))


def sample_cells(plan: FitPlan) -> Cells:
    """At most FIT_CELLS cells of the labeled rows, evenly many of each."""
    generator = torch.Generator().manual_seed(plan.seed)
    rows = plan.labeled
    if len(rows) > FIT_CELLS:
        rows = rows[torch.randperm(len(rows), generator=generator)[:FIT_CELLS].sort().values.numpy()]
    each = min(plan.side**2, FIT_CELLS // len(rows))
    parts: list[Cells] = []
    for block in blocks_of(rows):
        fine = interpolate(read_grids(plan.train, block), plan.side).flatten(1, 2)
        shares = class_shares(read_masks(plan, plan.train, block), plan.side, plan.classes).flatten(1, 2)
        for row, cells, share in zip(block.tolist(), fine, shares, strict=True):
            some = torch.randperm(len(cells), generator=generator)[:each]
            some = some[share[some].sum(1) > 0]
            fold = int(plan.fold[plan.train.name][row])
            parts.append(Cells(cells[some], share[some], torch.full((len(some),), fold)))
    return Cells(*(torch.cat(values) for values in zip(*parts, strict=True)))


def fit_cells(cells: Cells, network: str, seed: int, device: torch.device) -> CellProbe:
    """Cross-entropy with soft labels by AdamW; a function of its arguments alone on a CPU."""
    std, mean = torch.std_mean(cells.features, 0, correction=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        probe = CellProbe(mean, std, cells.shares.shape[1], network).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            some = torch.randint(len(cells.features), (BATCH_CELLS,), generator=generator)
            inputs, goal = cells.features[some].to(device), cells.shares[some].to(device)
            loss = -(goal * probe(inputs).log_softmax(1)).sum() / goal.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval().requires_grad_(False)


def fit_folds(plan: FitPlan, cells: Cells, network: str, device: torch.device) -> list[CellProbe]:
    """One probe for each fold, fitted on the labeled cells of the other folds."""
    parts = [cells.without(number) for number in range(plan.folds)]
    if not all(len(part.features) for part in parts):
        raise NoMasks(f"{plan.store.location}: fewer than two masks hold a labeled pixel: 255 is ignored")
    return [fit_cells(part, network, plan.seed, device) for part in parts]


@torch.inference_mode()
def predict_rows(
    plan: FitPlan, split: Split, rows: Rows, probes: Sequence[CellProbe], device: torch.device
) -> Tensor:
    """Log-probabilities float32 [n, s, s, C] of rows: of the probe that left out their fold, else the mean of all."""
    fine = interpolate(read_grids(split, rows).to(device), plan.side)
    fold = torch.from_numpy(plan.fold[split.name][rows])
    result = torch.empty(*fine.shape[:3], plan.classes)
    for number in fold.unique().tolist():
        chosen = fold == number
        own = list(probes) if number < 0 else [probes[number]]
        each = torch.stack([probe(fine[chosen.to(device)]).log_softmax(-1) for probe in own])
        result[chosen] = (each.logsumexp(0) - float(np.log(len(own)))).cpu()
    return result


def out_of_fold_entropy(plan: FitPlan, probes: Sequence[CellProbe], device: torch.device) -> float:
    """Mean cross-entropy of the labeled cells of at most FIT_CELLS / s² labeled rows, out of fold."""
    rows = plan.labeled
    most = max(1, FIT_CELLS // plan.side**2)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(plan.seed).choice(rows, most, replace=False))
    total = count = 0.0
    for block in blocks_of(rows):
        shares = class_shares(read_masks(plan, plan.train, block), plan.side, plan.classes)
        total -= float((shares * predict_rows(plan, plan.train, block, probes, device)).sum())
        count += float(shares.sum())
    return total / max(count, 1e-12)


# -- writing and measuring ---------------------------------------------------------------------------------------------


def write_maps(path: Path | str, plan: FitPlan, probes: Sequence[CellProbe], device: torch.device) -> None:
    """Write `maps/probe` of every split; existing ones are replaced, an interrupted run resumes."""
    job = add_arrays(path, [map_array(PROBE, plan.side, plan.classes)], replace=True)
    for name, split in open_store(path).items():
        with StoreWriter(path, name, job=job) as writer:
            for rows in blocks_of(np.arange(writer.next_row, len(split))):
                stored = encode_maps(predict_rows(plan, split, rows, probes, device))
                stored[~split.valid[rows]] = 0  # all classes equally likely: of no weight in training
                writer.append({f"{names.MAPS}/{PROBE}": stored})
    finalize_store(path, job=job)


def encode_maps(log_probabilities: Tensor) -> npt.NDArray[np.uint8]:
    """Log-probabilities, at most 0, as they are stored: uint8, see `store.format.MAP_STEPS`."""
    return (log_probabilities * -names.MAP_STEPS).round().clamp(0, 255).to(torch.uint8).numpy()


def measure_maps(store: Store, plan: FitPlan, network: str) -> MapResult:
    """Mean IoU of the maps just written, see `MapResult`."""
    train = store[plan.train.name]
    out_of_fold = mean_ious(plan, train, plan.labeled)
    other = next(
        (
            name
            for name in ("val", "test")
            if name in store and name != train.name and has_mask(store[name]).any()
        ),
        None,
    )
    measured = None
    if other is not None:
        split = store[other]
        # A copy of a training image is predicted out of fold, so no row has to be left out.
        measured = mean_ious(plan, split, np.flatnonzero(split.valid & has_mask(split)))
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
        measured_on=other if measured else None,
    )


def mean_ious(plan: FitPlan, split: Split, rows: Rows) -> tuple[float, float]:
    """Mean IoU of the grid's cells and of the sample points, of stored maps."""
    array, grid = f"{names.MAPS}/{PROBE}", split.specs[names.GRID].row_shape[0]
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
