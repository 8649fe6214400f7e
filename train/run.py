"""`cli train`: one student, and its control when asked for, from a store into a run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from console.output import get_logger
from processes.stop import StopDeadline, StopRequest
from store.mirror import use_cache
from store.reader import Store
from train.config import TrainConfig
from train.data.splits import warn_of_splits
from train.events import EventStream, Listener, TrainingFinished
from train.fit import FitRequest, FitResult, Trainer
from train.memory import fit_in_memory
from train.phase_one import phase_one_config, run_phase_one
from train.ranks import barrier
from train.run_folder import RunFolder, store_reference, warn_of_random_teacher
from train.self_training import label_images
from train.students.catalog import count_macs, measure_latency

log = get_logger("train")


def run_training(
    config: TrainConfig, listeners: Sequence[Listener] = (), stop: StopRequest | None = None
) -> dict[str, Any]:
    """Train by `config`; returns the content of summary.json.

    Under torchrun or accelerate launch every rank calls this; rank 0 writes, and passes events to the listeners (not those of the control). A run that is
    complete already is not repeated when resumed.

    Raises ConfigError, TrainError and StoreError for what cannot work, processes.stop.Stopped after a signal (the
    last finished step of our loop, the last finished epoch of YOLO students is saved), OutOfMemoryError with advice.
    """
    is_main = os.environ.get("RANK", "0") == "0"  # every rank trains, one writes and reports
    events = EventStream(listeners if is_main else ())
    try:
        with contextlib.ExitStack() as stack:
            stop = stop if stop is not None else stack.enter_context(StopRequest())
            deadline = stack.enter_context(StopDeadline(stop, report=events.fail))
            return train_with_control(build_trainer(config), deadline, events, is_main)
    except BaseException as error:
        events.fail(error)
        raise


def build_trainer(config: TrainConfig) -> Trainer:
    if config.student_type == "yolov8" and config.task != "features":
        from train.yolo.fit import YoloTrainer

        return YoloTrainer(config)
    from train.loop.trainer import LoopTrainer

    use_cache(config.cache_dir, config.cache_gb)
    if config.student_type == "yolov8":
        # Backbone and neck, which run in our loop: what phase one trains, and as it does.
        return LoopTrainer(phase_one_config(config, config.epochs))
    return LoopTrainer(config)


def train_with_control(
    trainer: Trainer, deadline: StopDeadline, events: EventStream, is_main: bool
) -> dict[str, Any]:
    """Prepare the folder, train the student and its control, write the summary."""
    config, store = trainer.config, trainer.store
    folder = RunFolder(config.out)
    if is_main:
        folder.prepare(config, store)
        events.start(folder)
        warn_of_random_teacher(config.store, store)
        warn_of_splits(config, store, trainer.task)
    barrier()
    if config.resume and folder.is_complete(config):
        log.info("%s is complete: nothing left to do", config.out)
        return folder.read_summary() or {}
    if config.boxes_from is not None and is_main:
        label_images(config, store)
    pretrain = None
    if config.pretrain_epochs and not config.control_only:
        pretrain = run_phase_one(config, store, trainer.task, deadline, events, is_main)
    request = FitRequest(config, config, folder, events, deadline, config.control_only)
    main = fit_in_memory(trainer, request)
    summary = summarize(main, trainer.task, store)
    if pretrain is not None:
        summary["pretrain"] = pretrain
    if config.control:
        # The same student, seed, images and schedule on the task loss alone, at weight 1, in RUN/control; batches as
        # the main run ended up with, in case it ran out of memory.
        batches = {name: getattr(main.config, name) for name in ("batch_size", "grad_accum_steps")}
        folder_of_control, events_of_control = RunFolder(config.out / "control"), EventStream()
        if is_main:
            folder_of_control.take_boxes(folder)
            events_of_control.start(folder_of_control)
        request = FitRequest(
            config=config.replace(**batches),
            asked=config.replace(**batches),
            folder=folder_of_control,
            events=events_of_control,
            deadline=deadline,
            control=True,
        )
        summary["control"] = compare(main, fit_in_memory(trainer, request))
    if is_main:
        folder.write_summary(summary)
        events.emit(TrainingFinished(summary))
    barrier()
    return summary


def compare(main: FitResult, control: FitResult) -> dict[str, Any]:
    """The control's part of summary.json; `difference`: of the distilled student less its control."""
    return {
        "metrics": control.metrics,
        "best_epoch": control.best_epoch,
        "difference": {
            name: value - control.metrics[name]
            for name, value in main.metrics.items()
            if name in control.metrics
        },
    }


def summarize(result: FitResult, task: str, store: Store) -> dict[str, Any]:
    """The content of summary.json, without `control`."""
    student = result.student
    return {
        "student": student.spec.name,
        "task": task,
        "num_classes": result.num_classes,
        "validation_samples": result.validation_samples,
        "epochs": result.config.epochs,
        "epochs_done": result.epochs_done,
        "best_epoch": result.best_epoch,
        "metrics": result.metrics,
        "per_class": result.per_class,
        "parameters": student.parameter_count(),
        "trainable_parameters": result.trainable_parameters,
        "macs": count_macs(student),
        "latency_ms": measure_latency(student),
        "wall_time_s": result.wall_time_s,
        "images_per_second": result.images_per_second,
        "store": store_reference(store, result.config),
        "seed": result.config.seed,
        **result.details,
        "complete": True,
    }
