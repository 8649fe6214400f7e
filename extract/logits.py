"""`logits/*` of a complete store: out-of-fold logits of a linear probe, or the full model's zero-shot scores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax
from torch import Tensor

from console.output import get_logger
from extract.cells import FOLDS, NoTargets, content_groups, folds_of_copies, plan_fit, training_split
from extract.config import ZERO_SHOT, ConfigError, ExtractConfig
from extract.decode.pool import DecodePool
from extract.encode import AdaptiveBatch, DeviceCopies
from extract.output import adopt_rows
from extract.plan import ExtractTask, decode_workers, make_task, open_data, open_teacher
from extract.propagation import log_probabilities, neighbor_graph, propagate
from extract.result import ExtractObserver, logits_stop_message, note_probe
from extract.teachers.zero_shot import ZeroShotScorer
from files.writing import check_writable
from processes.stop import StopDeadline, Stopped, StopRequest
from store import format as names
from store.create import add_arrays
from store.errors import DistillError
from store.finalize import finalize_store
from store.format import LOGITS, logits_array
from store.metadata import is_url
from store.quality import Probe, assign_folds, fit_probe, knn_accuracy
from store.reader import Split, Store, open_store
from store.replicate import replicate_store, scratch_folder
from store.summary import target_kind
from store.writer import StoreWriter

log = get_logger("extract")

# Rows that one probe is fitted on at most: beyond that it gets slow, and hardly better.
FIT_ROWS = 50_000
BLOCK_ROWS = 8192
# Rows times classes whose probabilities are averaged: four copies of 1 GB.
MOST_AVERAGED = 1 << 28

Floats = npt.NDArray[np.float32]


class NoLabels(DistillError):
    """A probe cannot be fitted: there are no class labels."""


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies of the stored features, fractions of 1. None where a split or its labels are missing.

    out_of_fold_top1: on the training split, each row judged by a probe that never saw it.
    probe_top1, knn_top1: fitted on the training split, measured on `measured_on`.
    propagated: the training split's logits are averaged over similar rows, see extract/propagation.py.
    """

    classes: int
    rows: int
    folds: int
    out_of_fold_top1: float
    probe_top1: float | None
    knn_top1: float | None
    measured_on: str | None
    propagated: bool


