"""The studies of benchmarks/learning.py and the variants of its ablation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LEARNING_RATES = (1e-3, 3e-3, 6e-3)
LABELS_PER_CLASS = 10

CONTROL: dict[str, Any] = {"distillation_type": "none", "hard_label_weight": 1.0}
CONTROL_ONLY: dict[str, Any] = {"control_only": True}


@dataclass(frozen=True)
class Study:
    """One comparison. `distilled`: options of that side beyond the product's defaults; `common`: of both sides.

    `labels_per_class`, `unlabeled`: see `write_emoji_table`. `data`, `labels`: a folder of --data, and how many of
    its training images are labeled, see `benchmarks.learning_sets.lay_out`. `rates`: learning rates to choose from.
    """

    name: str
    title: str
    student: str
    metric: str
    epochs: int
    common: dict[str, Any]
    distilled: dict[str, Any] = field(default_factory=dict)
    labels_per_class: int | None = None
    unlabeled: bool = False
    scenes: bool = False
    data: str = ""
    labels: int | None = None
    rates: tuple[float, ...] = LEARNING_RATES


EMOJI = {"image_size": 32, "batch_size": 32, "augment": "mild"}
SCENES = {"image_size": 48, "batch_size": 8, "augment": "full"}
SMALL = "timm:resnet10t"
FEW = LABELS_PER_CLASS
STUDIES = {
    study.name: study
    for study in (
        Study("few", f"{FEW} labels a class", SMALL, "top1", 40, EMOJI, labels_per_class=FEW),
        Study("all", "all labels", SMALL, "top1", 12, EMOJI),
        Study("scenes", "segmentation", "unet/small", "miou", 12, SCENES, scenes=True),
        Study(
            "mixed",
            f"{FEW} labels a class, the other images without labels",
            SMALL,
            "top1",
            12,
            EMOJI,
            labels_per_class=FEW,
            unlabeled=True,
        ),
    )
}
USUAL = "few,all,scenes"

DATA_RATES = (3e-3, 1e-3)
PHOTOS = {"image_size": 64, "batch_size": 32}
STREETS = {"image_size": 48, "batch_size": 8}
CELLS = {"image_size": 160, "batch_size": 8, "optimizer": "adamw"}
CLIPS = {"image_size": 32, "batch_size": 16, "frame_encoder": "resnet10t"}
# Phase one, then labels alone.
LABELS_ALONE = {"soft_label_weight": 0.0, "hard_label_weight": 1.0}
CLIPS_FIRST = {"pretrain_epochs": 20, **LABELS_ALONE}
STREETS_FIRST = {"pretrain_epochs": 20}
CELLS_FIRST = {"pretrain_epochs": 40, **LABELS_ALONE}
DATA_STUDIES = {
    study.name: study
    for study in (
        Study(
            "clothing-few",
            "clothing, 10 labels a class, the rest unlabeled",
            SMALL,
            "top1",
            12,
            {**PHOTOS, "mixup_alpha": 0.2},
            {"labeled_share": 0.05},
            data="clothing",
            labels=10,
            rates=DATA_RATES,
        ),
        Study(
            "clothing-all",
            "clothing, all labels",
            SMALL,
            "top1",
            12,
            PHOTOS,
            {"pretrain_epochs": 12},
            data="clothing",
            rates=DATA_RATES,
        ),
        Study(
            "camvid-few",
            "CamVid, 30 labeled, the rest unlabeled",
            "unet/small",
            "miou",
            10,
            STREETS,
            {**STREETS_FIRST, **LABELS_ALONE},
            data="camvid",
            labels=30,
            rates=DATA_RATES,
        ),
        Study(
            "camvid-all",
            "CamVid, all labels",
            "unet/small",
            "miou",
            10,
            STREETS,
            STREETS_FIRST,
            data="camvid",
            rates=DATA_RATES,
        ),
        Study(
            "clips-few",
            "clips, 10 labels a class, the rest unlabeled",
            "lstm/small",
            "top1",
            12,
            CLIPS,
            CLIPS_FIRST,
            data="clips",
            labels=10,
            rates=DATA_RATES,
        ),
        # The teacher knows less of scanned digits than 50 labels teach: distillation must do no harm.
        Study(
            "digits",
            "digits, 50 labeled, 550 unlabeled",
            SMALL,
            "top1",
            16,
            {"image_size": 32, "batch_size": 32},
            data="digits",
            labels=50,
            rates=DATA_RATES,
        ),
        Study(
            "bccd-few",
            "BCCD, 30 labeled, the rest unlabeled",
            "yolov8n",
            "map50_95",
            60,
            CELLS,
            CELLS_FIRST,
            data="bccd",
            labels=30,
            rates=DATA_RATES,
        ),
        Study(
            "bccd-all",
            "BCCD, all labels",
            "yolov8n",
            "map50_95",
            12,
            CELLS,
            CELLS_FIRST,
            data="bccd",
            rates=DATA_RATES,
        ),
    )
}

# Variants of the distilled side. `NOT_STANDARDIZED` trains from a store whose statistics say mean 0 and spread 1.
NOT_STANDARDIZED = "not standardized"
ABLATION: dict[str, dict[str, Any]] = {
    "defaults (mse, weight found, hybrid)": {},
    "feature weight 20": {"feature_weight": 20.0},
    "feature weight 1": {"feature_weight": 1.0},
    "cosine": {"feature_loss_type": "cosine"},
    "smooth_l1": {"feature_loss_type": "smooth_l1"},
    "relation": {"feature_loss_type": "relation"},
    "feature term alone": {"distillation_type": "feature"},
    "logit term alone": {"distillation_type": "logit"},
    "mlp alignment": {"align_head": "mlp"},
    "constant schedule": {"lr_scheduler": "constant"},
    NOT_STANDARDIZED: {},
}
