"""From a resolved configuration to the parts of the loop; the only place of stage two that builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from console.options import options_of
from processes.stop import StopRequest
from store.format import IMAGES_ENCODED, IMAGES_RAW, MASK, SIZES, view_array
from store.reader import Store
from train.config import TrainConfig
from train.data.batches import (
    Balance,
    BatchLoader,
    EpochBatches,
    FeatureGatherer,
    SeveralGatherers,
    default_workers,
)
from train.data.clips import ClipReader, ClipViews, clip_places, collate_clips, gather_teachers_frames
from train.data.images import ImageReader, ImageViews, ViewSettings
from train.data.splits import TrainingData, fit_batch
from train.data.views import AUGMENTATIONS, Augmentation
from train.distill.objective import DistillationPlan, Objective, build_standardizers, other_teacher
from train.distill.projector import DistilledStudent, TeacherHeads, build_projector, take_over_heads
from train.distill.reference import teacher_reference
from train.distill.resolve import (
    check_mixing,
    chosen_teachers,
    logit_temperature,
    resolve_augmentation,
    resolve_teachers,
)
from train.distill.transport import resize_matrices
from train.errors import ConfigError
from train.loop.loop import Parts, TrainingState, build_normalizer, derive_seed
from train.loop.optimizer import WeightAverage, build_optimizer
from train.loop.saving import StepGuard
from train.lora import apply_lora_options
from train.metrics import TASK_METRICS
from train.run_folder import rotations_folder
from train.students.base import Student
from train.students.build import build_student
from train.students.weights import load_phase_one
from train.tasks import Task, build_task

#: Least share of labeled samples in a batch by default.
LABELED_SHARE = 0.25
#: Sub-seeds: the alignment head must not change the student's initial weights.
STUDENT_SEED, HEAD_SEED = 1, 2


@dataclass
class Built:
    """One training, ready to start.

    `plans`: what is distilled of each of `teachers` (a control distills nothing, but is shown the same).
    """

    parts: Parts
    student: Student
    teachers: Sequence[Store]
    plans: list[DistillationPlan]
    augmentation: str
    validation_samples: int
    notes: list[str] = field(default_factory=list)
    lora: Any = None


def build_training(
    config: TrainConfig,
    store: Store,
    data: TrainingData,
    accelerator: Accelerator,
    stop: StopRequest,
    *,
    control: bool = False,
    initial: Mapping[str, Any] | None = None,
) -> Built:
    """Build student, head, data and optimizer. Raises ConfigError or TrainError for what does not fit.

    `control`: the same student, images and order, but the task loss alone, at weight 1. `initial`: the checkpoint of
    phase one, which the student and its head start from.
    """
    notes, device = list(data.notes), accelerator.device
    teachers = chosen_teachers(config, store)
    store = teachers[0]
    check_processes(config, accelerator)
    config = fit_batch(config, len(data.train_rows), notes.append)
    student = build_initial_student(config, data)
    if initial is not None:
        load_phase_one(student, initial)
    lora = apply_lora_options(student, config.model_dump(), trained=False)
    plans = resolve_teachers(config, teachers, data.task, student, notes)
    # The control is shown what its distilled counterpart is shown: the plans decide on the images of both.
    name, augmentation = resolve_augmentation(config, plans, notes)
    all_learned = [DistillationPlan()] if control else plans
    learned = all_learned[0]
    for plan in all_learned:
        check_mixing(config, data.task, plan)

    # Every map that a teacher teaches, once; those of the first come first.
    levels = list(dict.fromkeys(level for plan in all_learned for level, _ in plan.levels))
    student.choose_levels(levels)
    if not student.spec.num_classes:
        student.rest_levels()
    places = [[levels.index(level) for level, _ in plan.levels] for plan in all_learned]
    heads = [
        build_heads(config, number, teacher, student, plan, places[number])
        for number, (teacher, plan) in enumerate(zip(teachers, all_learned, strict=False))
    ]
    if initial is not None:
        take_over_heads(heads, initial)
    module = DistilledStudent(
        student,
        heads[0].projector,
        cells=learned.cells,
        pooled=learned.pooled,
        level_heads=list(heads[0].level_heads),
        others=heads[1:],
    )
    task = build_task(data.task, num_classes=data.num_classes, label_smoothing=config.label_smoothing)
    objective = val_objective = Objective(task)
    if learned.anything:
        measured = measure_cells(student) if any(plan.grid for plan in all_learned) else []
        cells = [[measured[0], *(measured[1 + place] for place in own)] if measured else [] for own in places]
        objective = build_objective(config, teachers, task, all_learned, config.train_split, cells, device)
        # The validation shows whole images, so recorded views are not replayed.
        shown = [
            plan.reduced_to(teacher[config.val_split])
            for teacher, plan in zip(teachers, all_learned, strict=True)
        ]
        val_objective = build_objective(config, teachers, task, shown, config.val_split, cells, device)
    module.to(device)
    if device.type == "cuda":
        use_channels_last(module)
    if accelerator.num_processes > 1 and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    recorded = store.manifest.views if plans[0].recorded else 0
    taught = learned.anything and config.soft_label_weight > 0
    balance = balance_rows(config, data, teaches_all=taught, maps=learned.maps is not None)
    share = labeled_share(config, data, balance)
    if note := describe_unlabeled(config, data, share, pretrained=initial is not None):
        notes.append(note)
    train_loader = build_loader(
        config,
        store,
        data,
        objective,
        accelerator,
        augmentation,
        training=True,
        recorded_views=recorded,
        balance=balance,
        others=teachers[1:],
    )
    val_loader = build_loader(
        config,
        store,
        data,
        val_objective,
        accelerator,
        AUGMENTATIONS["none"],
        training=False,
        others=teachers[1:],
    )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            f"{config.student}: nothing of it learns: it has no place for the teacher's features, or all of it is frozen"
        )
    if config.optimizer == "adam" and config.weight_decay and learned.anything:
        # A feature term is a mean over cells and channels: its gradients are smaller than decay · weight, and Adam, which
        # divides by the gradient's size, then takes steps of full length towards 0.
        notes.append(
            f"optimizer adam adds the weight decay of {config.weight_decay:g} to the gradient, which can drive weights that "
            "learn features to 0: use --optimizer adamw"
        )
    optimizer = build_optimizer(module, config.optimizer, config.learning_rate, config.weight_decay)
    if config.compile:
        module.compile_student(-(-config.batch_size // accelerator.num_processes))
    parts = Parts(
        config=config,
        accelerator=accelerator,
        module=module,
        wrapped=accelerator.prepare_model(module),
        optimizer=accelerator.prepare_optimizer(optimizer),
        objective=objective,
        val_objective=val_objective,
        train_loader=train_loader,
        val_loader=val_loader,
        normalize=build_normalizer(student, device),
        guard=StepGuard(module),
        progress=TrainingState(),
        average=WeightAverage(module.student, config.ema_decay) if config.ema_decay is not None else None,
        stop=stop,
        validation_samples=data.validation_samples,
        labeled_share=share,
    )
    if config.distill_until == "auto" and learned.anything:
        metric = TASK_METRICS[data.task].best
        splits = (store[config.val_split], store[config.train_split])
        parts.reference = teacher_reference(store, *splits, metric, learned.logits)
        parts.labeled_alone = balance_rows(config, data, teaches_all=False, maps=False)
    return Built(parts, student, teachers, plans, name, data.validation_samples, notes, lora)


def check_processes(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError for options that several processes cannot have."""
    if accelerator.num_processes > config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes"
        )
    if accelerator.num_processes > 1 and config.auto_batch:
        raise ConfigError(
            "auto_batch works in one process: others would wait for the one that ran out of memory; give a smaller "
            "--batch-size"
        )


