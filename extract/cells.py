"""Probes of grid cells: which rows and cells a fit sees, the networks, and predictions out of fold.

A probe is fitted on the labeled rows of the training split, a fold at a time, so that no prediction for a row comes from a
probe that saw the row or a copy of its file. Rows that are not labeled get the mean of all folds' predictions. The probes of
whole images (logits.py) take their folds from here too.

Shapes: `N` rows, `n` cells, `g` side of a stored grid, `s` side of the interpolated grids, `D` width of the features (`ΣD`: of
all layers), `C` classes, `K` outputs of a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from store import format as names
from store.errors import DistillError
from store.format import Preprocessing
from store.quality import assign_folds
from store.reader import Split, Store
from store.summary import TARGET_ARRAYS, unlabeled_rows

LINEAR, TWO_LAYERS = "linear", "two layers"

#: A probe's grid is interpolated to a multiple of the stored side, at most four times it, and at most this.
MOST_SIDE = 32
#: Cells, and values of their features, that a fit sees at most: half a gigabyte of float32, 1,280 channels of 100,000 cells.
FIT_CELLS, FIT_VALUES = 100_000, 128_000_000
#: Rows that are read at once: a native grid of Qwen2.5-VL at 448 px has 5 MB in float32.
BLOCK_ROWS = 16

STEPS, BATCH_CELLS, LEARNING_RATE, WEIGHT_DECAY = 400, 1024, 2e-3, 0.1
HIDDEN, DROPOUT = 128, 0.3
#: Standard deviations: a channel that the labeled rows hardly excite has a tiny one, and a new image excites it.
OUTLIER = 5.0

Rows = npt.NDArray[np.int64]
FOLDS = 5


class NoTargets(DistillError):
    """A probe of cells cannot be fitted: too few labeled rows, or no grid."""


# -- what is fitted on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitPlan:
    """Which rows a fit may see. `fold`: split → [N], the fold that holds a labeled copy of each row, -1 where none does.

    `labeled`: labeled rows of the training split, in ascending order; `side`: of the interpolated grid.
    """

    store: Store
    kind: str
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


def plan_fit(store: Store, kind: str, seed: int) -> FitPlan:
    """For targets of a kind, `mask` or `boxes`. Raises NoTargets for a store that cannot serve it."""
    train = training_split(store)
    classes = len(store.manifest.class_names)
    if names.GRID not in train.names:
        raise NoTargets(f"{store.location}: a probe of cells needs a stored grid: extract with --grid 16")
    labeled = labeled_rows_of(train, kind)
    if len(labeled) < max(2, classes):
        raise NoTargets(
            f"{store.location}: {len(labeled)} of {len(train)} rows of {train.name} are labeled, a probe of {classes} "
            f"classes needs {max(2, classes)} or more: label more images"
        )
    usable = np.zeros(len(train), dtype=bool)
    usable[labeled] = True
    groups = content_groups(store)
    fold = assign_folds(np.zeros(len(train), np.int32), usable, groups[train.name], FOLDS, seed)
    fold = np.where(usable, fold, -1)
    return FitPlan(
        store=store,
        kind=kind,
        train=train,
        labeled=labeled,
        fold=folds_of_copies(groups, train.name, fold),
        folds=int(fold.max()) + 1,
        classes=classes,
        side=fine_side(*(train.specs[name].row_shape[0] for name in grids_of(train))),
        seed=seed,
    )


def labeled_rows_of(split: Split, kind: str) -> Rows:
    """Valid labeled rows; of boxes also images without objects, if that is known."""
    if TARGET_ARRAYS[kind] not in split.names:
        return np.empty(0, np.int64)
    return np.flatnonzero(split.valid & ~unlabeled_rows(split, kind))


def measured_split(store: Store, train: Split, kind: str) -> Split | None:
    """The split that a probe is measured on: the first of `val` and `test` with labeled rows."""
    others = (store[name] for name in ("val", "test") if name in store and name != train.name)
    return next((split for split in others if len(labeled_rows_of(split, kind))), None)


def grids_of(split: Split) -> list[str]:
    """The arrays that a probe sees: the last layer's grid, then those of further layers, by number.

    Earlier layers of a convolutional teacher have finer cells: the last one knows what a cell shows, they where it ends.
    """
    return [names.GRID, *map(names.layer_grid, sorted(names.stored_layers(split.names)))]


def fine_side(grid: int, *further: int) -> int:
    """The side that grids are interpolated to: a multiple of the last layer's, finer than it where it is coarse.

    further: sides of other layers' grids; up to MOST_SIDE they are not made coarser.
    """
    finest = min(max((grid, *further)), MOST_SIDE)
    return grid * max(1, min(4, MOST_SIDE // grid), -(-finest // grid))


def read_cells(split: Split, rows: Rows, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Features float32 [n, side, side, ΣD] of all stored layers, in true units; zeros for bad rows."""
    parts = []
    for name in grids_of(split):
        grid = torch.from_numpy(np.nan_to_num(split.true_values(rows, name)))
        parts.append(interpolate(grid.to(device), side))
    return torch.cat(parts, -1)


