"""`logits/*` of a complete store: out-of-fold logits of a linear probe, or the full model's zero-shot scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from console.log import get_logger
from console.stop import StopRequest
from extract.config import ZERO_SHOT, ExtractConfig
from extract.result import ExtractObserver, logits_stop_message
from files.writing import check_writable
from processes.deadline import StopDeadline
from store import format as names
from store.create import add_arrays
from store.errors import DistillError
from store.finalize import finalize_store
from store.format import logits_array
from store.quality import Probe, assign_folds, fit_probe, knn_accuracy
from store.reader import Split, Store, open_store
from store.writer import StoreWriter

log = get_logger("extract")

PROBE = "probe"
FOLDS = 5
# Rows that one probe is fitted on at most: beyond that it gets slow, and hardly better.
FIT_ROWS = 50_000
BLOCK_ROWS = 8192

Floats = npt.NDArray[np.float32]


class NoLabels(DistillError):
    """A probe cannot be fitted: there are no class labels."""


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies of the stored features, fractions of 1. None where a split or its labels are missing.

    out_of_fold_top1: on the training split, each row judged by a probe that never saw it.
    probe_top1, knn_top1: fitted on the training split, measured on `measured_on`.
    """

    classes: int
    rows: int
    folds: int
    out_of_fold_top1: float
    probe_top1: float | None
    knn_top1: float | None
    measured_on: str | None


def add_logits(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> dict[str, Any] | None:
    """What `--logits` asks for, unless the store has it already. The probe's accuracies, if there is one."""
    array = f"{names.LOGITS}/{config.logits}"
    if all(array in open_store(config.out)[split].names for split in open_store(config.out).splits):
        return None
    with StopDeadline(stop, lambda: logits_stop_message(config)) as deadline:
        if config.logits.startswith(ZERO_SHOT):
            from extract.score import add_zero_shot

            add_zero_shot(config, observers, stop, deadline)
            return None
        log.info("fitting the linear probe, %d folds", FOLDS)
        return vars(add_probe(config.out, seed=config.seed))


# -- the probe ------------------------------------------------------------------------------------------


def add_probe(path: Path | str, *, seed: int = 0) -> ProbeResult:
    """Write `logits/probe` [N, C] to every split and measure the features.

    No row's logits come from a probe that saw the row or a copy of its file: k folds over the labeled training rows,
    grouped by content. Rows without a labeled copy, of any split, get those of a probe over all of them.

    Raises:
        NoLabels: when the training split has fewer than two labeled rows.
    """
    store = open_store(path)
    check_writable(store.path, "store")
    train = store["train" if "train" in store else max(store.splits, key=lambda name: len(store[name]))]
    labels = labels_of(train)
    usable = train.valid & (labels != names.NO_LABEL)
    if usable.sum() < 2 or not store.manifest.class_names:
        raise NoLabels(f"{path}: {int(usable.sum())} labeled rows, a linear probe needs class labels")
    classes = len(store.manifest.class_names)
    groups = content_groups(store)
    fold = np.where(usable, assign_folds(labels, usable, groups[train.name], FOLDS, seed), -1)
    probes = fit_folds(train, labels, fold, classes, seed)
    whole = fit_on(train, np.flatnonzero(usable), labels, classes, seed)
    held_out = folds_of_copies(groups, train.name, fold)
    predictors = {split: fold_predictor(held_out[split], probes, whole) for split in store.splits}
    write_logits(path, PROBE, classes, lambda split: predict(store[split], predictors[split]))
    return measure(open_store(path), train.name, labels, classes, whole, fold, seed)


def fit_folds(
    train: Split, labels: npt.NDArray[np.int32], fold: npt.NDArray[Any], classes: int, seed: int
) -> list[Probe]:
    """One probe for each fold, fitted on the other folds."""
    count = int(fold.max()) + 1
    rows = [np.flatnonzero((fold >= 0) & (fold != number)) for number in range(count)]
    return [fit_on(train, chosen, labels, classes, seed) for chosen in rows]


def fit_on(
    split: Split, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], classes: int, seed: int
) -> Probe:
    """A probe fitted on at most FIT_ROWS of the rows."""
    rows = limited(rows, seed)
    return fit_probe(true_features(split, rows), labels[rows], classes)