def build_initial_student(config: TrainConfig, data: TrainingData) -> Student:
    """The student with its initial weights, a function of the seed alone."""
    torch.manual_seed(derive_seed(config.seed, STUDENT_SEED))
    student = build_student(
        config.student,
        num_classes=data.num_classes,
        image_size=config.image_size,
        student_path=config.student_path,
        pretrained=config.pretrained,
        **student_options(config),
    )
    if config.gradient_checkpointing:
        student.set_gradient_checkpointing(True)
    return student


def balance_rows(config: TrainConfig, data: TrainingData, *, teaches_all: bool, maps: bool) -> Balance | None:
    """How batches are drawn where only some rows are labeled; None: every row once an epoch.

    A control, which nothing but labels teaches (`teaches_all` False), sees labeled rows only, in as many full batches.
    `maps`: soft class maps teach rows without a mask.
    """
    if data.labeled is None or data.labeled.all() or not data.labeled.any():
        return None
    rows = data.train_rows
    if not teaches_all:
        return Balance(rows[data.labeled], rows[:0], 1.0)
    if not config.hard_label_weight:
        return None
    share = config.labeled_share
    if share is None and data.task == "segmentation" and not maps:
        # The features of images without a mask make a U-Net worse (docs/benchmarks.md, street scenes).
        share = 1.0
    if share is None and data.labeled.mean() >= LABELED_SHARE:
        return None
    return Balance(rows[data.labeled], rows[~data.labeled], share or LABELED_SHARE)


