"""The families of students: one record for all that depends on the type alone, and the names of students.

Imports no torch, so that configurations are validated before anything expensive is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from train.errors import ConfigError

# Of timm's classifiers, and of the networks of our own.
_TIMM: dict[str, Any] = {
    "learning_rate": 1e-4,
    "optimizer": "adamw",
    "batch_size": 32,
    "weight_decay": 0.01,
    "distillation_type": "hybrid",
    "image_size": 224,
}
_OWN: dict[str, Any] = {
    "learning_rate": 1e-4,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "distillation_type": "feature",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One type of student.

    Attributes:
        builder: "module:function"; it takes the parsed name and the keywords of `construct_student`.
        task: what its students learn, unless `features` is asked for.
        sizes: the names after `type/`, and what the builder makes each of: the name of timm's model, or the width of the
            first (U-Net) or hidden (LSTM) layer; none for timm, whose models are open-ended.
        classes: of the usual public data set, which students are counted with (`cli students`).
        options: of the builder, besides; None: those of timm's `create_model`.
        published: whether timm has published weights of it (of the LSTM's frame encoder), for `--pretrained`.
        adapters: names of the layers that get LoRA adapters by default; None: every layer that can carry one.
        recipe: defaults of `cli train` that replace the general ones.
    """

    builder: str
    task: str
    classes: int
    sizes: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] | None = ()
    published: bool = True
    adapters: tuple[str, ...] | None = None
    recipe: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "resnet": Family(
        builder="train.students.timm_student:build_timm_student",
        options=None,
        task="classification",
        classes=1000,
        sizes={name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
        adapters=("conv1", "conv2", "conv3"),
        recipe={**_TIMM, "feature_loss_type": "cosine"},
    ),
    "vit": Family(
        builder="train.students.timm_student:build_timm_student",
        options=None,
        task="classification",
        classes=1000,
        sizes={
            "vit-tiny": "vit_tiny_patch16_224",
            "vit-base": "vit_base_patch16_224",
            "vit-large": "vit_large_patch16_224",
        },
        adapters=("qkv", "proj", "fc1", "fc2"),
        recipe={
            **_TIMM,
            "learning_rate": 5e-5,
            "batch_size": 64,
            "weight_decay": 0.05,
            "align_feature": True,
        },
    ),
    "timm": Family(
        builder="train.students.timm_student:build_timm_student",
        options=None,
        task="classification",
        classes=1000,
        recipe={**_TIMM, "feature_loss_type": "mse"},
    ),
    "yolov8": Family(
        builder="train.students.yolo:build_yolo",
        task="detection",
        classes=80,
        sizes={size: f"yolov8{size}.yaml" for size in ("n", "s", "m", "l", "x")},
        published=False,
        recipe={
            # ultralytics' own choices: with another optimizer or rate a short run learns nothing (benchmarks/detection_recipe.py).
            "optimizer": "auto",
            "lr_scheduler": "linear",
            "batch_size": 16,
            "weight_decay": 0.0005,
            "distillation_type": "feature",
            "feature_loss_type": "mse",
            "image_size": 640,
        },
    ),
    "unet": Family(
        builder="train.students.unet:build_unet",
        task="segmentation",
        classes=21,
        sizes={"small": 32, "medium": 48, "large": 64},
        published=False,
        recipe={
            **_OWN,
            "distillation_type": "feature",
            "batch_size": 8,
            "feature_loss_type": "mse",
            "image_size": 512,
        },
    ),
    "lstm": Family(
        builder="train.students.lstm:build_lstm",
        task="sequence",
        classes=400,
        sizes={"small": 256, "medium": 512, "large": 1024},
        options=("freeze_encoder", "attention_pooling", "frame_encoder"),
        adapters=("conv1", "conv2", "conv3"),
        recipe={
            **_OWN,
            "batch_size": 32,
            "feature_loss_type": "cosine",
            "image_size": 224,
            # Clips without a label made the joint training worse, also with good logits (docs/benchmarks.md); phase one
            # learns from all of them.
            "labeled_share": 1.0,
        },
    ),
}

#: The families with a fixed list of sizes.
SIZES = {kind: tuple(family.sizes) for kind, family in FAMILIES.items() if family.sizes}


class UnknownStudentError(ConfigError):
    """No student of that name; the text lists the nearest names."""


@dataclass(frozen=True)
class StudentName:
    """A student's type and size; `str()` gives the canonical `type/size` or `timm:NAME`."""

    type: str
    size: str

    def __str__(self) -> str:
        return f"timm:{self.size}" if self.type == "timm" else f"{self.type}/{self.size}"


def _short_names() -> dict[str, StudentName]:
    """Every accepted spelling of the fixed students (lower case) → its name."""
    names: dict[str, StudentName] = {}
    for kind, sizes in SIZES.items():
        for size in sizes:
            name = StudentName(kind, size)
            spellings = {f"{kind}/{size}", f"{kind}/{kind}{size}", f"{kind}/{kind}-{size}"}
            spellings |= {f"{kind}{size}", f"{kind}-{size}"}
            if size.startswith(kind):
                bare = size.removeprefix(kind).lstrip("-")
                spellings |= {
                    size,
                    size.replace("-", "_"),
                    f"{kind}/{bare}",
                    f"{kind}/{size.replace('-', '_')}",
                }
            names.update(dict.fromkeys(spellings, name))
    return names


_NAMES = _short_names()


def parse_student_name(text: str) -> StudentName:
    """`resnet/resnet18`, `resnet18`, `vit-tiny`, `yolov8n`, `unet/small`, `timm:NAME` → type and size.

    A timm name is not checked here (that needs timm itself); `build_student` does.
    Raises UnknownStudentError with the nearest names.
    """
    stripped = text.strip()
    if stripped.lower().startswith("timm:") and stripped[5:].strip():
        return StudentName("timm", stripped[5:].strip())
    found = _NAMES.get(stripped.lower())
    if found is None:
        raise UnknownStudentError(_unknown_text(stripped))
    return found


def all_student_names() -> list[StudentName]:
    """The fixed students in the order of their table (timm's are open-ended and not listed)."""
    return [StudentName(kind, size) for kind, sizes in SIZES.items() for size in sizes]


def _unknown_text(text: str) -> str:
    text = text.rstrip("/")
    if text.lower() in SIZES:
        text = text.lower()
        return f"student {text!r} needs a size: one of {', '.join(f'{text}/{size}' for size in SIZES[text])}"
    near = get_close_matches(text.lower(), _NAMES, n=8, cutoff=0.5)
    candidates = list(dict.fromkeys(str(_NAMES[name]) for name in near))[:4]
    if not candidates:
        candidates = [str(name) for name in all_student_names()]
    hint = "nearest" if near else "valid"
    return f"unknown student {text!r}: {hint} names {', '.join(candidates)}, or timm:NAME for any timm model"


def recipe_of(student: str) -> dict[str, Any]:
    """The recipe of a student's name; empty (the general defaults) for unknown names."""
    try:
        return dict(FAMILIES[parse_student_name(student).type].recipe)
    except UnknownStudentError:
        return {}
