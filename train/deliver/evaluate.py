"""`cli evaluate`: a trained student measured on a split of any store with the right targets.

Of a label-free student: how close its embeddings are to the teacher's, and how well they tell classes apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.nn import functional

from console.output import get_logger
from store.format import NO_LABEL, POOLED
from store.quality import knn_accuracy, probe_accuracy
from store.reader import Store
from train.checkpoint import load_student_from_run
from train.config import TrainConfig, load_config
from train.data.splits import (
    TrainingData,
    check_targets,
    count_validation,
    labels_of,
    open_split,
    student_preprocessing,
    valid_rows,
    warn_of_measured_split,
)
from train.data.views import AUGMENTATIONS
from train.deliver.model import (
    ModelCard,
    OnnxModel,
    OnnxStudent,
    TorchModel,
    TrainedModel,
    check_frames,
    label_free_student,
)
from train.distill.objective import Objective, build_standardizer
from train.distill.projector import DistilledStudent
from train.errors import DeliveryError, TrainError
from train.loop.assemble import build_loader
from train.loop.evaluate import evaluate
from train.loop.loop import build_normalizer
from train.loop.machine import build_accelerator
from train.metrics import name_classes
from train.tasks import build_task

log = get_logger("evaluate")

TRAIN_SPLIT = "train"


def evaluate_run(
    run: Path,
    store: str | Path,
    *,
    split: str = "val",
    batch_size: int = 32,
    device: str = "auto",
    workers: int | None = None,
    data_root: Path | None = None,
) -> dict[str, Any]:
    """`student, task, split, samples, metrics, per_class, run, store` of a run's best student on a split.

    `run` may be an exported ONNX file too: it describes how images are prepared and names its classes.
    Raises TrainError when the store has other classes than the student, or no targets for its task.
    """
    from store.reader import open_store

    onnx = open_exported(run, device) if run.suffix == ".onnx" else None
    student, content = load_student_from_run(run) if onnx is None else (OnnxStudent(onnx), about(onnx.card))
    opened = open_store(store)
    config = load_config(
        {
            "store": store,
            "student": student.spec.name,
            "out": run,
            "image_size": student.spec.image_size,
            "batch_size": batch_size,
            "device": device if onnx is None else "cpu",
            "workers": workers,
            "data_root": data_root,
            "val_split": split,
            "train_split": f"not {split}",
        }
    )
    measured = {"student": student.spec.name, "task": content["task"], "split": split}
    where = {"run": str(run), "store": str(store)}
    if content["task"] == "detection":
        from train.yolo.evaluate import evaluate_yolo

        return measured | evaluate_yolo(config, opened, student, content) | where
    data = data_to_evaluate(config, opened, content, student.spec.num_classes)
    warn_of_measured_split(str(store), opened, split, data.task)
    accelerator = build_accelerator(config)
    if data.task == "features":
        model = onnx or TorchModel(
            label_free_student(student, content), ModelCard.of_checkpoint(content), accelerator.device
        )
        metrics = embedding_quality(model, config, opened, data, accelerator)
    else:
        metrics = measure(student.to(accelerator.device), config, opened, data, accelerator)
    details = {k: v for k, v in metrics.items() if k.startswith("per_class")}
    return {
        **measured,
        "samples": data.validation_samples,
        # The task loss is the only one without a teacher, and the split need not be that of validation.
        "metrics": {
            "loss" if k == "val_loss" else k: v
            for k, v in metrics.items()
            if k not in details and k != "val_hard_loss"
        },
        "per_class": name_classes(details, content["class_names"]),
        **where,
    }


def open_exported(path: Path, device: str) -> OnnxModel:
    """Raises DeliveryError when `path` is no file of `cli export`, or a GPU was asked for."""
    if not path.is_file():
        raise DeliveryError(f"{path}: no such file; expected a run folder, its best.pt or an exported .onnx")
    if device not in ("auto", "cpu"):
        raise DeliveryError(f"--device {device}: ONNX files are measured on the CPU here; leave it out")
    return OnnxModel(path)


def about(card: ModelCard) -> dict[str, Any]:
    """What evaluation reads of a checkpoint, from a model card."""
    return {
        "task": card.task,
        "class_names": list(card.class_names),
        "preprocessing": card.preprocessing,
    }


def data_to_evaluate(
    config: TrainConfig, store: Store, content: dict[str, Any], num_classes: int
) -> TrainingData:
    """Rows and labels of the split, checked against the student's task and classes."""
    ours, theirs = content["class_names"], list(store.manifest.class_names)
    if ours and theirs and ours != theirs and content["task"] != "features":
        odd = sorted(set(ours) ^ set(theirs)) or ["their order"]
        raise TrainError(
            f"{store.path}: other classes than the student was trained on (differing: {', '.join(odd[:5])})"
        )
    split = open_split(store, config.val_split, "--split")
    advice = f"this student was trained for {content['task']}: name a store for that"
    check_targets(content["task"], split, config.val_split, config.store, advice)
    rows = valid_rows(split, config.val_split, [])
    return TrainingData(
        task=content["task"],
        num_classes=num_classes,
        train_rows=np.empty(0, np.int64),
        val_rows=rows,
        train_labels=None,
        val_labels=labels_of(split),
        validation_samples=count_validation(store, config.val_split, content["task"]),
        preprocessing=student_preprocessing(store, content["preprocessing"]),
    )


def measure(
    student: Any, config: TrainConfig, store: Store, data: TrainingData, accelerator: Accelerator
) -> dict[str, float]:
    """Losses and metrics of the student on the split, without the teacher's targets."""
    objective = Objective(build_task(data.task, num_classes=data.num_classes, label_smoothing=0.0))
    loader = build_loader(config, store, data, objective, accelerator, AUGMENTATIONS["none"], training=False)
    module = DistilledStudent(student, None, cells=False, pooled=False)
    normalize = build_normalizer(student, accelerator.device)
    with torch.no_grad():
        return evaluate(
            module, loader.epoch(0), objective, accelerator.device, normalize, accelerator.autocast
        )


class SplitEmbeddings(NamedTuple):
    """`rows` int64 [N]; `embedding` float32 [N, D]; `aligned` float32 [N, D_teacher], None without a head."""

    rows: NDArray[np.int64]
    embedding: NDArray[np.float32]
    aligned: NDArray[np.float32] | None


def embedding_quality(
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