def describe_unlabeled(config: TrainConfig, data: TrainingData, share: float, *, pretrained: bool) -> str:
    """What the training does with the samples that have no label or mask; empty without such samples.

    `share`: of labeled samples in a batch; `pretrained`: phase one learned the features of all samples.
    """
    if data.labeled is None or data.labeled.all():
        return ""
    target, missing = TASK_METRICS[data.task].target, int((~data.labeled).sum())
    counted = f"{missing} samples of {config.train_split} have no {target}"
    if share < 1:
        return f"{counted}: they are learned from the teacher alone"
    if pretrained:
        return f"{counted}: phase one learned their features, this phase leaves them out"
    if config.control_only:
        return f"{counted}: they are left out"
    return f"{counted}: they are left out; --pretrain-epochs N learns their features first"


def build_heads(
    config: TrainConfig,
    number: int,
    store: Store,
    student: Student,
    plan: DistillationPlan,
    places: Sequence[int],
) -> TeacherHeads:
    """The alignment head of the student's features (None: they are not distilled), and one for each level, of a teacher.

    Their weights depend on the seed and the teacher's number alone.
    """
    torch.manual_seed(derive_seed(config.seed, HEAD_SEED, *([number] if number else [])))
    specs = store[config.train_split].specs

    def build(width: int, teacher: int) -> nn.Module:
        return build_projector(width, teacher, align_feature=config.align_feature, kind=config.align_head)

    whole = plan.pooled or plan.cells
    head = build(student.spec.feature_width, store.manifest.teacher.width) if whole else None
    levels = [
        build(student.level_width(level), specs[array].row_shape[-1])
        for (level, _), array in zip(plan.levels, plan.level_arrays, strict=True)
    ]
    return TeacherHeads(head, cells=plan.cells, pooled=plan.pooled, level_heads=levels, places=places)


def student_options(config: TrainConfig) -> dict[str, Any]:
    """Options that only some types of student have; elsewhere an explicit one is an error."""
    if problems := config.unsupported_options():
        raise ConfigError("; ".join(problems))
    if config.student_type == "yolov8":
        return {}  # its options are those of its distillation and of ultralytics' trainer
    items = options_of(TrainConfig).items()
    chosen = {
        name: getattr(config, name)
        for name, item in items
        if config.student_type in item.students and not item.distills
    }
    dropout = chosen.pop("dropout", 0.0)
    return chosen | ({"drop_rate": dropout} if dropout else {})


def labeled_share(config: TrainConfig, data: TrainingData, balance: Balance | None) -> float:
    """The mean share of labeled samples in a batch; 1 where the task has no such rows."""
    if data.labeled is None or not data.labeled.any():
        return 1.0
    if balance is None:
        return float(data.labeled.mean())
    return balance.count(config.batch_size) / config.batch_size


def build_objective(
    config: TrainConfig,
    teachers: Sequence[Store],
    task: Task,
    plans: Sequence[DistillationPlan],
    split: str,
    cells: Sequence[Sequence[tuple[int, int]]],
    device: torch.device,
) -> Objective:
    """The loss on a split. The statistics are those of the training split, for the validation too.

    `cells`: for each teacher, height and width of the student's map and of the levels that it teaches; none without grids.
    """
    (store, *other_stores), (plan, *other_plans) = teachers, plans
    others = [
        build_objective(config, [other], task, [its], split, [shapes], device)
        for other, its, shapes in zip(other_stores, other_plans, cells[1:], strict=True)
    ]
    views, soft = None, config.soft_label_weight
    if (plan.grid and not plan.recorded) or plan.maps:
        # What part of each image the teacher saw follows from its resize policy and the images' sizes.
        preprocessing, sizes = store.manifest.preprocessing, np.maximum(store[split].read(SIZES), 1)
        views = resize_matrices(preprocessing.resize, sizes, preprocessing.image_size)
    return Objective(
        task,
        plan,
        weights={
            "hard_loss": config.hard_label_weight,
            # Without a number, the loop finds one in its first steps.
            "feature_loss": soft * (1.0 if config.feature_weight is None else config.feature_weight),
            "logit_loss": soft * config.logit_weight,
        },
        loss_type=config.feature_loss_type,
        temperature=logit_temperature(config, plan),
        standardizers=build_standardizers(plan, store[config.train_split], device, rotations_folder(config)),
        teacher_views=views,
        cell_shapes=cells[0] if plan.grid else (),
        others=others,
    )


