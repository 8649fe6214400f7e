"""From a resolved configuration to the parts of the loop; the only place of stage two that builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from console.options import options_of
from console.stop import StopRequest
from store.format import GRID, SIZES
from train.checkpoint import normalization
from train.config import TrainConfig
from train.data.batches import BatchLoader, EpochBatches, FeatureGatherer, default_workers
from train.data.clips import ClipReader, ClipViews, clip_places, collate_clips, gather_frames
from train.data.images import ImageReader, ImageViews, ViewSettings
from train.data.views import AUGMENTATIONS, Augmentation
from train.distill.objective import Objective
from train.distill.projector import DistilledStudent, build_projector
from train.distill.targets import Distillation, DistillationPlan
from train.distill.transport import resize_matrices
from train.errors import ConfigError
from train.loop.loop import Parts, Progress, derive_seed
from train.loop.optimizer import WeightAverage, build_optimizer
from train.loop.saving import StepGuard
from train.lora import apply_lora_options
from train.resolve import FeatureChoice, TrainingData, check_mixing, resolve_augmentation, resolve_features
from train.students.base import Student
from train.students.build import build_student
from train.tasks import build_task

#: Sub-seeds: the alignment head must not change the student's initial weights.
STUDENT_SEED, HEAD_SEED = 1, 2


@dataclass
class Built:
    """One training, ready to start."""

    parts: Parts
    student: Student
    features: FeatureChoice
    augmentation: str
    validation_samples: int
    notes: list[str] = field(default_factory=list)
    lora: Any = None


def build_training(
    config: TrainConfig,
    store: Any,
    data: TrainingData,
    accelerator: Accelerator,
    stop: StopRequest,
    *,
    control: bool = False,
) -> Built:
    """Build student, head, data and optimizer. Raises ConfigError or TrainError for what does not fit.

    `control`: the same student, images and order, but the task loss alone, at weight 1.
    """
    notes = list(data.notes)
    config = fit_batch(config, len(data.train_rows), accelerator, notes)
    student = build_initial_student(config, data)
    lora = apply_lora_options(student, config.model_dump(), trained=False)
    features = resolve_features(config, store[config.train_split], data.task, student.spec, notes)
    # The control is shown what its distilled counterpart is shown: `features` decides on the images of both.
    name, augmentation = resolve_augmentation(config, features, notes)
    learnt = FeatureChoice() if control else features
    check_mixing(config, data.task, learnt)
    module, objective = build_module(config, store, data, student, learnt)
    recorded = store.manifest.views if features.recorded else 0
    parts = build_parts(config, store, data, accelerator, stop, module, objective, augmentation, recorded)
    return Built(parts, student, features, name, data.validation_samples, notes, lora)


def fit_batch(config: TrainConfig, rows: int, accelerator: Accelerator, notes: list[str]) -> TrainConfig:
    """A recipe's batch shrinks to a small split; one that was asked for is an error."""
    if accelerator.num_processes > config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes"
        )
    if accelerator.num_processes > 1 and config.auto_batch:
        raise ConfigError(
            "auto_batch works in one process: others would wait for the one that ran out of memory; give a smaller "
            "--batch-size"
        )
    if config.batch_size <= rows:
        return config
    if config.is_explicit("batch_size"):
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than split {config.train_split} ({rows} samples): "
            f"pass --batch-size {rows} or less"
        )
    notes.append(f"batch_size {rows} instead of {config.batch_size}: the split has no more samples")
    return config.replace(batch_size=rows)


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


def student_options(config: TrainConfig) -> dict[str, Any]:
    """Options that only some types of student have; elsewhere an explicit one is an error."""
    if problems := config.unsupported_options():
        raise ConfigError("; ".join(problems))
    items = options_of(TrainConfig).items()
    chosen = {name: getattr(config, name) for name, item in items if config.student_type in item.students}
    dropout = chosen.pop("dropout", 0.0)
    return chosen | ({"drop_rate": dropout} if dropout else {})


