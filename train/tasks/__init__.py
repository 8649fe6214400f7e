"""Tasks by name; each is imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

TASKS: dict[str, str] = {
    "classification": "train.tasks.classification:Classification",
    "sequence": "train.tasks.classification:SequenceClassification",
    "segmentation": "train.tasks.segmentation:Segmentation",
    "features": "train.tasks.features:Features",
}


def build_task(name: str, *, num_classes: int, label_smoothing: float) -> Any:
    """The task of that name."""
    module, attribute = TASKS[name].split(":")
    return getattr(importlib.import_module(module), attribute)(num_classes, label_smoothing)