def add_logits(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> dict[str, Any] | None:
    """What `--logits` asks for, unless the store has it already. The probe's accuracies, if there is one."""
    store = open_store(config.folder)
    array = array_of(config.logits, store)
    if all(array in split.names for split in store.values()):
        return None
    with StopDeadline(stop, lambda: logits_stop_message(config)) as deadline:
        if config.logits.startswith(ZERO_SHOT):
            add_zero_shot(config, observers, stop, deadline)
            return None
        return probe_store(config.folder, seed=config.seed, device=config.devices[0])


def array_of(logits: str, store: Store) -> str:
    """The array that `--logits` writes: soft class maps of a probe where the store has masks, else logits [N, C]."""
    maps = logits == names.PROBE and target_kind(training_split(store)) == "mask"
    return f"{names.MAPS if maps else names.LOGITS}/{logits}"


def probe_store(path: Path | str, *, seed: int = 0, device: str = "auto") -> dict[str, Any]:
    """Fit the probe that suits the store's targets, write its predictions, measure it and note that with the store. For a
    store at a URL, what the probe needs is copied to this disk temporarily, and nothing is kept.

    Returns the fields of `ProbeResult`, for masks of `extract.maps.MapResult`, for boxes of `extract.boxes.BoxResult`, and
    `task` and `array`, what was written: None for boxes and for a URL.
    """
    if is_url(path):
        return probe_copy(os.fspath(path), seed=seed, device=device)
    result = fit_and_write(Path(path), seed=seed, device=device)
    note_probe(Path(path), result)
    return result


def fit_and_write(path: Path, *, seed: int, device: str) -> dict[str, Any]:
    """The result of `probe_store`, of a store on this disk."""
    store = open_store(path)
    log.info("fitting the probe, %d folds", FOLDS)
    if target_kind(training_split(store)) == "boxes":
        from extract.boxes import measure_boxes

        return {"task": "detection", "array": None, **vars(measure_boxes(path, seed=seed, device=device))}
    array = array_of(names.PROBE, store)
    if array.startswith(names.MAPS):
        from extract.maps import add_maps

        return {"task": "segmentation", "array": array, **vars(add_maps(path, seed=seed, device=device))}
    return {"task": store.manifest.task, "array": array, **vars(add_probe(path, seed=seed))}


def probe_copy(url: str, *, seed: int, device: str) -> dict[str, Any]:
    """`probe_store` on a copy of the arrays that the probe needs. Raises StoreError."""
    with scratch_folder(".probe-") as folder:
        copy, store = folder / "copy.zarr", open_store(url)
        check_targets(store, seed)
        replicate_store(url, str(copy), probed_arrays(training_split(store)))
        try:
            return {**probe_store(copy, seed=seed, device=device), "array": None}
        except (NoLabels, NoTargets) as error:
            raise type(error)(str(error).replace(str(copy), url)) from error


def check_targets(store: Store, seed: int) -> None:
    """Raises NoLabels or NoTargets, before features are downloaded."""
    kind = target_kind(training_split(store))
    if kind in ("boxes", "mask"):
        plan_fit(store, kind, seed)
    else:
        usable_labels(store)


def probed_arrays(split: Split) -> list[str]:
    """The arrays that the split's probe reads: targets, and the features of cells, of frames or of whole images."""
    targets = [name for name in split.specs if name.startswith(names.TARGETS)]
    if target_kind(split) in ("boxes", "mask"):
        return [*targets, *(name for name in split.specs if name.partition("@")[0] == names.GRID)]
    return [*targets, *(name for name in (names.FRAMES, names.POOLED) if name in split.specs)]


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
    train, classes = training_split(store), len(store.manifest.class_names)
    labels, usable = usable_labels(store)
    groups = content_groups(store)
    fold = np.where(usable, assign_folds(labels, usable, groups[train.name], FOLDS, seed), -1)
    probes = fit_folds(train, labels, fold, classes, seed)
    whole = fit_on(train, np.flatnonzero(usable), labels, classes, seed)
    held_out = folds_of_copies(groups, train.name, fold)
    predictors = {split: fold_predictor(held_out[split], probes, whole) for split in store.splits}
    propagated = None
    if (train.valid & ~usable).any():
        propagated = propagated_logits(train, labels, fold, held_out[train.name], probes, whole, seed)

    def blocks(split: str) -> Iterator[Floats]:
        if split == train.name and propagated is not None:
            return iter(np.array_split(propagated, -(-len(propagated) // BLOCK_ROWS)))
        return predict(store[split], predictors[split])

    write_logits(path, names.PROBE, classes, blocks)
    return measure(open_store(path), train.name, labels, classes, fold, seed, propagated is not None)


def propagated_logits(
    train: Split,
    labels: npt.NDArray[np.int32],
    fold: npt.NDArray[Any],
    held_out: npt.NDArray[Any],
    probes: Sequence[Probe],
    whole: Probe,
    seed: int,
) -> Floats | None:
    """The training split's logits [N, C], averaged over rows with similar features (NaN for invalid rows).

    A row's logits come from a pass that did not see its label, nor that of a copy of its file: one pass for each fold, and one
    with all labels for the rows that have none. None where held-out rows' classes are clearly better without, and beyond
    `MOST_AVERAGED`.
    """
    if len(train) * len(whole.bias) > MOST_AVERAGED:
        log.info(
            "averaging over similar images is left out: %s rows of %s classes would take too much memory",
            f"{len(train):,}",
            f"{len(whole.bias):,}",
        )
        return None
    usable, valid = fold >= 0, np.flatnonzero(train.valid)
    graph = neighbor_graph(valid, partial(pooled_features, train), len(train), seed)
    logits = np.full((len(train), len(whole.bias)), np.nan, np.float32)
    right, alone = 0, 0
    for number, probe in ((-1, whole), *enumerate(probes)):
        answers = answers_of(probe, train)
        given = softmax(np.nan_to_num(answers), axis=1)
        shown = usable & (fold != number)
        given[shown] = np.eye(given.shape[1], dtype=np.float32)[labels[shown]]
        averaged = propagate(graph, given)
        rows = train.valid & (held_out == number)
        logits[rows] = log_probabilities(averaged[rows])
        judged = usable & (fold == number)
        right += int((averaged[judged].argmax(axis=1) == labels[judged]).sum())
        alone += int((answers[judged].argmax(axis=1) == labels[judged]).sum())
    count = int(usable.sum())
    worse, spread = (alone - right) / count, np.sqrt(alone * (count - alone) / count) / count
    if worse > spread:
        log.info(
            "averaging over similar images is left out: held-out images %.1f%% right with it, %.1f%% without",
            100 * right / count,
            100 * alone / count,
        )
        return None
    return logits


def usable_labels(store: Store) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Of the training split [N]: labels, and which rows a probe is fitted on. Raises NoLabels when they are too few."""
    train, classes = training_split(store), len(store.manifest.class_names)
    labels = labels_of(train)
    usable = np.asarray(train.valid & (labels != names.NO_LABEL))
    if usable.sum() < 2 or not classes:
        raise NoLabels(
            f"{store.location}: {int(usable.sum())} labeled rows, a linear probe needs class labels"
        )
    if usable.sum() < classes:
        raise NoLabels(
            f"{store.location}: {int(usable.sum())} of {len(train)} rows of {train.name} are labeled, a probe of {classes} "
            f"classes needs {classes} or more: label more images"
        )
    return labels, usable


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
    return fit_probe(true_features(split, rows), labels[rows], classes, blocks=blocks_of(split))


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


def answers_of(probe: Probe, split: Split) -> Floats:
    """The probe's logits [N, C] of all rows; NaN for invalid rows."""
    return np.concatenate(list(predict(split, lambda _, features: probe.logits(features))))


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
    fold: npt.NDArray[Any],
    seed: int,
    propagated: bool,
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
                blocks=blocks_of(store[train]),
            )
    return ProbeResult(
        classes=classes,
        rows=int((fold >= 0).sum()),
        folds=int(fold.max()) + 1,
        out_of_fold_top1=held_out,
        probe_top1=probe_top1,
        knn_top1=knn_top1,
        measured_on=other if probe_top1 is not None else None,
        propagated=propagated,
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
    return split.read(f"{names.LOGITS}/{names.PROBE}").astype(np.float32)


def labels_of(split: Split) -> npt.NDArray[np.int32]:
    """int32 [N], -1 where there is no label."""
    if names.LABEL in split.names:
        return split.read(names.LABEL)
    return np.full(len(split), names.NO_LABEL, np.int32)


def true_features(split: Split, rows: npt.NDArray[np.int64]) -> Floats:
    """Pooled features float32 [n, D] in true units; of clips [n, 2 D], see `frame_features`."""
    if names.FRAMES in split.names:
        return frame_features(split, rows)
    return pooled_features(split, rows)


def blocks_of(split: Split) -> int:
    """Of how many blocks of D channels `true_features` are."""
    return 2 if names.FRAMES in split.names else 1


def pooled_features(split: Split, rows: npt.NDArray[np.int64]) -> Floats:
    """Pooled features float32 [n, D] in true units; of clips their mean over the frames."""
    stored = split.gather(rows, [names.POOLED])[names.POOLED]
    return np.asarray(stored.astype(np.float32) * split.scale[names.POOLED], np.float32)


def frame_features(split: Split, rows: npt.NDArray[np.int64]) -> Floats:
    """float32 [n, 2 D] of clips: the mean over the frames, and how much the second half differs from the first.

    The mean alone does not know the order of the frames, which a student of clips learns.
    """
    scale, width = split.scale[names.FRAMES], split.specs[names.FRAMES].row_shape[0]
    features = np.full((len(rows), 2 * width), np.nan, np.float32)
    for own, frames in zip(features, split.ragged(rows, names.FRAMES), strict=True):
        if len(frames):
            true, half = frames.astype(np.float32) * scale, len(frames) // 2
            own[:width] = true.mean(axis=0)
            own[width:] = true[len(true) - half :].mean(axis=0) - true[:half].mean(axis=0) if half else 0
    return features


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


# -- zero-shot: the full model scores the class names for every image, in a pass of its own --------------


def add_zero_shot(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest, deadline: StopDeadline
) -> None:
    """Write `logits/zero-shot` (or `zero-shot-calibrated`) [N, C]; an interrupted run goes on where it was.

    Raises:
        Stopped: when a signal came, with the scores so far committed.
        ConfigError: for a teacher without a language model, or a data set without class names.
    """
    from extract.teachers.qwen_transformers import load_zero_shot
    from extract.teachers.qwen_vl import QwenVLTeacher

    source, teacher = open_data(config), open_teacher(config)
    if not source.class_names or not isinstance(teacher, QwenVLTeacher):
        raise ConfigError(f"--logits {config.logits} needs Qwen2.5-VL and a data set with class names")
    calibrate = config.logits != ZERO_SHOT
    scorer = load_zero_shot(str(config.teacher_path), teacher, source.class_names, calibrate=calibrate)
    task = adopt_rows(make_task(config, source, teacher), config.folder)
    array = logits_array(config.logits, len(source.class_names))
    job = add_arrays(config.folder, [array])
    done, total = 0, task.rows
    for split in task.splits:
        with StoreWriter(config.folder, split, job=job) as writer:
            done += writer.next_row
            for logits in score_split(config, task, writer, scorer, deadline):
                writer.append({array.name: logits}, valid=np.asarray(np.isfinite(logits).all(axis=1)))
                done += len(logits)
                for observer in observers:
                    observer.progress(done, total, "scoring")
                if stop.requested:
                    writer.commit()
                    raise Stopped(logits_stop_message(config), stop.exit_code)
    finalize_store(config.folder, job=job)


def abandon_in_time(pool: DecodePool, config: ExtractConfig) -> str:
    """The last resort of a stop: nothing is left behind, and the line for the user."""
    pool.abandon()
    return logits_stop_message(config)


def score_split(
    config: ExtractConfig,
    task: ExtractTask,
    writer: StoreWriter,
    scorer: ZeroShotScorer,
    deadline: StopDeadline,
) -> Iterator[npt.NDArray[np.float32]]:
    """Logits float32 [B, C] of the rows that are not written yet; NaN for bad images.

    On CUDA the device scores the next batch while the last one's logits are copied and written.
    """
    samples = task.splits[writer.split]
    cuts = ((first, samples.between(first, end)) for first, end in writer.batches())
    device = scorer.teacher.device
    copies = DeviceCopies(device)
    launched: deque[Scores] = deque()
    with DecodePool(task.encoding, writer.job.batch_rows, decode_workers(config)) as pool:
        deadline.save = partial(abandon_in_time, pool, config)
        parts = AdaptiveBatch(writer.job.batch_rows, device, config.image_size)
        for batch in pool.batches(cuts):
            images = copies.to_device(torch.from_numpy(batch.pixels[:, 0]))
            logits = torch.cat(parts.run(len(images), partial(score_part, scorer, images)))
            host, ready = copies.to_host({LOGITS: logits})
            bad = [result.reason is not None for result in batch.results]
            pool.release(batch)  # its pixels were copied, or on a CPU scored
            launched.append(Scores(host[LOGITS], ready, bad))
            if len(launched) > copies.depth:
                yield launched.popleft().values()
        for scores in launched:
            yield scores.values()


class Scores(NamedTuple):
    """Logits [B, C] of a batch that the device may still be working on, and which of its images are bad."""

    logits: Tensor
    ready: torch.cuda.Event | None
    bad: list[bool]

    def values(self) -> npt.NDArray[np.float32]:
        """Wait for the device; float32 [B, C], NaN for bad images."""
        if self.ready is not None:
            self.ready.synchronize()
        values: npt.NDArray[np.float32] = self.logits.numpy()
        values[self.bad] = np.nan
        return values


def score_part(scorer: ZeroShotScorer, images: Tensor, some: slice) -> Tensor:
    """Logits float32 [b, C] on the device of some of the images, uint8 [B, 3, S, S]."""
    return scorer.score_images(images[some]).float()
