"""From options and a store to what is distilled and how images vary.

What the store cannot serve is an error that names what to extract; every choice made here is written to config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from store.format import (
    FRAMES,
    GRID,
    LOGITS,
    MAPS,
    POOLED,
    PROBE,
    VIEWS_GRID,
    VIEWS_POOLED,
    stored_layers,
    view_array,
)
from store.reader import Split, Store
from store.summary import unlabeled_rows
from train.config import TrainConfig
from train.data.splits import CLASS_TASKS
from train.data.views import AUGMENTATIONS, Augmentation
from train.distill.levels import (
    DETECTOR_LEVELS,
    check_layers,
    check_levels,
    detector_levels,
    parse_levels,
)
from train.distill.objective import DistillationPlan
from train.errors import ConfigError
from train.students.base import Student, StudentSpec

#: Of pooled targets whose mirror images are stored, as in AUGMENTATIONS["full"].
FLIP_PROBABILITY = 0.5


def chosen_teachers(config: TrainConfig, store: Store) -> list[Store]:
    """The store as each teacher of `--teachers` shows it (`Store.of_teacher`); without the option, as the first one does.

    Raises StoreError for a name that the store does not have.
    """
    return [store.of_teacher(name) for name in config.teacher_names or [store.whole.teacher_name]]


def resolve_teachers(
    config: TrainConfig, teachers: Sequence[Store], task: str, student: Student, notes: list[str]
) -> list[DistillationPlan]:
    """What is distilled of each of `chosen_teachers`: of all but the first the features alone.

    Layers in `--distill-layers` are the first one's; the others teach the same levels their last layer.

    Raises ConfigError for options that the store cannot serve (and what to extract).
    """
    train = config.train_split
    first = resolve_features(
        config, teachers[0][train], task, student, notes, exact_flip=teachers[0].manifest.exact_flip
    )
    if not first.features:
        if len(teachers) > 1 and config.distillation_type != "none":
            raise ConfigError(
                f"teachers {config.teachers}: distillation_type {config.distillation_type} learns no features: name one"
            )
        return [first]
    ours = further_config(config)
    plans = [first]
    for store in teachers[1:]:
        plan = resolve_features(ours, store[train], task, student, [], exact_flip=store.manifest.exact_flip)
        if (plan.recorded, plan.exact_flip) != (first.recorded, first.exact_flip):
            raise ConfigError(
                f"teachers {config.teachers}: not all of them have the same stored views: use --views random"
            )
        plans.append(plan)
    return plans


def further_config(config: TrainConfig) -> TrainConfig:
    """The configuration for a teacher after the first one."""
    text = config.distill_layers
    levels = None if text is None else ",".join(parse_levels(text))
    return config.replace(distillation_type="feature", distill_layers=levels)


def resolve_features(
    config: TrainConfig,
    split: Split,
    task: str,
    student: Student,
    notes: list[str],
    *,
    exact_flip: bool = False,
) -> DistillationPlan:
    """What is distilled. Raises ConfigError for options that the store cannot serve (and what to extract).

    exact_flip: the stored views are the mirror images.
    """
    spec = student.spec
    kind = config.distillation_type or ("hybrid" if task in CLASS_TASKS else "feature")
    if task == "features":
        if config.distillation_type in ("none", "logit"):
            raise ConfigError(
                f"task features learns the teacher's features: distillation_type {kind} leaves nothing"
            )
        kind = "feature"
    if kind == "none":
        return DistillationPlan()
    names = set(split.names)
    predictions = resolve_logits(config, kind, task, split, notes)
    logits, maps = predictions.get("logits"), predictions.get("maps")
    if kind == "logit":
        return DistillationPlan(logits=logits, maps=maps)
    if POOLED not in names:
        raise ConfigError(
            f"{config.store} has no {POOLED}: extract it again; --distillation-type {kind} needs it"
        )
    if spec.feature_kind == "sequence":
        return DistillationPlan(**resolve_frames(config, names), logits=logits, maps=None)
    recorded = resolve_recorded(config, names, exact_flip)
    grid = (VIEWS_GRID if recorded else GRID) in names
    pooled, cells = resolve_target(config, task, spec, grid, notes)
    plan = DistillationPlan(
        pooled=pooled, cells=cells, grid=grid, recorded=recorded, logits=logits, maps=maps
    )
    plan = resolve_levels(config, student, plan, names)
    # A copy of some arrays may have left the mirror images out.
    mirrored = {view_array(name) for name in plan.arrays} - set(plan.arrays)
    return replace(plan, exact_flip=exact_flip and config.views != "random" and mirrored <= names)


def resolve_logits(
    config: TrainConfig, kind: str, task: str, split: Split, notes: list[str]
) -> dict[str, str]:
    """`logits`, or of masks `maps`: the name of the stored predictions to learn from; empty for none."""
    if kind == "feature":
        return {}
    names = set(split.names)
    field, folder, missing = "logits", LOGITS, "the store has no teacher logits"
    if task == "segmentation":
        field, folder, missing = "maps", MAPS, "the store has no soft class maps"
    elif task not in CLASS_TASKS:
        if kind == "logit":
            raise ConfigError(
                f"distillation_type logit needs classes of samples or masks, the task is {task}: use feature"
            )
        return {}
    stored = sorted(name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/"))
    wanted = config.teacher_logits
    if wanted != "auto" and wanted not in stored:
        raise ConfigError(f"teacher_logits {wanted}: {config.store} has {', '.join(stored) or 'none'}")
    if stored and field == "maps" and config.hard_label_weight and not unlabeled_rows(split, "mask").any():
        problem = f"every image of {split.where} has a mask, and soft class maps teach those without one"
        if kind == "logit":
            raise ConfigError(f"distillation_type logit: {problem}: use feature")
        notes.append(f"{problem}: hybrid uses the feature term alone")
        return {}
    if stored:
        return {field: wanted if wanted != "auto" else PROBE if PROBE in stored else stored[0]}
    if kind == "logit":
        raise ConfigError(f"{missing}: run `cli probe {config.store}` first")
    notes.append(f"{missing} (cli probe makes them): hybrid uses the feature term alone")
    return {}


def logit_temperature(config: TrainConfig, plan: DistillationPlan) -> float:
    """The given one, or what suits the logits.

    A probe's are fitted to give probabilities. Fitted on few labels they differ little, and at temperature 4 hardly at all: the
    student would learn all classes' small differences alike (benchmarks.md). A model's own scores are larger.
    """
    if config.temperature is not None:
        return config.temperature
    return 1.0 if plan.logits == PROBE else 4.0


def resolve_recorded(config: TrainConfig, names: set[str], exact_flip: bool) -> bool:
    """Whether recorded views are replayed."""
    stored = VIEWS_POOLED in names and not exact_flip
    if config.views == "recorded" and exact_flip:
        raise ConfigError(
            f"views recorded: {config.store} has mirror images (--views flip), which --views auto uses: leave the "
            "option out, or extract with --views K"
        )
    if config.views == "recorded" and not stored:
        raise ConfigError(f"views recorded: {config.store} has none: extract with --views K")
    return stored and config.views != "random"


def resolve_frames(config: TrainConfig, names: set[str]) -> dict[str, Any]:
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


def resolve_levels(
    config: TrainConfig, student: Student, plan: DistillationPlan, names: set[str]
) -> DistillationPlan:
    """The plan with the levels of `--distill-layers`, or the student's default ones.

    The last level stays in `cells` where it learns the last layer, whose pooled features it may learn too.
    """
    text = config.distill_layers
    if student.spec.type == "yolov8":
        # Phase one teaches the whole neck: a level that is not chosen learns the last layer.
        chosen = dict.fromkeys(DETECTOR_LEVELS) | detector_levels(text, config.student, stored_layers(names))
    elif text is None:
        chosen = dict.fromkeys((*student.default_levels, student.last_level))
    else:
        chosen = parse_levels(text)
        check_levels(text, chosen, [*student.level_widths, student.last_level], config.student)
    if not plan.cells:
        if text is None or student.spec.type == "yolov8":
            return plan
        raise ConfigError(
            f"distill_layers {text}: levels learn stored grids: it needs a store with a grid (cli extract --grid), "
            "--feature-target auto, grid or both, and a feature_loss_type other than relation"
        )
    check_layers(config.store, chosen.values(), names, plan.grid_array)
    cells = chosen.get(student.last_level, -1) is None
    if cells:
        del chosen[student.last_level]
    elif student.last_level not in chosen and not plan.pooled and not student.spec.num_classes:
        raise ConfigError(
            f"distill_layers {text}: without labels nothing would teach the layers behind it: add {student.last_level}"
        )
    return replace(plan, cells=cells, levels=tuple(chosen.items()))


def resolve_augmentation(
    config: TrainConfig, plans: Sequence[DistillationPlan], notes: list[str]
) -> tuple[str, Augmentation]:
    """How images vary. Without grids that move along, only color changes and mild crops go with feature targets."""
    fixed = any(plan.features and not plan.grid and not plan.recorded for plan in plans)
    plan = plans[0]
    name: str = config.augment
    if name == "auto":
        name = "photometric" if plan.recorded else "mild" if fixed else "full"
        if fixed and plan.exact_flip:
            notes.append(
                "augment mild, with flips, whose targets are stored: without a stored grid, targets cannot follow a "
                "larger crop (extract with --grid 7 for more)"
            )
            return "mild with flips", replace(AUGMENTATIONS[name], flip_probability=FLIP_PROBABILITY)
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
    if config.cutmix_alpha and (plan.cells or plan.levels):
        raise ConfigError(
            "cutmix_alpha: cells of two images cannot share one target: use feature_target pooled, or MixUp"
        )
