"""Default settings per type of student; any option or file overrides them."""

from __future__ import annotations

from typing import Any

# Distances are means over 1280 standardized channels, so their gradient is small compared with a cross-entropy's: at
# weight 1 a classifier learns little of the features (benchmarks/learning.py --ablation).
FEATURE_WEIGHT = 20.0

RECIPES: dict[str, dict[str, Any]] = {
    "resnet": {
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "batch_size": 32,
        "weight_decay": 0.01,
        "distillation_type": "hybrid",
        "feature_loss_type": "cosine",
        "feature_weight": FEATURE_WEIGHT,
        "image_size": 224,
    },
    "vit": {
        "learning_rate": 5e-5,
        "optimizer": "adamw",
        "batch_size": 64,
        "weight_decay": 0.05,
        "distillation_type": "hybrid",
        "align_feature": True,
        "feature_weight": FEATURE_WEIGHT,
        "image_size": 224,
    },
    "timm": {
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "batch_size": 32,
        "weight_decay": 0.01,
        "distillation_type": "hybrid",
        "feature_loss_type": "mse",
        "feature_weight": FEATURE_WEIGHT,
        "image_size": 224,
    },
    "yolov8": {
        # ultralytics' own choices: with another optimizer or rate a short run learns nothing (benchmarks/detection_recipe.py).
        "optimizer": "auto",
        "lr_scheduler": "linear",
        "batch_size": 16,
        "weight_decay": 0.0005,
        "distillation_type": "feature",
        "feature_loss_type": "mse",
        "image_size": 640,
    },
    "unet": {
        "learning_rate": 1e-4,
        "optimizer": "adam",
        "batch_size": 8,
        "weight_decay": 0.01,
        "distillation_type": "feature",
        "feature_loss_type": "mse",
        "image_size": 512,
    },
    "lstm": {
        "learning_rate": 1e-4,
        "optimizer": "adam",
        "batch_size": 32,
        "weight_decay": 0.01,
        "distillation_type": "feature",
        "feature_loss_type": "cosine",
        "image_size": 224,
    },
}

STUDENT_TASKS: dict[str, str] = {
    "resnet": "classification",
    "vit": "classification",
    "timm": "classification",
    "yolov8": "detection",
    "unet": "segmentation",
    "lstm": "sequence",
}


def student_type(name: str) -> str:
    """The type of a student's name: `resnet18` and `resnet/resnet18` give resnet, `timm:NAME` gives timm.

    An unknown name gives its text before `/`; building the student then reports it with the valid ones.
    """
    if name.startswith("timm:"):
        return "timm"
    head = name.split("/", 1)[0]
    return next((kind for kind in RECIPES if head.startswith(kind)), head)


def recipe_of(student: str) -> dict[str, Any]:
    """The recipe of a student's name; empty (the general defaults) for unknown names."""
    return dict(RECIPES.get(student_type(student), {}))