def build_module(
    config: TrainConfig, store: Any, data: TrainingData, student: Student, features: FeatureChoice
) -> tuple[DistilledStudent, Objective]:
    """Student with alignment head, and the loss."""
    task = build_task(data.task, num_classes=data.num_classes, label_smoothing=config.label_smoothing)
    if not features.anything:
        return DistilledStudent(student, None, cells=False, pooled=False), Objective(task, None, 1.0, 0.0)
    plan = DistillationPlan(
        pooled=features.pooled,
        cells=features.cells,
        grid=features.grid,
        recorded=features.recorded,
        frames=features.frames,
        logits=features.logits,
        cell_shape=measure_cells(student) if features.grid else None,
        loss_type=config.feature_loss_type,
        temperature=config.temperature,
        feature_weight=config.feature_weight,
        logit_weight=config.logit_weight,
    )
    head = None
    if plan.distils_features:
        torch.manual_seed(derive_seed(config.seed, HEAD_SEED))
        head = build_projector(
            student.spec.feature_width,
            store.manifest.teacher.width,
            align_feature=config.align_feature,
            kind=config.align_head,
        )
    views = teacher_views(store, config.train_split) if features.grid and not features.recorded else None
    distillation = Distillation(plan, store[config.train_split], views)
    module = DistilledStudent(student, head, cells=features.cells, pooled=features.pooled)
    soft = config.soft_label_weight
    return module, Objective(task, distillation, config.hard_label_weight, soft)


@torch.no_grad()
def measure_cells(student: Student) -> tuple[int, int] | None:
    """Height and width of the student's feature map; None when it has none."""
    was_training, size = student.training, student.spec.image_size
    features = student.eval()(torch.zeros(1, 3, size, size)).features
    student.train(was_training)
    return (features.shape[2], features.shape[3]) if features.ndim == 4 else None


