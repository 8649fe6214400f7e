"""`cli train`: one student, and its control when asked for, from a store into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from console.log import get_logger
from console.stop import StopRequest
from processes.deadline import StopDeadline, nothing_to_save
from store.reader import Store
from train.checkpoint import BEST, LAST
from train.config import TrainConfig
from train.data.splits import TrainingData, resolve_data, resolve_task, warn_of_splits
from train.errors import ConfigError
from train.events import Observer, Observers
from train.loop.assemble import Built, build_training
from train.loop.loop import Progress
from train.loop.machine import (
    MEMORY_ADVICE,
    OutOfMemoryError,
    build_accelerator,
    explain_device_error,
    is_out_of_memory,
    peak_memory,
    set_determinism,
)
from train.loop.trainer import Trainer
from train.ranks import barrier
from train.rundir import (
    SUMMARY,
    check_same_distillation,
    is_complete,
    prepare_run_folder,
    read_resolved,
    read_summary,
    store_reference,
    warn_of_random_teacher,
    write_config,
    write_json,
)

log = get_logger("train")


@dataclass
class Outcome:
    """A finished training: what was built, where it ended, and the configuration it ended with."""

    built: Built
    progress: Progress
    config: TrainConfig


def run_training(
    config: TrainConfig, observers: Sequence[Observer] = (), stop: StopRequest | None = None
) -> dict[str, Any]:
    """Train by `config`; returns the content of summary.json.

    Under torchrun or accelerate launch every rank calls this; rank 0 writes and is observed. A run that is
    complete already is not repeated when resumed.

    Raises ConfigError, TrainError and StoreError for what cannot work, console.stop.Stopped after a signal (the
    last finished step is saved), OutOfMemoryError with advice.
    """
    # Every rank trains, one reports.
    group = Observers(observers if os.environ.get("RANK", "0") == "0" else ())
    try:
        if config.student_type == "yolov8":
            from train.yolo.run import run_yolo

            return run_yolo(config, observers, stop)
        with contextlib.ExitStack() as stack:
            stop = stop if stop is not None else stack.enter_context(StopRequest())
            return run_stages(config, group, stack.enter_context(StopDeadline(stop, report=group.failed)))
    except BaseException as error:
        group.failed(error)
        raise


def run_stages(config: TrainConfig, observers: Observers, watch: StopDeadline) -> dict[str, Any]:
    """Check, train, train the control, summarise."""
    from store.reader import open_store

    task = resolve_task(config)
    if (config.control or config.control_only) and task == "features":
        raise ConfigError("control: without a task loss there is nothing to compare with")
    store: Store = open_store(config.store)
    data = resolve_data(config, store, task)
    accelerator = build_accelerator(config)
    if accelerator.is_main_process:
        prepare_run_folder(config, store)
        warn_of_random_teacher(config.store, store)
        warn_of_splits(config, store, task)
    barrier()
    done = read_summary(config.out)
    if done is not None and config.resume and is_complete(done, config):
        log.info("%s is complete: nothing left to do", config.out)
        return done
    set_determinism(config.deterministic)
    main = train_student(config, store, data, watch, observers, config.out, control=config.control_only)
    summary = summarize(main, store, data, config.out)
    if config.control:
        summary["control"] = run_control(config, store, data, watch, main)
    if accelerator.is_main_process:
        write_json(config.out / SUMMARY, summary)
        observers.finished(summary)
    barrier()
    return summary


def train_student(
    config: TrainConfig,
    store: Store,
    data: TrainingData,
    watch: StopDeadline,
    observers: Observers,
    folder: Path,
    *,
    control: bool = False,
) -> Outcome:
    """Train to the end in `folder`; out of memory ends with advice, or with smaller batches (--auto-batch)."""
    asked, config = config, continue_batch(config, folder)
    while True:
        try:
            return train_once(config, store, data, watch, observers, folder, control=control, asked=asked)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                known = explain_device_error(error)
                if known is None:
                    raise
                raise known from error
            if not config.auto_batch or config.batch_size < 2:
                raise OutOfMemoryError(f"{MEMORY_ADVICE} (batch_size {config.batch_size})") from error
        # The watch still holds the training that failed, and with it all its memory.
        watch.save = nothing_to_save
        config = halve_batch(config, folder)


def continue_batch(config: TrainConfig, folder: Path) -> TrainConfig:
    """A run that had to halve its batch goes on with the half: positions in an epoch count its steps."""
    if not (config.auto_batch and config.resume and (folder / LAST).exists()):
        return config
    before = read_resolved(folder)
    return config.replace(batch_size=before["batch_size"], grad_accum_steps=before["grad_accum_steps"])


def halve_batch(config: TrainConfig, folder: Path) -> TrainConfig:
    """Half the batch, twice the accumulation: the same samples in every step."""
    smaller, steps = config.batch_size // 2, config.grad_accum_steps * 2
    log.warning("out of memory: going on with batch_size %d and grad_accum_steps %d", smaller, steps)
    if config.batch_size % 2:
        # The steps of an epoch are cut elsewhere now, so positions of the old cut mean nothing.
        (folder / LAST).unlink(missing_ok=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return config.replace(batch_size=smaller, grad_accum_steps=steps)


def train_once(
    config: TrainConfig,
    store: Store,
    data: TrainingData,
    watch: StopDeadline,
    observers: Observers,
    folder: Path,
    *,
    control: bool,
    asked: TrainConfig,
) -> Outcome:
    """One attempt; `asked` are the options as given, which a resumed run is compared with."""
    accelerator = build_accelerator(config)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    built = build_training(config, store, data, accelerator, watch.stop, control=control)
    if accelerator.is_main_process:
        announce(built, control)
        choices = resolved(built, data, control)
        if config.resume and (folder / LAST).exists():
            check_same_distillation(folder, choices)
        write_config(folder, asked, choices, store_reference(store))
    config = built.parts.config
    progress = Trainer(built, config, folder, store.manifest, data.task, observers, watch).fit()
    return Outcome(built, progress, config)


def announce(built: Built, control: bool) -> None:
    """Say once what was decided."""
    for note in () if control else built.notes:
        log.info("%s", note)
    weights = built.student.initial_weights
    if weights.reinitialised:
        log.info(
            "drawn anew, since the weights given have another shape: %s", ", ".join(weights.reinitialised)
        )
    total = built.student.parameter_count()
    trained = sum(p.numel() for p in built.parts.module.student.parameters() if p.requires_grad)
    what = "control" if control else "training"
    log.info("%s %s: %s of %s parameters learn", what, built.student.spec.name, f"{trained:,}", f"{total:,}")


def resolved(built: Built, data: TrainingData, control: bool) -> dict[str, Any]:
    """What options and store came to, for config.json."""
    return {
        "task": data.task,
        "num_classes": data.num_classes,
        "augment": built.augmentation,
        "distilled": None if control else dataclasses.asdict(built.plan),
        "batch_size": built.parts.config.batch_size,
        "grad_accum_steps": built.parts.config.grad_accum_steps,
        "processes": built.parts.accelerator.num_processes,
        "device": str(built.parts.accelerator.device),
        "precision": built.parts.accelerator.mixed_precision,
        "initial_weights": built.student.initial_weights.origin,
        "notes": built.notes,
    }


def run_control(
    config: TrainConfig, store: Store, data: TrainingData, watch: StopDeadline, main: Outcome
) -> dict[str, Any]:
    """The same student, seed, images and schedule on the task loss alone, at weight 1, in RUN/control."""
    # Batches as the main run ended up with, in case it ran out of memory.
    config = config.replace(batch_size=main.config.batch_size, grad_accum_steps=main.config.grad_accum_steps)
    outcome = train_student(config, store, data, watch, Observers(), config.out / "control", control=True)
    metrics = outcome.progress.best_metrics
    ours = main.progress.best_metrics
    return {
        "metrics": metrics,
        "best_epoch": outcome.progress.best_epoch,
        "difference": {name: ours[name] - metrics[name] for name in ours if name in metrics},
    }


def summarize(outcome: Outcome, store: Store, data: TrainingData, folder: Path) -> dict[str, Any]:
    """The content of summary.json."""
    from train.measure import measure_student

    built, progress, config = outcome.built, outcome.progress, outcome.config
    metrics, names = dict(progress.best_metrics), list(store.manifest.class_names)
    summary = {
        "student": built.student.spec.name,
        "task": data.task,
        "num_classes": data.num_classes,
        "validation_samples": data.validation_samples,
        "epochs": config.epochs,
        "epochs_done": progress.epoch,
        "best_epoch": progress.best_epoch,
        "metrics": metrics,
        "per_class": name_classes(progress.best_details, names),
        **measure_student(built, config, store, data, folder / BEST),
        "wall_time_s": progress.wall_time_s,
        "images_per_second": round(progress.trained_samples / max(progress.trained_seconds, 1e-9), 2),
        **peak_memory(),
        "store": store_reference(store),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "grad_accum_steps": config.grad_accum_steps,
        "notes": built.notes,
        "complete": True,
    }
    metrics.update(summary.pop("quality"))
    return summary


def name_classes(details: Mapping[str, float], names: Sequence[str]) -> dict[str, float | None]:
    """`per_class_iou/3` → the name of class 3, where the store names it; None: no samples, so undefined.

    Empty for a task that has no metric per class.
    """
    values = {int(key.rpartition("/")[2]): value for key, value in details.items()}
    known = max([len(names), *(index + 1 for index in values)]) if values else 0
    return {
        names[index] if index < len(names) else str(index): values.get(index)
        for index in range(known)
        if index < len(names) or index in values
    }
