"""Export a student as a folder that timm opens: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

`config.json`, `model.safetensors` and a model card `README.md`: what a repository of a timm model on a hub holds.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models import save_for_hf

from files.writing import check_replaceable, publish, writing
from train.deliver.model import ModelCard, class_name
from train.errors import DeliveryError
from train.students.base import Student
from train.students.families import FAMILIES
from train.students.timm_student import TimmStudent, image_size_settings

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
#: Our resize policies as timm names them; with `crop_pct` 1 nothing else is cut off.
CROP_MODES = {"squash": "squash", "letterbox": "border", "center-crop": "center"}


def check_timm_student(student: Student) -> TimmStudent:
    """Raises DeliveryError for a student that is no timm model, or has no classes."""
    if not isinstance(student, TimmStudent) or not student.spec.num_classes:
        what = "learned features alone" if not student.spec.num_classes else "is not a timm model"
        raise DeliveryError(
            f"--format timm: {student.spec.name} {what}; resnet, vit and timm:NAME students of classes can be "
            "exported: use --format onnx or torch-export"
        )
    return student


def write_timm_folder(
    student: Student, card: ModelCard, folder: Path, inputs: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Write the three files into `folder` and return the logits [B, C] of timm's own model on `inputs`."""
    model = copy.deepcopy(check_timm_student(student).model)
    architecture = FAMILIES[student.spec.type].sizes.get(student.spec.size, student.spec.size).split(".")[0]
    side = card.image_size
    model.pretrained_cfg = {
        "architecture": architecture,
        **{name: model.pretrained_cfg.get(name) for name in ("first_conv", "classifier")},
        "num_classes": student.spec.num_classes,
        "input_size": (3, side, side),
        "fixed_input_size": bool(model.pretrained_cfg.get("fixed_input_size")),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[card.resize],
        "mean": card.mean,
        "std": card.std,
    }
    labels = [class_name(card, index) for index in range(student.spec.num_classes)]
    arguments = {**image_size_settings(architecture, side), **student.spec.options}
    save_for_hf(model, str(folder), {"label_names": labels}, arguments, safe_serialization=True)
    (folder / CARD).write_text(model_card(card, architecture, labels), encoding="utf-8")
    opened: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        return np.asarray(opened(torch.from_numpy(inputs)).numpy())


def publish_folder(made: Path, folder: Path) -> None:
    """Move the files of a finished export to where they belong; other files there stay. Raises OutputError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CARD, CONFIG):
            check_replaceable(folder / name)
            publish(made / name, folder / name)


def scratch_beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the same disk."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-")


def model_card(card: ModelCard, architecture: str, labels: list[str]) -> str:
    """The text of README.md, as a hub shows it."""
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- knowledge-distillation
---
# {architecture}, distilled

A student of qwen-distill: {len(labels)} classes ({", ".join(labels[:10])}{", …" if len(labels) > 10 else ""}), images of
{card.image_size}×{card.image_size} pixels.

```python
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # on a hub: "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
scores = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(1)[0]
model.pretrained_cfg["label_names"][scores.argmax()]
```
"""
