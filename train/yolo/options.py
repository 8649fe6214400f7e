"""Our options as ultralytics' arguments; what its trainer cannot do is an error when it was asked for.

docs/detection.md lists the mapping for users.
"""

from __future__ import annotations

import re
from typing import Any

from train.config import TrainConfig
from train.errors import ConfigError

# ultralytics' values where the general defaults of TrainConfig would change its recipe without being asked to.
NOMINAL_BATCH = 64
CLIP_NORM = 10.0
WARMUP_EPOCHS = 3.0
# In a short run ultralytics' accumulation and warm-up leave too few steps: BCCD (205 images, batch 16, 10 epochs) has 40
# at a nominal batch of 64, 23 of them after the warm-up (benchmarks/detection_recipe.py).
FEWEST_STEPS = 100
LONGEST_WARMUP = 0.1  # of the run
NO_EARLY_STOPPING = 0

# Arguments that users may set by `--yolo-settings`: its augmentations, loss gains and schedule.
SETTINGS = frozenset(
    [
        *("box", "cls", "dfl", "cls_pw", "lrf", "momentum", "warmup_momentum", "warmup_bias_lr", "nbs"),
        *(
            "hsv_h",
            "hsv_s",
            "hsv_v",
            "degrees",
            "translate",
            "scale",
            "shear",
            "perspective",
            "flipud",
            "fliplr",
        ),
        *("bgr", "mosaic", "mixup", "cutmix", "close_mosaic", "multi_scale", "rect", "freeze", "max_det"),
        *("plots", "iou", "conf", "cos_lr", "channels_last"),
    ]
)

COMMA = re.compile(r",(?![^\[(]*[\])])")  # not inside brackets

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "full": {},
    "mild": {"mosaic": 0.0, "scale": 0.2},
    "photometric": {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0},
    "none": {
        **{"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0},
        **{"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0},
    },
}


def check_options(config: TrainConfig) -> None:
    """Raises ConfigError listing every explicit option that a YOLO student cannot follow."""
    problems = config.unsupported_options()
    if config.task not in ("auto", "detection"):
        problems.append(f"task {config.task}: YOLO students do detection")
    if config.distillation_type == "logit":
        problems.append("distillation_type logit: YOLO students learn features; use feature")
    if config.feature_loss_type == "relation":
        problems.append("feature_loss_type relation: YOLO students take mse, cosine or smooth_l1")
    if config.feature_target not in ("auto", "grid"):
        problems.append(f"feature_target {config.feature_target}: YOLO students learn the stored grid")
    if config.image_size % 32:
        nearest = max(32, round(config.image_size / 32) * 32)
        problems.append(
            f"image_size {config.image_size} is not a multiple of 32 (YOLO's stride): use {nearest}"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def ultralytics_arguments(config: TrainConfig, images: int) -> dict[str, Any]:
    """The overrides of ultralytics' default arguments for this training on `images` training images.

    Raises ConfigError for settings that it does not know or that are not the user's to choose.
    """
    arguments: dict[str, Any] = {
        "task": "detect",
        "mode": "train",
        "epochs": config.epochs,
        "batch": config.batch_size,
        "imgsz": config.image_size,
        "lr0": config.learning_rate,
        "optimizer": {"auto": "auto", "sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[config.optimizer],
        "weight_decay": config.weight_decay,
        "warmup_epochs": warmup_epochs(config),
        "patience": config.early_stopping_patience or NO_EARLY_STOPPING,
        "seed": config.seed,
        "deterministic": True,
        "pretrained": False,
        "exist_ok": True,
        "verbose": False,
        **schedule(config),
        **accumulation(config, images),
        **AUGMENTATIONS[config.augment],
        **parse_settings(config.yolo_settings),
    }
    if config.optimizer in ("adam", "adamw"):
        arguments.setdefault("momentum", 0.9)  # Adam's beta1; ultralytics' 0.937 is meant for SGD
    return arguments


def schedule(config: TrainConfig) -> dict[str, Any]:
    """ultralytics ends cosine and linear schedules at `lrf` · learning rate; constant is `lrf` 1."""
    constant = {"lrf": 1.0} if config.lr_scheduler == "constant" else {}
    return {"cos_lr": config.lr_scheduler == "cosine", **constant}


def warmup_epochs(config: TrainConfig) -> float:
    """As asked for, else ultralytics' 3 epochs, and at most a tenth of the run."""
    if config.is_explicit("warmup_epochs"):
        return config.warmup_epochs
    return min(WARMUP_EPOCHS, LONGEST_WARMUP * config.epochs)


def accumulation(config: TrainConfig, images: int) -> dict[str, Any]:
    """As asked for, else ultralytics' nominal batch of 64 images, or a smaller one that gives FEWEST_STEPS steps."""
    if config.is_explicit("grad_accum_steps"):
        return {"nbs": config.batch_size * config.grad_accum_steps}
    return {"nbs": min(NOMINAL_BATCH, max(config.batch_size, images * config.epochs // FEWEST_STEPS))}


def clip_norm(config: TrainConfig) -> float:
    """The gradient norm to clip at: ultralytics' 10 unless asked for; infinity switches clipping off."""
    if not config.is_explicit("max_grad_norm"):
        return CLIP_NORM
    return config.max_grad_norm or float("inf")


def parse_settings(text: str) -> dict[str, Any]:
    """`mosaic=0.5,freeze=[0,1]` → a dictionary, its values read and checked by ultralytics.

    Raises ConfigError for an unknown name or a value that ultralytics refuses.
    """
    from ultralytics.cfg import check_cfg, smart_value

    settings: dict[str, Any] = {}
    problems = []
    for part in filter(None, (part.strip() for part in COMMA.split(text))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in SETTINGS:
            problems.append(
                f"yolo_settings {part}: expected NAME=VALUE with a name of {', '.join(sorted(SETTINGS))}"
            )
            continue
        settings[name] = smart_value(value)
    if problems:
        raise ConfigError("; ".join(problems))
    try:
        check_cfg(settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"yolo_settings {text}: {error}") from None
    return settings
