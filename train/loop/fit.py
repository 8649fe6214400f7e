"""The students of our own loop: what is built, announced and recorded around `Trainer.fit`."""

from __future__ import annotations

import dataclasses
from typing import Any

from console.log import get_logger
from store.reader import open_store
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data.splits import resolve_data, resolve_task
from train.errors import ConfigError
from train.fit import FitRequest, FitResult
from train.loop.assemble import Built, build_training
from train.loop.machine import build_accelerator, peak_memory, set_determinism
from train.loop.quality import feature_quality
from train.loop.trainer import Trainer
from train.metrics import name_classes
from train.run_folder import RunFolder, store_reference

log = get_logger("train")


class LoopTrainer:
    """Trains every student but YOLO (see `train.fit.Trainer`).

    Raises ConfigError or TrainError for options and data that do not fit.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.batch_size = config, config.batch_size
        self.task = resolve_task(config)
        if (config.control or config.control_only) and self.task == "features":
            raise ConfigError("control: without a task loss there is nothing to compare with")
        self.store = open_store(config.store)
        self.data = resolve_data(config, self.store, self.task)
        build_accelerator(config)  # joins the other ranks

    def fit(self, request: FitRequest) -> FitResult:
        config, folder = request.config, request.folder
        self.batch_size = config.batch_size
        set_determinism(config.deterministic)
        accelerator = build_accelerator(config)
        if accelerator.is_main_process:
            folder.path.mkdir(parents=True, exist_ok=True)
        built = build_training(
            config,
            self.store,
            self.data,
            accelerator,
            request.deadline.stop,
            control=request.control,
            initial=phase_one_of(folder),
        )
        if accelerator.is_main_process:
            announce(built, request.control)
            choices = self.resolved(built, request.control)
            if config.resume and folder.last.exists():
                folder.check_same_distillation(choices)
            folder.write_config(request.asked, choices, store_reference(self.store))
        config = built.parts.config
        progress = Trainer(
            built,
            config,
            folder.path,
            self.store.manifest,
            self.task,
            request.events,
            request.deadline,
            f"phase one of {config.out.name}" if request.pretraining else f"training {folder.path.name}",
        ).fit()
        quality = {}
        if not request.pretraining:
            quality = feature_quality(built, config, self.store, self.data, folder.best)
        return FitResult(
            config=config,
            student=built.student,
            num_classes=self.data.num_classes,
            validation_samples=self.data.validation_samples,
            epochs_done=progress.epoch,
            best_epoch=progress.best_epoch,
            metrics={**progress.best_metrics, **quality},
            per_class=name_classes(progress.best_details, self.store.manifest.class_names),
            trainable_parameters=sum(p.numel() for p in built.student.parameters() if p.requires_grad),
            wall_time_s=progress.wall_time_s,
            images_per_second=round(progress.trained_samples / max(progress.trained_seconds, 1e-9), 2),
            details={
                **peak_memory(),
                "batch_size": config.batch_size,
                "grad_accum_steps": config.grad_accum_steps,
                "notes": built.notes,
                **({} if request.control else {"distillation": describe_distillation(built)}),
            },
        )

    def reduce_batch(self, config: TrainConfig, folder: RunFolder) -> TrainConfig | None:
        """With --auto-batch half the batch and twice the accumulation: the same samples in every step."""
        if not config.auto_batch or config.batch_size < 2:
            return None
        smaller, steps = config.batch_size // 2, config.grad_accum_steps * 2
        log.warning("out of memory: continuing with batch_size %d and grad_accum_steps %d", smaller, steps)
        if config.batch_size % 2:
            # An epoch's steps hold other samples now, so a position in it means nothing.
            folder.last.unlink(missing_ok=True)
        return config.replace(batch_size=smaller, grad_accum_steps=steps)

    def resolved(self, built: Built, control: bool) -> dict[str, Any]:
        """What options and store were resolved to, for config.json."""
        parts = built.parts
        return {
            "task": self.task,
            "num_classes": self.data.num_classes,
            "augment": built.augmentation,
            "distilled": None if control else dataclasses.asdict(built.plan),
            "batch_size": parts.config.batch_size,
            "grad_accum_steps": parts.config.grad_accum_steps,
            "processes": parts.accelerator.num_processes,
            "device": str(parts.accelerator.device),
            "precision": parts.accelerator.mixed_precision,
            "initial_weights": built.student.initial_weights.origin,
            "notes": built.notes,
        }


def describe_distillation(built: Built) -> dict[str, Any]:
    """What became of the distillation terms, for summary.json.

    `feature_weight`: given, or as it was found; `teacher`: the task's metric of a probe of the teacher's features;
    `ended_after_epoch`: the student was better than that.
    """
    parts = built.parts
    given, progress = parts.config.feature_weight, parts.progress
    found = progress.calibration.weight if given is None else given
    return {
        "feature_weight": found if built.plan.features else None,
        "teacher": None if parts.reference is None else {parts.reference.metric: parts.reference.value},
        "ended_after_epoch": progress.distilled_epochs,
    }


def phase_one_of(folder: RunFolder) -> dict[str, Any] | None:
    """The checkpoint of phase one; None for a run without it, as a control is."""
    path = folder.phase_one()
    return None if path is None else load_checkpoint(path)


def announce(built: Built, control: bool) -> None:
    """Log what was decided."""
    for note in () if control else built.notes:
        log.info("%s", note)
    weights = built.student.initial_weights
    if weights.reinitialized:
        log.info(
            "initialized randomly, since the weights given have a different shape: %s",
            ", ".join(weights.reinitialized),
        )
    total = built.student.parameter_count()
    trained = sum(p.numel() for p in built.parts.module.student.parameters() if p.requires_grad)
    what = "control" if control else "training"
    log.info("%s %s: %s of %s parameters learn", what, built.student.spec.name, f"{trained:,}", f"{total:,}")
