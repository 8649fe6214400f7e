"""From options and a store to what a run does: task, classes, what is distilled, how images are shown.

Everything that does not fit is an error that says what to do instead; every choice made here is written to
config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from console.log import get_logger
from imaging.decode import FULL_DEPTH
from store.format import (
    FRAMES,
    GRID,
    IMAGES_RAW,
    LABEL,
    LOGITS,
    MASK,
    POOLED,
    VALID,
    VIEWS_GRID,
    VIEWS_POOLED,
    Preprocessing,
)
from train.config import TrainConfig
from train.data.batches import labels_of
from train.data.views import AUGMENTATIONS, Augmentation
from train.distill.objective import DistillationPlan
from train.errors import ConfigError, TrainError
from train.recipes import STUDENT_TASKS
from train.students.base import StudentSpec
from train.validation import count_validation

log = get_logger("train")

CLASS_TASKS = ("classification", "sequence")
LABEL_FREE = "use --task features to learn without them, or extract a data set that has them"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the store offers this run. `rows`: valid rows int64; `labels` int32 [N] of the whole split, or None.

    `validation_samples`: how many of `val_rows` the task's metrics are measured on. `preprocessing`: how the student is
    shown the images; None: as the store's teacher was.
    """

    task: str
    num_classes: int
    train_rows: NDArray[np.int64]
    val_rows: NDArray[np.int64]
    train_labels: NDArray[np.int32] | None
    val_labels: NDArray[np.int32] | None
    validation_samples: int
    notes: list[str] = field(default_factory=list)
    preprocessing: Preprocessing | None = None


def student_preprocessing(store: Any, recorded: Mapping[str, Any]) -> Preprocessing:
    """How a trained student is shown the images of any store: as in its training, `recorded` in its checkpoint.

    The store may have been made with another resize policy: a student that learned from letterboxed images fails on
    squashed ones.
    """
    own: Preprocessing = store.manifest.preprocessing
    options = {**own.options, "bit_depth": int(recorded.get("bit_depth", FULL_DEPTH))}
    shown = own.model_copy(update={"resize": str(recorded["resize"]), "options": options})
    if shown.resize != own.resize:
        log.info(
            "%s was made with --resize %s, the student was trained with %s: its images are shown as in training%s",
            store.location,
            own.resize,
            shown.resize,
            # What a center crop cut off is not in the store.
            ", as far as the store has them (--images raw)" if IMAGES_RAW in named_arrays(store) else "",
        )
    if shown.bit_depth != own.bit_depth:
        log.info(
            "%s has 16-bit images of %d bits, the student was trained with %d: they are scaled as in training",
            store.location,
            own.bit_depth,
            shown.bit_depth,
        )
    return shown


def named_arrays(store: Any) -> set[str]:
    return {spec.name for spec in store.manifest.arrays}


def resolve_task(config: TrainConfig) -> str:
    """The student's own task, or `features`. Raises ConfigError for a task that the student cannot learn."""
    own = STUDENT_TASKS[config.student_type]
    if config.task in ("auto", own):
        return own
    if config.task == "features" and own != "detection":
        return "features"
    raise ConfigError(
        f"task {config.task}: {config.student} learns {own}" + ("" if own == "detection" else " or features")
    )


def resolve_data(config: TrainConfig, store: Any, task: str) -> TrainingData:
    """Rows, labels and classes. Raises TrainError when the store cannot serve the task."""
    train, val = (open_split(store, name, option) for name, option in split_options(config))
    check_targets(task, train, config.train_split, config.store)
    notes: list[str] = []
    train_rows, val_rows = (
        valid_rows(train, config.train_split, notes),
        valid_rows(val, config.val_split, notes),
    )
    train_labels, val_labels = labels_of(train), labels_of(val)
    num_classes = 0 if task == "features" else resolve_classes(config, store, train_labels, notes)
    if task in CLASS_TASKS:
        check_labels(config, train_labels, val_labels, train_rows, val_rows, notes)
    return TrainingData(
        task=task,
        num_classes=num_classes,
        train_rows=train_rows,
        val_rows=val_rows,
        train_labels=train_labels,
        val_labels=val_labels,
        validation_samples=count_validation(store, config.val_split, task),
        notes=notes,
    )


def split_options(config: TrainConfig) -> list[tuple[str, str]]:
    return [(config.train_split, "--train-split"), (config.val_split, "--val-split")]


def open_split(store: Any, name: str, option: str) -> Any:
    """A split that has rows."""
    if name not in store.splits:
        made = ", or extract with --val-fraction" if name == "val" else ""
        raise TrainError(
            f"{store.path}: no split {name}, it has {', '.join(store.splits) or 'none'}: name one with {option}{made}"
        )
    if not len(store[name]):
        raise TrainError(
            f"{store.path}: split {name} is empty: extract it again, or name another with {option}"
        )
    return store[name]