def fold_predictor(
    fold: npt.NDArray[Any], probes: Sequence[Probe], whole: Probe
) -> Callable[[int, Floats], Floats]:
    """Logits of the rows from `first` on: by the probe that left out their fold; by `whole` where that is -1."""

    def predict_rows(first: int, features: Floats) -> Floats:
        numbers = fold[first : first + len(features)]
        logits = whole.logits(features)
        for number, probe in enumerate(probes):
            chosen = numbers == number
            if chosen.any():
                logits[chosen] = probe.logits(features[chosen])
        return logits

    return predict_rows


def predict(split: Split, predictor: Callable[[int, Floats], Floats]) -> Iterator[Floats]:
    """Blocks of logits, in row order; NaN for invalid rows."""
    for first in range(0, len(split), BLOCK_ROWS):
        rows = np.arange(first, min(len(split), first + BLOCK_ROWS))
        logits = predictor(first, np.nan_to_num(true_features(split, rows)))
        logits[~split.valid[rows]] = np.nan
        yield logits


def measure(
    store: Store,
    train: str,
    labels: npt.NDArray[np.int32],
    classes: int,
    whole: Probe,
    fold: npt.NDArray[Any],
    seed: int,
) -> ProbeResult:
    """Accuracies of the logits just written, and of k-NN, see `ProbeResult`."""
    held_out = accuracy(read_logits(store[train]), labels, fold >= 0)
    other = next((name for name in ("val", "test") if name in store and name != train), None)
    probe_top1 = knn_top1 = None
    if other is not None:
        other_labels = labels_of(store[other])
        judged = store[other].valid & (other_labels != names.NO_LABEL)
        if judged.any():
            probe_top1 = accuracy(read_logits(store[other]), other_labels, judged)
            bank = limited(np.flatnonzero(fold >= 0), seed)
            queries = limited(np.flatnonzero(judged), seed)
            knn_top1 = knn_accuracy(
                true_features(store[train], bank),
                labels[bank],
                true_features(store[other], queries),
                other_labels[queries],
            )
    return ProbeResult(
        classes=classes,
        rows=int((fold >= 0).sum()),
        folds=int(fold.max()) + 1,
        out_of_fold_top1=held_out,
        probe_top1=probe_top1,
        knn_top1=knn_top1,
        measured_on=other if probe_top1 is not None else None,
    )


def limited(rows: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """At most FIT_ROWS of the rows."""
    if len(rows) <= FIT_ROWS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, FIT_ROWS, replace=False))


def accuracy(logits: Floats, labels: npt.NDArray[np.int32], rows: npt.NDArray[np.bool_]) -> float:
    """Top-1 accuracy over the chosen rows."""
    return float((logits[rows].argmax(axis=1) == labels[rows]).mean())


def read_logits(split: Split) -> Floats:
    return split.read(f"{names.LOGITS}/{PROBE}").astype(np.float32)


def labels_of(split: Split) -> npt.NDArray[np.int32]:
    """int32 [N], -1 where there is no label."""
    if names.LABEL in split.names:
        return split.read(names.LABEL)
    return np.full(len(split), names.NO_LABEL, np.int32)


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


def true_features(split: Split, rows: npt.NDArray[np.int64]) -> Floats:
    """Pooled features float32 [n, D] in true units."""
    stored = split.gather(rows, [names.POOLED])[names.POOLED]
    return np.asarray(stored.astype(np.float32) * split.scale[names.POOLED], np.float32)


# -- writing --------------------------------------------------------------------------------------------


def write_logits(
    path: Path | str, name: str, classes: int, blocks: Callable[[str], Iterator[Floats]]
) -> None:
    """Write `logits/<name>` of every split from blocks [b, C] in row order; existing ones are replaced."""
    job = add_arrays(path, [logits_array(name, classes)], replace=True)
    store = open_store(path)
    for split in store.splits:
        with StoreWriter(path, split, job=job) as writer:
            row = 0
            for block in blocks(split):
                fresh = block[max(0, writer.next_row - row) :]  # an interrupted run has committed the others
                row += len(block)
                if len(fresh):
                    finite = np.asarray(np.isfinite(fresh).all(axis=1))
                    writer.append({f"{names.LOGITS}/{name}": fresh}, valid=finite)
    finalize_store(path, job=job)
