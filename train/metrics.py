"""What each number of a run is called and how it is written: in tables, on the sweep's board and in reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from console.output import get_logger
from train.config import TrainConfig

log = get_logger("train")

Kind = Literal["share", "number", "count", "seconds", "milliseconds", "megabytes"]


class Metric(NamedTuple):
    """One name for people. Shares of one are written in percent; `higher_is_better` None: neither."""

    label: str
    kind: Kind = "number"
    higher_is_better: bool | None = True


GAIN = "gain_over_control"
METRICS: dict[str, Metric] = {
    "top1": Metric("top-1 accuracy", "share"),
    "top5": Metric("top-5 accuracy", "share"),
    "macro_precision": Metric("macro precision", "share"),
    "macro_recall": Metric("macro recall", "share"),
    "macro_f1": Metric("macro F1", "share"),
    "map50_95": Metric("mAP50-95", "share"),
    "map50": Metric("mAP50", "share"),
    "precision": Metric("precision", "share"),
    "recall": Metric("recall", "share"),
    "miou": Metric("mean IoU", "share"),
    "pixel_accuracy": Metric("pixel accuracy", "share"),
    "probe_top1": Metric("linear-probe accuracy", "share"),
    "knn_top1": Metric("k-NN accuracy", "share"),
    "cosine": Metric("cosine to the teacher"),
    "pooled_cosine": Metric("cosine to the teacher, pooled"),
    "train_loss": Metric("training loss, weighted", "number", False),
    "val_loss": Metric("validation loss, weighted", "number", False),
    "loss": Metric("task loss", "number", False),
    "hard_loss": Metric("task loss, training", "number", False),
    "val_hard_loss": Metric("task loss, validation", "number", False),
    "feature_loss": Metric("feature term, training", "number", False),
    "val_feature_loss": Metric("feature term, validation", "number", False),
    "logit_loss": Metric("logit term, training", "number", False),
    "val_logit_loss": Metric("logit term, validation", "number", False),
    "parameters": Metric("parameters", "count", False),
    "trainable_parameters": Metric("trained parameters", "count", False),
    "macs": Metric("multiply-accumulates", "count", False),
    "latency_ms": Metric("latency", "milliseconds", False),
    "wall_time_s": Metric("training time", "seconds", False),
    "images_per_second": Metric("training images/s", "number"),
    "peak_rss_mb": Metric("peak memory", "megabytes", False),
    "peak_gpu_mb": Metric("peak GPU memory", "megabytes", False),
    "validation_samples": Metric("validation samples", "count", None),
    "epochs_done": Metric("epochs", "count", None),
    "best_epoch": Metric("best epoch", "count", None),
    GAIN: Metric("gain over control", "share"),
}


class TaskMetrics(NamedTuple):
    """Which metrics count for a task. Higher is better for all that are named here.

    Attributes:
        best: decides which epoch is the best (of detection, ultralytics' fitness decides, which is mostly this).
        headline: what stands for the quality of a finished run: the first that it has.
        accuracy: what a platform is sent as the accuracy; None: nothing.
        compared: of a quantized student with the float one.
        per_class: what the values per class are; None: there are none.
        target: the kind of target that all of them are measured with; None: the teacher's features.
    """

    best: str
    headline: tuple[str, ...]
    accuracy: str | None = None
    compared: tuple[str, ...] = ()
    per_class: str | None = None
    target: Literal["label", "mask", "boxes"] | None = None


_CLASSES = TaskMetrics("top1", ("top1",), "top1", ("top1", "top5", "macro_f1"), "recall", "label")
TASK_METRICS: dict[str, TaskMetrics] = {
    "classification": _CLASSES,
    "sequence": _CLASSES,
    "detection": TaskMetrics("map50_95", ("map50_95", "map50"), "map50", (), "mAP50-95", "boxes"),
    "segmentation": TaskMetrics("miou", ("miou",), "miou", ("miou", "pixel_accuracy"), "IoU", "mask"),
    "features": TaskMetrics("cosine", ("probe_top1", "knn_top1", "cosine")),
}
#: Of all tasks: a record names no task, but has no other task's metrics, except for the cosine (the last one).
HEADLINE_METRICS = tuple(dict.fromkeys(name for task in TASK_METRICS.values() for name in task.headline))
#: A share below it is printed as 0.000.
SHOWN_AS_ZERO = 0.0005
UNITS = {"milliseconds": " ms", "seconds": " s", "megabytes": " MB"}


def metric_of(name: str) -> Metric:
    """The entry of METRICS; a name that is not in it stands for itself."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "number", None)


def label_of(name: str) -> str:
    return metric_of(name).label


def is_share(name: str) -> bool:
    return metric_of(name).kind == "share"


def headline_of(names: Iterable[str]) -> str | None:
    """The first headline metric among `names`."""
    known = set(names)
    return next((name for name in HEADLINE_METRICS if name in known), None)


def accuracy_of(record: Mapping[str, Any]) -> float | None:
    """The accuracy of a line of metrics.jsonl, as a fraction of 1; None for a task that has none."""
    names = (task.accuracy for task in TASK_METRICS.values())
    return next((float(record[name]) for name in names if name and record.get(name) is not None), None)


def text_of(name: str, value: float) -> str:
    """A value with its unit: 61.25%, 4.1 ms, 11,181,642."""
    kind = metric_of(name).kind
    if kind == "share":
        return f"{value:.2%}"
    if kind == "count":
        return f"{value:,.0f}"
    return f"{value:,.4g}{UNITS.get(kind, '')}"


def gain_text(name: str, difference: float) -> str:
    """A difference with its sign; one that rounds to zero is ±0: its sign would be noise."""
    text = f"{difference:+.2%}" if is_share(name) else f"{difference:+.4f}"
    return text if any(digit in text for digit in "123456789") else text.replace(text[0], "±", 1)


def shown_text(name: str, value: Any, text: Callable[[str, float], str] | None = None) -> str | None:
    """The text of a value that may be missing (None) or no number (as it is)."""
    if value is None or isinstance(value, (bool, str)):
        return None if value is None else str(value)
    return (text or text_of)(name, float(value))


def shown_in_table(name: str, row: Mapping[str, Any]) -> str | None:
    """The text of a cell of a table of runs; a gain is written as the metric that the run is ranked by."""
    if name != GAIN:
        return shown_text(name, row.get(name))
    ranked = headline_of(key for key, value in row.items() if value is not None)
    return shown_text(ranked or name, row.get(name), gain_text)


def heading_of(name: str) -> str:
    """The label with an arrow that says which way is better, where one is."""
    better = metric_of(name).higher_is_better
    return label_of(name) if better is None else f"{label_of(name)} {'↑' if better else '↓'}"


def warn_of_zero_metric(config: TrainConfig, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Log likely causes once when the headline metric is still 0 after a third of the epochs.

    `records`: the lines of metrics.jsonl so far. Runs of fewer than 4 epochs are too short to tell.
    """
    third = math.ceil(config.epochs / 3)
    name = headline_of(key for key, value in records[-1].items() if value is not None)
    if third < 2 or name is None:
        return
    # Not every epoch is validated: the first one from there on.
    late = [record for record in records if record["epoch"] >= third and record.get(name) is not None]
    if len(late) != 1 or max(record.get(name) or 0.0 for record in records) >= SHOWN_AS_ZERO:
        return
    rate = records[-1].get("learning_rate") or config.learning_rate
    log.warning(
        f"{folder}: {label_of(name)} is still 0 after {records[-1]['epoch']} of {config.epochs} epochs: usual causes are a learning rate "
        f"that is too low or too high (now {rate:.3g}), objects that are too small at an image size of "
        f"{config.image_size} px, labels that do not fit the images (cli inspect {config.store} --pictures FOLDER), or too "
        "few epochs"
    )


def name_classes(details: Mapping[str, float], names: Sequence[str]) -> dict[str, float | None]:
    """`per_class_iou/3` → the name of class 3, where the store names it; None: no samples, so undefined.

    Empty for a task that has no metric per class.
    """
    values = {int(key.rpartition("/")[2]): value for key, value in details.items()}
    known = max([len(names), *(index + 1 for index in values)]) if values else 0
    return {
        names[index] if index < len(names) else str(index): values.get(index)
        for index in range(known)
        if index < len(names) or index in values
    }
