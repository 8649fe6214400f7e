"""The students of our own loop: what is built, announced and recorded around a training, and the training itself.

One training in its folder: resume, epochs, checkpoints, curves, and the snapshot after a signal.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from console.output import get_logger
from console.progress import track_progress
from processes.stop import StopDeadline, Stopped
from store.format import Manifest
from store.reader import Store, open_store
from train.checkpoint import LAST, CheckpointError, describe_student, load_checkpoint
from train.config import TrainConfig, config_to_json
from train.data.batches import BatchLoader
from train.data.splits import TrainingData, resolve_data, resolve_task
from train.data.views import AUGMENTATIONS
from train.distill.objective import Objective
from train.distill.projector import pooled_rows
from train.distill.resolve import chosen_teachers
from train.errors import ConfigError
from train.events import EpochEnded, EventStream
from train.fit import FitRequest, FitResult
from train.loop.assemble import Built, build_loader, build_training
from train.loop.loop import Loop, NotFiniteError, TrainingState
from train.loop.machine import build_accelerator, peak_memory, set_determinism
from train.loop.optimizer import match_layout
from train.loop.saving import CheckpointWriter, adopt_best
from train.loop.trackers import Tracker, open_trackers
from train.metrics import TASK_METRICS, label_of, name_classes, text_of, warn_of_zero_metric
from train.run_folder import RunFolder, store_reference

log = get_logger("train")

#: Seconds to wait for an optimizer step that is writing weights right now, when a stop cannot wait longer.
LOCK_S = 1.0
#: Keys of an epoch's record that are not metrics of the task.
NOT_METRICS = frozenset(
    [
        "epoch",
        "train_loss",
        "hard_loss",
        "feature_loss",
        "logit_loss",
        "val_loss",
        "learning_rate",
        "feature_weight",
        "epoch_time_s",
    ]
)


class LoopTrainer:
    """Trains every student but YOLO (see `train.fit.Trainer`).

    Raises ConfigError or TrainError for options and data that do not fit.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.batch_size = config, config.batch_size
        self.task = resolve_task(config)
        if (config.control or config.control_only) and self.task == "features":
            raise ConfigError("control: without a task loss there is nothing to compare with")
        self.store, *others = chosen_teachers(config, open_store(config.store))
        self.data = resolve_data(config, self.store, self.task, others)
        build_accelerator(config)  # joins the other ranks

    def fit(self, request: FitRequest) -> FitResult:
        config, folder = request.config, request.folder
        self.batch_size = config.batch_size
        set_determinism(config.deterministic)
        accelerator = build_accelerator(config)
        if accelerator.is_main_process:
            folder.path.mkdir(parents=True, exist_ok=True)
        pretrained = folder.phase_one()  # None for a run without phase one, as a control is
        built = build_training(
            config,
            self.store,
            self.data,
            accelerator,
            request.deadline.stop,
            control=request.control,
            initial=None if pretrained is None else load_checkpoint(pretrained),
        )
        if accelerator.is_main_process:
            announce(built, request.control)
            choices = self.resolved(built, request.control)
            if config.resume and folder.last.exists():
                folder.check_same_distillation(choices)
            folder.write_config(request.asked, choices, store_reference(self.store, request.asked))
        config = built.parts.config
        progress = Training(
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
        if self.task == "features" and not request.pretraining:
            quality = accuracy_of_embeddings(built, config, self.store, self.data, folder.best)
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
            "distilled": None if control else dataclasses.asdict(built.plans[0]),
            # What is distilled of further teachers.
            "other_teachers": {}
            if control
            else {
                teacher.teacher_name: dataclasses.asdict(plan)
                for teacher, plan in zip(built.teachers[1:], built.plans[1:], strict=False)
            },
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

    `feature_weight`: given, or as it was found; `temperature`: of logits; `teacher`: the task's metric of a probe of the
    teacher's features; `ended_after_epoch`: the student was better than that.
    """
    parts = built.parts
    given, progress = parts.config.feature_weight, parts.progress
    found = progress.calibration.weight if given is None else given
    return {
        "feature_weight": found if built.plans[0].features else None,
        "temperature": parts.objective.temperature if built.plans[0].logits else None,
        "teacher": None if parts.reference is None else {parts.reference.metric: parts.reference.value},
        "ended_after_epoch": progress.distilled_epochs,
    }


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


class Training:
    """Runs a loop to its end and keeps the run folder up to date; ranks other than 0 write nothing."""

    def __init__(
        self,
        built: Built,
        config: TrainConfig,
        folder: Path,
        manifest: Manifest,
        task: str,
        events: EventStream,
        watch: StopDeadline,
        label: str,
    ) -> None:
        self.built, self.parts, self.config = built, built.parts, config
        self.folder, self.events, self.watch, self.label = folder, events, watch, label
        self.is_main = built.parts.accelerator.is_main_process
        self.about = describe_student(built.student, manifest, config_to_json(config), task)
        self.best_metric = TASK_METRICS[task].best
        self.loop = Loop(built.parts)
        self.trackers: list[Tracker] = []
        self.writer = CheckpointWriter(folder, 60 * config.checkpoint_minutes)
        self.started = time.monotonic()
        self.wall_before = 0.0

    def fit(self) -> TrainingState:
        """Train until the end, early stopping or a stop request; returns where the run stands.

        Raises Stopped after a signal: the last finished step is in last.pt.
        """
        self.restore()
        progress, loader = self.parts.progress, self.parts.train_loader
        total = len(loader.batches.rows)
        done = progress.epoch * total + int(progress.samples)
        self.watch.save = self.snapshot
        stream = None if self.is_main else io.StringIO()
        with track_progress(total * self.config.epochs, self.label, "samples", done, stream) as display:
            self.loop.display, self.loop.save_within_epoch = display, self.save_when_due
            try:
                for record in self.loop.run():
                    self.finish_epoch(record)
                    display.note(self.epoch_line(record))
                self.save_last(wait=True)
                self.report(wait=True)
            except Stopped as stopped:
                self.watch.acknowledge()
                self.save_last(wait=True)
                raise Stopped(self.stop_text(), stopped.exit_code) from None
            except Exception as error:
                self.save_after(error)
                raise
            finally:
                self.writer.close()
                loader.close()
                self.parts.val_loader.close()
                for tracker in self.trackers:
                    tracker.close()
        return progress

    def restore(self) -> None:
        """Continue from last.pt where there is one."""
        path = self.folder / LAST
        if path.exists():
            self.load(load_checkpoint(path))
        progress = self.parts.progress
        self.wall_before = progress.wall_time_s
        if self.is_main:
            adopt_best(self.folder, progress.best_epoch)
            RunFolder(self.folder).write_records(progress.history)
            self.events.catch_up(progress.history)
            self.trackers = open_trackers(
                self.config.tracker, self.folder, self.about["config"], progress.epoch
            )

    def load(self, content: Mapping[str, Any]) -> None:
        """Put a checkpoint's state into the parts."""
        parts, training = self.parts, content["training"]
        parts.module.student.load_state_dict(content["model_state_dict"])
        if parts.module.projector is not None:
            parts.module.projector.load_state_dict(content["alignment_head"])
        if parts.module.level_heads:
            parts.module.level_heads.load_state_dict(training["level_heads"])
        if parts.module.others:
            parts.module.others.load_state_dict(training["others"])
        parts.optimizer.load_state_dict(training["optimizer"])
        match_layout(parts.optimizer)
        if parts.average is not None and training["average"] is not None:
            parts.average.student.load_state_dict(training["average"]["state"])
            parts.average.updates = training["average"]["updates"]
        if parts.accelerator.scaler is not None and training["scaler"] is not None:
            parts.accelerator.scaler.load_state_dict(training["scaler"])
        parts.progress.restore(training["progress"])
        parts.guard.copy_buffers()
        epoch, step = parts.progress.epoch, parts.progress.step
        where = f"after epoch {epoch}" if epoch and not step else f"in epoch {epoch + 1}, after step {step}"
        log.info("%s: resumed %s", self.folder, where)

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Record the epoch, save its student when that is due, pass it to trackers and emit it."""
        details = {name: record.pop(name) for name in list(record) if name.startswith("per_class")}
        metrics = {k: v for k, v in record.items() if k not in NOT_METRICS and not k.startswith("val_")}
        value = metrics.get(self.best_metric)
        with self.parts.guard.update():
            progress = self.parts.progress
            is_best = self.loop.validates() and progress.note_value(
                -record["val_loss"] if value is None else value, record["epoch"], metrics, details
            )
            ended = self.loop.end_distillation_when_beaten(metrics)
            progress.finish_epoch(record)
            if is_best and self.is_main:
                adapters = self.adapters() if self.config.lora_rank else None
                self.writer.note_best(self.student_content(record), adapters, record["epoch"])
        if not self.is_main:
            return
        if ended and self.parts.reference is not None:
            metric = self.parts.reference.metric
            log.info(
                "epoch %d: %s %s, better than a probe of the teacher's features (%s): the distillation terms end, the "
                "labels teach alone (--distill-until end keeps them)",
                *(record["epoch"], label_of(metric), text_of(metric, metrics[metric])),
                text_of(metric, self.parts.reference.value),
            )
        RunFolder(self.folder).append_record(record)
        warn_of_zero_metric(self.config, self.folder, self.parts.progress.history)
        self.save_when_due(after_epoch=True)
        interval, epoch = self.config.checkpoint_interval, record["epoch"]
        if interval is not None and epoch % interval == 0:
            path = self.folder / f"checkpoint_epoch_{epoch}.pt"
            self.writer.save_beside(path, self.student_content(record), epoch)
        for tracker in self.trackers:
            tracker.log(record, record["epoch"])
        self.events.emit(EpochEnded(record))

    def report(self, *, wait: bool = False) -> None:
        """Emit the checkpoints completed since the last call; `wait`: all that are being written."""
        for checkpoint in self.writer.finish() if wait else self.writer.finished():
            self.events.emit(checkpoint)

    def adapters(self) -> dict[str, Any]:
        """The content of adapters.pt: what LoRA trained, without the base weights."""
        from train.lora import adapter_state

        parts = self.parts
        return {**self.about, "adapter_state_dict": adapter_state(parts.module.student, parts.evaluated)}

    def student_content(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint of the student alone, of averaged weights where there are any; the tensors are the live ones."""
        return {
            **self.about,
            "epoch": record["epoch"],
            "accuracy": record.get(self.best_metric),
            "metrics": {k: v for k, v in record.items() if k not in NOT_METRICS},
            "alignment_head": self.head_state(),
            "level_heads": self.parts.module.level_heads.state_dict(),
            "others": self.parts.module.others.state_dict(),
            "model_state_dict": self.parts.evaluated.state_dict(),
        }

    def head_state(self) -> dict[str, Any] | None:
        projector = self.parts.module.projector
        return None if projector is None else projector.state_dict()

    def save_when_due(self, *, after_epoch: bool = False) -> None:
        """Save last.pt now and then, so that a kill costs at most `checkpoint_minutes` of training."""
        self.report()
        if self.is_main and self.writer.due(after_epoch=after_epoch):
            self.save_last(wait=False)

    def save_last(self, *, wait: bool) -> None:
        """last.pt, of the last finished step, on rank 0."""
        # Losses that are not finite must not reach a checkpoint.
        with self.parts.guard.lock:
            self.loop.settle()
        self.write_last(wait=wait)

    def write_last(self, *, wait: bool) -> None:
        if self.is_main:
            self.writer.save(self.run_content(), self.parts.progress.epoch, wait=wait)
            if wait:
                self.report()

    def run_content(self) -> dict[str, Any]:
        """Everything that the next step needs; the tensors are the live ones."""
        parts = self.parts
        wall_time = self.wall_before + time.monotonic() - self.started
        parts.progress.wall_time_s = round(wall_time, 3)
        average = parts.average and {
            "state": parts.average.student.state_dict(),
            "updates": parts.average.updates,
        }
        scaler = parts.accelerator.scaler
        return {
            **self.about,
            "epoch": parts.progress.epoch,
            "model_state_dict": parts.module.student.state_dict(),
            "alignment_head": self.head_state(),
            "training": {
                "level_heads": parts.module.level_heads.state_dict(),
                "others": parts.module.others.state_dict(),
                "optimizer": parts.optimizer.state_dict(),
                "average": average,
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": parts.progress.to_dict(),
            },
        }

    def save_after(self, error: Exception) -> None:
        """An error ends the training: keep the last finished step, unless it is the reason or the disk is."""
        guard = self.parts.guard
        if isinstance(error, (NotFiniteError, CheckpointError)) or not guard.whole:
            return
        if not self.writer.has_saved:
            return  # a run that failed at its start leaves nothing to resume
        try:
            with guard.lock:
                guard.restore_buffers()
            self.save_last(wait=True)
        except Exception as second:  # the first error is the one to report
            log.warning("%s could not be saved: %s", self.folder / LAST, second)

    def stop_text(self) -> str:
        progress = self.parts.progress
        return (
            f"stopped in epoch {progress.epoch + 1} after step {progress.step}, saved to {self.folder / LAST}: "
            f"resume with cli train --resume --out {self.config.out}"
        )

    def snapshot(self) -> str:
        """Called by the watching thread when a step takes too long: save what the last finished step left.

        The main thread may be inside a step. It changes weights only while it holds the guard's lock, so with the lock
        they are those of the last finished step. Batch-norm statistics are the exception, since every forward pass
        changes them: they are put back from the guard's copies. The lock is never released again, because the step that
        runs must not change anything any more, and the process ends right after this.
        """
        guard = self.parts.guard
        if not guard.lock.acquire(timeout=LOCK_S):
            return f"{self.folder}: stopped inside an optimizer step, {LAST} is that of the last save"
        self.loop.settle()
        guard.restore_buffers()
        self.write_last(wait=True)
        return self.stop_text()

    def epoch_line(self, record: Mapping[str, Any]) -> str:
        """`epoch 3/20: loss 1.204, val 1.310, top-1 accuracy 61.20% (n=341), 4.1 s`; n: validation samples"""
        metric, parts = self.best_metric, [f"loss {record['train_loss']:.4f}"]
        if record["val_loss"] is not None:
            parts.append(f"val {record['val_loss']:.4f}")
        if record.get(metric) is not None:
            samples = self.built.validation_samples
            parts.append(f"{label_of(metric)} {text_of(metric, record[metric])} (n={samples})")
        parts.append(f"{record['epoch_time_s']:.1f} s")
        return f"epoch {record['epoch']}/{self.config.epochs}: {', '.join(parts)}"


def accuracy_of_embeddings(
    built: Built, config: TrainConfig, store: Store, data: TrainingData, best: Path
) -> dict[str, float]:
    """k-NN and linear-probe accuracy of a label-free student's embeddings, both fitted on the training split.

    Of the student in `best`, which is loaded. Empty without labels, and on ranks other than 0.
    """
    from store.quality import knn_accuracy, probe_accuracy

    labeled = data.train_labels is not None and data.val_labels is not None
    # Only rank 0 writes the summary, and another machine may not have best.pt.
    if not labeled or not built.parts.accelerator.is_main_process:
        return {}
    built.student.load_state_dict(load_checkpoint(best)["model_state_dict"])
    arguments = []
    for training, labels in ((True, data.train_labels), (False, data.val_labels)):
        assert labels is not None
        plain = Objective(built.parts.objective.task)
        loader = build_loader(
            config, store, data, plain, built.parts.accelerator, AUGMENTATIONS["none"], training=training
        )
        rows, features = embed_rows(built, loader)
        arguments += [features, labels[rows]]
    if any((labels < 0).all() for labels in arguments[1::2]):
        return {}
    return {"knn_top1": knn_accuracy(*arguments), "probe_top1": probe_accuracy(*arguments)}


@torch.no_grad()
def embed_rows(built: Built, loader: BatchLoader) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows int64 [N] and embeddings float32 [N, D] (pooled features) of everything a loader shows, this process alone."""
    loader.batches.rank, loader.batches.world = 0, 1
    student, device = built.student.eval(), built.parts.accelerator.device
    rows, features = [], []
    for batch in loader.epoch(0):
        images = built.parts.normalize(batch.images.to(device))
        lengths = batch.lengths
        output = student(images) if lengths is None else student(images, lengths)
        mask = None if lengths is None else torch.arange(images.shape[1])[None] < lengths[:, None]
        pooled = pooled_rows(output.features, None if mask is None else mask.to(device))
        rows.append(batch.rows)
        features.append(pooled.float().cpu().numpy())
    return np.concatenate(rows), np.concatenate(features)
