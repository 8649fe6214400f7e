"""`cli evaluate` of a label-free student: how close its embeddings are to the teacher's, and what they tell of classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.nn import functional

from console.log import get_logger
from store.format import NO_LABEL, POOLED
from store.quality import knn_accuracy, probe_accuracy
from store.reader import Store
from train.config import TrainConfig
from train.data.splits import TrainingData, labels_of, valid_rows
from train.data.views import AUGMENTATIONS
from train.deliver.model import OnnxModel, TrainedModel, check_frames
from train.distill.objective import Objective, build_standardizer
from train.loop.assemble import build_loader
from train.tasks import build_task

log = get_logger("evaluate")

TRAIN_SPLIT = "train"


class SplitEmbeddings(NamedTuple):
    """`rows` int64 [N]; `embedding` float32 [N, D]; `aligned` float32 [N, D_teacher], None without a head."""

    rows: NDArray[np.int64]
    embedding: NDArray[np.float32]
    aligned: NDArray[np.float32] | None


def measure_embeddings(
    model: TrainedModel, config: TrainConfig, store: Store, data: TrainingData, accelerator: Accelerator
) -> dict[str, float]:
    """`pooled_cosine` to the teacher, and `knn_top1` and `probe_top1` where the store has labels.

    k-NN and probe learn from the store's training split, so they need another split to be measured on.
    """
    found = embed_split(model, config, store, data, accelerator)
    metrics = {}
    if (cosine := cosine_to_teacher(model, found, store, config.val_split)) is not None:
        metrics["pooled_cosine"] = cosine
    reason = why_no_accuracy(store, config.val_split, data)
    if reason is not None:
        log.info("no k-NN and probe accuracy: %s", reason)
        return metrics
    bank = replace(data, val_rows=valid_rows(store[TRAIN_SPLIT], TRAIN_SPLIT, []))
    bank = replace(bank, val_labels=labels_of(store[TRAIN_SPLIT]))
    known = embed_split(
        model, config.replace(val_split=TRAIN_SPLIT, train_split="none"), store, bank, accelerator
    )
    assert bank.val_labels is not None
    assert data.val_labels is not None
    labels = bank.val_labels[known.rows], data.val_labels[found.rows]
    pairs = (known.embedding, labels[0], found.embedding, labels[1])
    return {**metrics, "knn_top1": knn_accuracy(*pairs), "probe_top1": probe_accuracy(*pairs)}


def why_no_accuracy(store: Store, split: str, data: TrainingData) -> str | None:
    """Why k-NN and probe cannot be measured; None when they can."""
    if data.val_labels is None or not has_labels(data.val_labels[data.val_rows]):
        return f"split {split} has no labels"
    if split == TRAIN_SPLIT or TRAIN_SPLIT not in store:
        return f"they learn from split {TRAIN_SPLIT}, and are measured on another"
    labels = labels_of(store[TRAIN_SPLIT])
    if labels is None or not has_labels(labels[store[TRAIN_SPLIT].valid]):
        return f"split {TRAIN_SPLIT} has no labels"
    return None


def has_labels(labels: NDArray[np.int32]) -> bool:
    return bool((labels != NO_LABEL).any())


def embed_split(
    model: TrainedModel, config: TrainConfig, store: Store, data: TrainingData, accelerator: Accelerator
) -> SplitEmbeddings:
    """The model's embeddings of the split's rows, shown as in training without augmentation."""
    objective = Objective(build_task("features", num_classes=0, label_smoothing=0.0))
    plain = replace(data, val_labels=None)
    loader = build_loader(config, store, plain, objective, accelerator, AUGMENTATIONS["none"], training=False)
    parts = []
    for batch in loader.epoch(0):
        images, real = batch.images.cpu().numpy(), batch.weight.cpu().numpy() > 0  # others fill the batch up
        for chosen, frames in equal_lengths(batch.lengths, real):
            some = images[chosen] if frames is None else images[chosen, :frames]
            if isinstance(model, OnnxModel) and some.ndim == 5:
                check_frames(model, some.shape[1])
            outputs = model.outputs(model.card.normalize(some))
            parts.append(SplitEmbeddings(batch.rows[chosen], outputs["embedding"], outputs.get("aligned")))
    rows, embedding, aligned_parts = zip(*parts, strict=True)
    return SplitEmbeddings(np.concatenate(rows), np.concatenate(embedding), joined(aligned_parts))


def equal_lengths(
    lengths: torch.Tensor | None, real: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], int | None]]:
    """Places in the batch of clips of one length, and that length; all images are one group, with None."""
    if lengths is None:
        yield np.flatnonzero(real), None
        return
    values = lengths.numpy()
    for length in np.unique(values[real]).tolist():
        yield np.flatnonzero(real & (values == length)), length


def joined(parts: Iterable[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def cosine_to_teacher(model: TrainedModel, found: SplitEmbeddings, store: Store, split: str) -> float | None:
    """Mean cosine between aligned embeddings and the teacher's pooled features, standardized by this store's statistics.

    None, with a log line that says why, where the two cannot be compared.
    """
    card = model.card
    for name in store.whole.manifest.teacher_names:  # any of the store's teachers, of those that it has
        if store.of_teacher(name).manifest.teacher.fingerprint == card.teacher:
            store = store.of_teacher(name)
    teacher = store.manifest.teacher
    reason = None
    if found.aligned is None:
        reason = "the student has no alignment head (train it again with this version)"
    elif card.standardize != "channel":
        reason = f"its alignment head learned rotated features (--standardize {card.standardize})"
    elif card.teacher is not None and card.teacher != teacher.fingerprint:
        reason = f"the student learned from another teacher than {teacher.name} ({teacher.fingerprint})"
    elif found.aligned.shape[1] != teacher.width:
        reason = f"the student learned features of width {found.aligned.shape[1]}, {teacher.name}'s are {teacher.width} wide"
    if reason is not None or found.aligned is None:
        log.info("no cosine to the teacher: %s", reason)
        return None
    reference = TRAIN_SPLIT if TRAIN_SPLIT in store else max(store.splits, key=lambda name: len(store[name]))
    stored = store[split].gather(found.rows, [POOLED])[POOLED]
    targets = build_standardizer(store[reference], POOLED, POOLED)(torch.from_numpy(np.asarray(stored)))
    return float(functional.cosine_similarity(torch.from_numpy(found.aligned), targets, dim=-1).mean())