def interpolate(values: Tensor, side: int) -> Tensor:
    """[n, h, w, K] → [n, side, side, K], bilinear between the centers of cells."""
    maps = values.permute(0, 3, 1, 2)
    return functional.interpolate(maps, size=(side, side), mode="bilinear").permute(0, 2, 3, 1)


def blocks_of(rows: Rows) -> Iterator[Rows]:
    for first in range(0, len(rows), BLOCK_ROWS):
        yield rows[first : first + BLOCK_ROWS]


class Cells(NamedTuple):
    """Labeled cells that fits may see: features [n, D], targets [n, K'], fold int64 [n]."""

    features: Tensor
    targets: Tensor
    fold: Tensor

    def without(self, fold: int) -> Cells:
        kept = self.fold != fold
        return Cells(*(values[kept] for values in self))


def sample_cells(
    plan: FitPlan, targets_of: Callable[[Rows], Tensor], counted: Callable[[Tensor], Tensor]
) -> Cells:
    """At most FIT_CELLS cells of the labeled rows, fewer of wide features (FIT_VALUES), evenly many of each.

    targets_of: rows [n] → targets [n, s, s, K']. counted: targets [m, K'] → bool [m], which cells are labeled.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    rows = plan.labeled
    width = sum(plan.train.specs[name].row_shape[-1] for name in grids_of(plan.train))
    most = min(FIT_CELLS, FIT_VALUES // width)
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows), generator=generator)[:most].sort().values.numpy()]
    each = min(plan.side**2, most // len(rows))
    parts: list[Cells] = []
    for block in blocks_of(rows):
        fine = read_cells(plan.train, block, plan.side).flatten(1, 2)
        targets = targets_of(block).flatten(1, 2)
        for row, cells, goal in zip(block.tolist(), fine, targets, strict=True):
            some = torch.randperm(len(cells), generator=generator)[:each]
            some = some[counted(goal[some])]
            fold = int(plan.fold[plan.train.name][row])
            parts.append(Cells(cells[some], goal[some], torch.full((len(some),), fold)))
    return Cells(*(torch.cat(values) for values in zip(*parts, strict=True)))


# -- the probes --------------------------------------------------------------------------------------------------------


class CellProbe(nn.Module):
    """Features of cells [..., D], true units → outputs [..., K]."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, std: Tensor, outputs: int, network: str) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        varies = std > 1e-6 * std.max().clamp_min(1e-12)
        self.register_buffer("inverse", torch.where(varies, 1 / std.clamp_min(1e-30), 0.0))
        width = len(mean)
        if network == LINEAR:
            self.layers: nn.Module = nn.Linear(width, outputs)
        else:
            self.layers = nn.Sequential(
                nn.Dropout(DROPOUT),
                nn.Linear(width, HIDDEN),
                nn.GELU(),
                nn.Dropout(DROPOUT),
                nn.Linear(HIDDEN, outputs),
            )

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.layers(((features - self.mean) * self.inverse).clamp(-OUTLIER, OUTLIER))
        return outputs