@torch.no_grad()
def measure_cells(student: Student) -> list[tuple[int, int]]:
    """Height and width of the student's feature map and of its further maps; empty when it has none."""
    was_training, size = student.training, student.spec.image_size
    output = student.eval()(torch.zeros(1, 3, size, size))
    student.train(was_training)
    if output.features.ndim != 4:
        return []
    return [(maps.shape[2], maps.shape[3]) for maps in (output.features, *output.levels)]


def use_channels_last(module: nn.Module) -> None:
    """Convolutions in the memory format that tensor cores take; images come in it anyway (`build_normalizer`).

    Convolutions alone: other four-dimensional parameters (position tables) may be reshaped by views.
    """
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)


def build_loader(
    config: TrainConfig,
    store: Store,
    data: TrainingData,
    objective: Objective,
    accelerator: Accelerator,
    augmentation: Augmentation,
    *,
    training: bool,
    recorded_views: int = 0,
    balance: Balance | None = None,
    others: Sequence[Store] = (),
) -> BatchLoader:
    """The loader of the training or the validation split: images, or clips for a clip student.

    `others`: the store as the teachers of `objective.others` show it.
    """
    name = config.train_split if training else config.val_split
    split, manifest = store[name], store.manifest
    shown = data.preprocessing or manifest.preprocessing
    # Prefix of the names in a batch → a teacher's features, and what of them is needed. A control needs none.
    learned = {"": (split, objective.plan)} | {
        other_teacher(number): (teacher[name], other.plan)
        for number, (teacher, other) in enumerate(zip(others, objective.others, strict=False))
    }
    settings = ViewSettings(
        image_size=config.image_size,
        policy=shown.resize,
        augmentation=augmentation,
        seed=config.seed,
        masks=data.task == "segmentation",
        recorded_views=recorded_views,
    )
    root = config.data_root or manifest.data_root
    if config.student_type == "lstm":
        clips = ClipReader(split, root, *clip_places(split, manifest), shown.bit_depth)
        readers = {prefix: own for prefix, (own, plan) in learned.items() if plan.frames and plan.cells}
        frames = partial(gather_teachers_frames, readers) if readers else None
        samples: dict[str, Any] = {
            "dataset": ClipViews(clips, settings),
            "collate": collate_clips,
            "gather_more": frames,
        }
    else:
        # Stored raw images are what the first teacher saw, whichever is learned from.
        images = ImageReader(split, root, store.whole.manifest.preprocessing, shown.bit_depth)
        samples = {"dataset": ImageViews(images, settings)}
    batches = EpochBatches(
        data.train_rows if training else data.val_rows,
        config.batch_size,
        config.seed if training else None,
        accelerator.process_index,
        accelerator.num_processes,
        balance,
        shard_rows=manifest.shard_rows if split.mirror is not None else 0,
    )
    if training and split.mirror is not None:
        from store.mirror import download_ahead

        stored = [name for name in (IMAGES_ENCODED, IMAGES_RAW, MASK) if name in split.names]
        for prefix, (own, plan) in learned.items():
            mirrored = {view_array(name) for name in plan.arrays} if plan.exact_flip else set()
            names = [*plan.arrays, *sorted(mirrored.difference(plan.arrays)), *([] if prefix else stored)]
            download_ahead(own, names, batches.order()[0], manifest.shard_rows)
    depth = config.grad_accum_steps + 1 if training else 2
    gatherers = {
        prefix: FeatureGatherer(
            own, plan.arrays, depth, accelerator.device, exact_flip=training and plan.exact_flip
        )
        for prefix, (own, plan) in learned.items()
    }
    return BatchLoader(
        batches=batches,
        gatherer=SeveralGatherers(gatherers) if len(gatherers) > 1 else gatherers[""],
        labels=data.train_labels if training else data.val_labels,
        workers=config.workers if config.workers is not None else default_workers(accelerator.device),
        carry=objective.transport,
        **samples,
    )