def check_targets(task: str, split: Any, name: str, store: str, advice: str = LABEL_FREE) -> None:
    """The split must hold what the task learns from, or is measured on; `advice` is the next step when it does not."""
    names = set(split.names)
    needed = {"classification": LABEL, "sequence": LABEL, "segmentation": MASK}.get(task)
    if needed is None:
        return
    unlabelled = needed == LABEL and labels_of(split) is None
    if needed in names and not unlabelled:
        return
    has = [kind for kind, array in (("labels", LABEL), ("masks", MASK)) if array in names]
    found = ", ".join(has) if has and not unlabelled else "no targets" if not has else "unlabelled rows only"
    what = "class masks" if needed == MASK else "class labels"
    raise TrainError(f"{store}: {task} needs {what} in split {name}, the store has {found}: {advice}")


def valid_rows(split: Any, name: str, notes: list[str]) -> NDArray[np.int64]:
    """Rows with features. Raises TrainError when there are none."""
    valid = split.valid if VALID in split.names else np.ones(len(split), dtype=bool)
    rows = np.flatnonzero(valid).astype(np.int64)
    if not len(rows):
        raise TrainError(f"{split.path}: all {len(split)} samples of split {name} are bad: see cli inspect")
    if len(rows) < len(split):
        notes.append(f"{len(split) - len(rows)} of {len(split)} samples of {name} are bad and left out")
    return rows


def resolve_classes(
    config: TrainConfig, store: Any, labels: NDArray[np.int32] | None, notes: list[str]
) -> int:
    """The store's classes; more widen the head, fewer are an error."""
    known = len(store.manifest.class_names) or (int(labels.max()) + 1 if labels is not None else 0)
    if known == 0 and config.num_classes is None:
        raise ConfigError(f"{config.store} names no classes: pass --num-classes")
    if config.num_classes is None or config.num_classes == known:
        return known
    if config.num_classes < known:
        raise ConfigError(
            f"num_classes {config.num_classes}: {config.store} has {known} classes; pass at least {known}"
        )
    notes.append(
        f"the head has {config.num_classes} classes, the data {known}: the rest is never predicted right"
    )
    return config.num_classes


def check_labels(
    config: TrainConfig,
    train: NDArray[np.int32] | None,
    val: NDArray[np.int32] | None,
    train_rows: NDArray[np.int64],
    val_rows: NDArray[np.int64],
    notes: list[str],
) -> None:
    assert train is not None
    present = train[train_rows]
    classes = np.unique(present[present >= 0])
    if len(classes) < 2:
        raise TrainError(
            f"{config.store}: split {config.train_split} has one class only (class {classes[0]}): there is nothing "
            "to tell apart; use --task features, or another data set"
        )
    if val is None or not (val[val_rows] >= 0).any():
        raise TrainError(f"{config.store}: split {config.val_split} has no labels to validate against")
    if missing := int((present < 0).sum()):
        notes.append(
            f"{missing} samples of {config.train_split} have no label: they are learnt from the teacher alone"
        )


def resolve_features(
    config: TrainConfig, split: Any, task: str, spec: StudentSpec, notes: list[str]
) -> DistillationPlan:
    """What is distilled. Raises ConfigError for options that the store cannot serve (and what to extract)."""
    kind = config.distillation_type or ("hybrid" if task in CLASS_TASKS else "feature")
    if task == "features":
        if kind in ("none", "logit"):
            raise ConfigError(
                f"task features learns the teacher's features: distillation_type {kind} leaves nothing"
            )
        kind = "feature"
    if kind == "none":
        return DistillationPlan()
    names = set(split.names)
    logits = resolve_logits(config, kind, task, names, notes)
    if kind == "logit":
        return DistillationPlan(logits=logits)
    if POOLED not in names:
        raise ConfigError(
            f"{config.store} has no {POOLED}: extract it again; --distillation-type {kind} needs it"
        )
    if spec.feature_kind == "sequence":
        return DistillationPlan(**resolve_frames(config, names), logits=logits)
    recorded = resolve_recorded(config, names)
    grid = (VIEWS_GRID if recorded else GRID) in names
    pooled, cells = resolve_target(config, task, spec, grid, notes)
    return DistillationPlan(pooled=pooled, cells=cells, grid=grid, recorded=recorded, logits=logits)