def teacher_views(store: Any, split: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What part of each image the teacher saw: float64 [N, 2, 3], from its resize policy and the images' sizes."""
    preprocessing = store.manifest.preprocessing
    sizes = np.maximum(store[split].read(SIZES), 1)
    return resize_matrices(preprocessing.resize, sizes, preprocessing.image_size)


def build_parts(
    config: TrainConfig,
    store: Any,
    data: TrainingData,
    accelerator: Accelerator,
    stop: StopRequest,
    module: DistilledStudent,
    objective: Objective,
    augmentation: Augmentation,
    recorded_views: int,
) -> Parts:
    """Loaders, optimizer and wrappers around module and objective."""
    module.to(accelerator.device)
    if accelerator.device.type == "cuda":
        use_channels_last(module)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if objective.distillation is not None:
        objective.distillation.to(accelerator.device)
    train_loader = build_loader(
        config,
        store,
        data,
        objective,
        accelerator,
        augmentation,
        training=True,
        recorded_views=recorded_views,
    )
    val_objective = validation_objective(objective, store, config, accelerator)
    val_loader = build_loader(
        config, store, data, val_objective, accelerator, AUGMENTATIONS["none"], training=False
    )
    optimizer = build_optimizer(module, config.optimizer, config.learning_rate, config.weight_decay)
    if config.compile:
        module.compile_student(-(-config.batch_size // accelerator.num_processes))
    wrapped = accelerator.prepare_model(module)
    average = WeightAverage(module.student, config.ema_decay) if config.ema_decay is not None else None
    return Parts(
        config=config,
        accelerator=accelerator,
        module=module,
        wrapped=wrapped,
        optimizer=accelerator.prepare_optimizer(optimizer),
        objective=objective,
        val_objective=val_objective,
        train_loader=train_loader,
        val_loader=val_loader,
        normalize=build_normalizer(module.student, accelerator.device),
        guard=StepGuard(module),
        progress=Progress(),
        average=average,
        stop=stop,
    )


def use_channels_last(module: nn.Module) -> None:
    """Convolutions in the memory format that tensor cores take; images come in it anyway (`build_normalizer`).

    Convolutions alone: other four-dimensional parameters (position tables) may be reshaped by views.
    """
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)


def validation_objective(
    objective: Objective, store: Any, config: TrainConfig, accelerator: Accelerator
) -> Objective:
    """The same terms for the validation split: whole images, so recorded views are not replayed.

    Statistics stay those of the training split.
    """
    if objective.distillation is None:
        return objective
    plan = objective.distillation.plan
    split = store[config.val_split]
    logits = plan.logits if plan.logits and f"logits/{plan.logits}" in split.names else None
    grid = plan.grid and GRID in split.names
    plan = replace(plan, recorded=False, logits=logits, grid=grid, cells=plan.cells and (grid or plan.frames))
    views = teacher_views(store, config.val_split) if grid else None
    distillation = Distillation(plan, store[config.train_split], views).to(accelerator.device)
    return Objective(objective.task, distillation, objective.hard_weight, objective.soft_weight)


def build_loader(
    config: TrainConfig,
    store: Any,
    data: TrainingData,
    objective: Objective,
    accelerator: Accelerator,
    augmentation: Augmentation,
    *,
    training: bool,
    recorded_views: int = 0,
) -> BatchLoader:
    """The loader of the training or the validation split."""
    name = config.train_split if training else config.val_split
    split, manifest = store[name], store.manifest
    arrays = [] if objective.distillation is None else objective.distillation.plan.arrays
    settings = ViewSettings(
        image_size=config.image_size,
        policy=(data.preprocessing or manifest.preprocessing).resize,
        augmentation=augmentation,
        seed=config.seed,
        masks=data.task == "segmentation",
        recorded_views=recorded_views,
    )
    batches = EpochBatches(
        data.train_rows if training else data.val_rows,
        config.batch_size,
        config.seed if training else None,
        accelerator.process_index,
        accelerator.num_processes,
    )
    depth = config.grad_accum_steps + 1 if training else 2
    return BatchLoader(
        batches=batches,
        gatherer=FeatureGatherer(split, arrays, depth, accelerator.device),
        labels=data.train_labels if training else data.val_labels,
        workers=config.workers if config.workers is not None else default_workers(accelerator.device),
        carry=None if objective.distillation is None else objective.distillation.transport,
        **build_samples(config, store, data, name, settings, frames=wants_frames(objective)),
    )


def wants_frames(objective: Objective) -> bool:
    plan = None if objective.distillation is None else objective.distillation.plan
    return plan is not None and plan.frames and plan.cells


def build_samples(
    config: TrainConfig, store: Any, data: TrainingData, name: str, settings: ViewSettings, *, frames: bool
) -> dict[str, Any]:
    """The data set of a split, and how its samples are joined: images, or clips for a clip student."""
    split, manifest = store[name], store.manifest
    root = config.data_root or manifest.data_root
    depth = (data.preprocessing or manifest.preprocessing).bit_depth
    if config.student_type != "lstm":
        reader = ImageReader(split, root, manifest.preprocessing, depth)
        return {"dataset": ImageViews(reader, settings)}
    gather = partial(gather_frames, split) if frames else None
    clips = ClipReader(split, root, *clip_places(split, manifest), depth)
    return {"dataset": ClipViews(clips, settings), "collate": collate_clips, "gather_more": gather}


def build_normalizer(student: Student, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images channel-last → float32 channel-first, with the student's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=device) * 255 for values in normalization(student))

    def normalize(images: Tensor) -> Tensor:
        """uint8 [..., S, S, 3] → float32 [..., 3, S, S]; on a GPU a view of channel-last memory."""
        normal = (images - mean).div_(std).movedim(-1, -3)
        return normal if device.type == "cuda" else normal.contiguous()

    return normalize