#: Outputs [n, K] and targets [n, K'] of cells → scalar.
CellLoss = Callable[[Tensor, Tensor], Tensor]


def fit_cells(
    cells: Cells, loss: CellLoss, outputs: int, network: str, seed: int, device: torch.device
) -> CellProbe:
    """A probe fitted by AdamW; a function of its arguments alone on a CPU."""
    std, mean = torch.std_mean(cells.features, 0, correction=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        probe = CellProbe(mean, std, outputs, network).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            some = torch.randint(len(cells.features), (BATCH_CELLS,), generator=generator)
            value = loss(probe(cells.features[some].to(device)), cells.targets[some].to(device))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return probe.eval().requires_grad_(False)


def fit_folds(
    plan: FitPlan, cells: Cells, loss: CellLoss, outputs: int, network: str, device: torch.device
) -> list[CellProbe]:
    """One probe for each fold, fitted on the labeled cells of the other folds."""
    if not all((cells.fold != number).any() for number in range(plan.folds)):
        raise NoTargets(f"{plan.store.location}: fewer than two rows have a labeled cell (255 is ignored)")
    # One after the other: each is a copy of most of the cells.
    return [
        fit_cells(cells.without(number), loss, outputs, network, plan.seed, device)
        for number in range(plan.folds)
    ]


@torch.inference_mode()
def predict_rows(
    plan: FitPlan,
    split: Split,
    rows: Rows,
    probes: Sequence[CellProbe],
    device: torch.device,
    mean: Callable[[Tensor], Tensor],
) -> Tensor:
    """Outputs float32 [n, s, s, K] of rows: of the probe that left out their fold, else the mean of all.

    mean: outputs of several probes [P, …, K] → [..., K].
    """
    fine = read_cells(split, rows, plan.side, device)
    fold = torch.from_numpy(plan.fold[split.name][rows])
    parts: dict[int, Tensor] = {}
    for number in fold.unique().tolist():
        own = list(probes) if number < 0 else [probes[number]]
        chosen = fine[(fold == number).to(device)]
        parts[number] = mean(torch.stack([probe(chosen) for probe in own])).cpu()
    result = torch.empty(len(rows), *next(iter(parts.values())).shape[1:])
    for number, values in parts.items():
        result[fold == number] = values
    return result


def training_split(store: Store) -> Split:
    """`train`, or the largest split."""
    return store["train" if "train" in store else max(store.splits, key=lambda name: len(store[name]))]


def content_groups(store: Store) -> dict[str, npt.NDArray[np.int64]]:
    """Split → int64 [N]: rows of equal content have equal numbers, across splits."""
    content = {name: np.ascontiguousarray(split.read(names.CONTENT)) for name, split in store.items()}
    digests = np.concatenate(
        [rows.view(np.dtype((np.void, rows.shape[1]))).ravel() for rows in content.values()]
    )
    numbers = np.asarray(np.unique(digests, return_inverse=True)[1]).ravel()
    ends = np.cumsum([len(rows) for rows in content.values()])[:-1]
    return dict(zip(content, np.split(numbers, ends), strict=True))


def folds_of_copies(
    groups: Mapping[str, npt.NDArray[np.int64]], train: str, fold: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Split → [N]: the fold that holds a labeled copy of each row (or the row itself), -1 where none does."""
    folds = np.full(max(int(numbers.max(initial=-1)) for numbers in groups.values()) + 1, -1)
    labeled = fold >= 0
    folds[groups[train][labeled]] = fold[labeled]
    return {split: folds[numbers] for split, numbers in groups.items()}