def resolve_logits(
    config: TrainConfig, kind: str, task: str, names: set[str], notes: list[str]
) -> str | None:
    """The name of the stored logits to learn from, None for none."""
    if kind == "feature":
        return None
    stored = sorted(name.removeprefix(f"{LOGITS}/") for name in names if name.startswith(f"{LOGITS}/"))
    wanted = config.teacher_logits
    if task not in CLASS_TASKS:
        if kind == "logit":
            raise ConfigError(
                f"distillation_type logit needs one class a sample, the task is {task}: use feature"
            )
        return None
    if wanted != "auto" and wanted not in stored:
        raise ConfigError(f"teacher_logits {wanted}: {config.store} has {', '.join(stored) or 'none'}")
    if stored:
        return wanted if wanted != "auto" else "probe" if "probe" in stored else stored[0]
    if kind == "logit":
        raise ConfigError(f"{config.store} has no teacher logits: run `cli probe {config.store}` first")
    notes.append("the store has no teacher logits (cli probe makes them): hybrid uses the feature term alone")
    return None


def resolve_recorded(config: TrainConfig, names: set[str]) -> bool:
    """Whether recorded views are replayed."""
    stored = VIEWS_POOLED in names
    if config.views == "recorded" and not stored:
        raise ConfigError(f"views recorded: {config.store} has none: extract with --views K")
    return stored and config.views != "random"


def resolve_frames(config: TrainConfig, names: set[str]) -> dict[str, bool]:
    """Clips: one row per frame where stored, the clip's pooled row when asked for or alone."""
    if config.feature_target in ("grid", "both") and FRAMES not in names:
        raise ConfigError(
            f"feature_target {config.feature_target}: {config.store} has no rows per frame: extract clips"
        )
    cells = FRAMES in names and config.feature_target != "pooled" and config.feature_loss_type != "relation"
    return {"frames": True, "cells": cells, "pooled": not cells or config.feature_target == "both"}


def resolve_target(
    config: TrainConfig, task: str, spec: StudentSpec, grid: bool, notes: list[str]
) -> tuple[bool, bool]:
    """(pooled, cells): which features are compared."""
    wanted, has_map = config.feature_target, spec.feature_kind == "map"
    if wanted in ("grid", "both"):
        if not grid:
            raise ConfigError(
                f"feature_target {wanted}: {config.store} has no grid: extract with --grid 7 or more"
            )
        if not has_map:
            raise ConfigError(f"feature_target {wanted}: {config.student} has no feature map, use pooled")
        if config.feature_loss_type == "relation" and wanted == "grid":
            raise ConfigError("feature_loss_type relation compares samples: use feature_target pooled")
        return wanted == "both", config.feature_loss_type != "relation"
    if wanted == "pooled" or not grid or not has_map or config.feature_loss_type == "relation":
        if wanted == "auto" and task == "segmentation" and not grid:
            notes.append(
                "the store has no grid: only the pooled feature is distilled; extract with --grid 16 for more"
            )
        return True, False
    return task != "segmentation", True


def resolve_augmentation(
    config: TrainConfig, plan: DistillationPlan, notes: list[str]
) -> tuple[str, Augmentation]:
    """How images vary. Without a grid that moves along, only colours and mild crops go with feature targets."""
    fixed = plan.features and not plan.grid and not plan.recorded
    name: str = config.augment
    if name == "auto":
        name = "photometric" if plan.recorded else "mild" if fixed else "full"
        if fixed:
            notes.append(
                "augment mild: without a stored grid, targets cannot follow a crop or flip "
                "(extract with --grid 7 or --views 4 for more)"
            )
    if name == "full" and fixed:
        raise ConfigError(
            f"augment full: {config.store} has no grid that could follow crops and flips: use augment mild, or extract "
            "with --grid 7 or --views 4"
        )
    if plan.recorded and name in ("mild", "full"):
        raise ConfigError(
            f"augment {name}: recorded views are replayed as they are: use photometric or --views random"
        )
    return name, AUGMENTATIONS[name]


def check_mixing(config: TrainConfig, task: str, plan: DistillationPlan) -> None:
    """MixUp and CutMix mix every target with the images' weights, or are refused."""
    chosen = "mixup_alpha" if config.mixup_alpha else "cutmix_alpha" if config.cutmix_alpha else None
    if chosen is None:
        return
    if task != "classification":
        raise ConfigError(f"{chosen}: works for classification, the task is {task}")
    if config.feature_loss_type == "relation" and plan.pooled:
        raise ConfigError(
            f"{chosen}: mixed samples have no relation to compare: use another feature_loss_type"
        )
    if config.cutmix_alpha and plan.cells:
        raise ConfigError(
            "cutmix_alpha: cells of two images cannot share one target: use feature_target pooled, or MixUp"
        )
