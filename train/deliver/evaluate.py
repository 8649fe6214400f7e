"""`cli evaluate`: a trained student measured on a split of any store with the right targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

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
from train.deliver.embedding import label_free_student
from train.deliver.embedding_quality import measure_embeddings
from train.deliver.model import ModelCard, OnnxModel, OnnxStudent, TorchModel
from train.distill.objective import Objective
from train.distill.projector import DistilledStudent
from train.errors import DeliveryError, TrainError
from train.loop.assemble import build_loader
from train.loop.evaluate import evaluate
from train.loop.loop import build_normalizer
from train.loop.machine import build_accelerator
from train.metrics import name_classes
from train.tasks import build_task


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
        metrics = measure_embeddings(model, config, opened, data, accelerator)
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
