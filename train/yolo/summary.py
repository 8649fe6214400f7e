"""summary.json of a YOLO run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store.reader import Store
from train.checkpoint import BEST, load_student_from_run
from train.config import TrainConfig
from train.data.splits import count_validation
from train.loop.machine import peak_memory
from train.measure import measure_latency
from train.rundir import store_reference
from train.students.catalog import count_macs
from train.yolo.job import TrainingJob
from train.yolo.recorder import METRICS


def summarise(
    config: TrainConfig,
    store: Store,
    run: Path,
    job: TrainingJob,
    records: list[dict[str, Any]],
    ending: dict[str, Any],
) -> dict[str, Any]:
    """The content of summary.json, without `control`. `records` are the lines of metrics.jsonl.

    `ending` is what `ending_of` said in the process that trained.
    """
    student, content = load_student_from_run(run, BEST)
    best = next(record for record in records if record["epoch"] == content["epoch"])
    train_time = sum(record["train_time_s"] for record in records)
    images = len(job.splits["train"].records) * len(records)
    return {
        "student": student.spec.name,
        "task": "detection",
        "num_classes": student.spec.num_classes,
        "validation_samples": count_validation(store, config.val_split, "detection"),
        "epochs": config.epochs,
        "epochs_done": len(records),
        "best_epoch": best["epoch"],
        "metrics": {name: best[name] for name in METRICS},
        "parameters": student.parameter_count(),
        "trainable_parameters": job.trainable_parameters,
        "macs": count_macs(student),
        "latency_ms": measure_latency(student),
        "wall_time_s": round(sum(record["epoch_time_s"] for record in records), 3),
        "images_per_second": round(images / train_time, 2) if train_time else None,
        "store": store_reference(store),
        "seed": config.seed,
        **ending,
        "complete": True,
    }


def ending_of(trainer: Any) -> dict[str, Any]:
    """What summary.json says that only the trainer knows, when it has ended: plain JSON types."""
    return {
        "per_class": per_class(trainer),
        "exported": {name: trainer.export_metrics.get(key) for name, key in METRICS.items()},
        "batch_size": trainer.batch_size,
        "optimizer": str(trainer.args.optimizer),
        "learning_rate": float(trainer.args.lr0),
        "grad_accum_steps": trainer.accumulate,
        **peak_memory(),
    }


def per_class(trainer: Any) -> dict[str, float | None]:
    """mAP50-95 of each class by ultralytics/best.pt; None: undefined, the validation split has no box of the class."""
    box: Any = getattr(getattr(trainer.validator, "metrics", None), "box", None)
    return name_precisions(box, trainer.job.class_names)


def name_precisions(box: Any, names: Sequence[str]) -> dict[str, float | None]:
    """ultralytics' AP of each class by name, None for the classes that it did not meet; empty without any."""
    found = {
        int(index): float(box.ap[place]) for place, index in enumerate(getattr(box, "ap_class_index", []))
    }
    return {name: found.get(index) for index, name in enumerate(names)} if found else {}
