"""Go on training a finished student for a few epochs, as itself or with another forward pass (fake quantisation)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from console.progress import track_progress
from console.stop import Stopped, StopRequest
from store.reader import Store
from train.checkpoint import BEST, LAST, load_checkpoint
from train.config import TrainConfig
from train.data.splits import resolve_data, resolve_task, student_preprocessing
from train.deliver.inputs import run_folder
from train.deliver.model import ModelCard
from train.loop.assemble import build_training
from train.loop.loop import Loop, Parts
from train.loop.machine import build_accelerator
from train.loop.optimizer import build_optimizer
from train.students.base import Student


@dataclass
class FineTuning:
    """The parts of the loop around a trained student, in float32 on one device."""

    parts: Parts
    student: Student
    config: TrainConfig
    stop: StopRequest


@contextlib.contextmanager
def build_finetuning(
    run: Path,
    config: TrainConfig,
    store: Store,
    student: Student,
    card: ModelCard,
    epochs: int,
    learning_rate: float,
) -> Iterator[FineTuning]:
    """The run's own data, loss and alignment head around a copy of `student`, with a short gentle schedule."""
    config = config.replace(
        epochs=epochs,
        learning_rate=learning_rate,
        warmup_epochs=0.0,
        precision="fp32",
        student_path=None,
        pretrained=False,
        compile=False,
        gradient_checkpointing=False,
        ema_decay=None,
        early_stopping_patience=None,
        lora_rank=0,
        control=False,
    )
    data = resolve_data(config, store, resolve_task(config))
    data = replace(data, preprocessing=student_preprocessing(store, card.preprocessing))
    with StopRequest() as stop:
        built = build_training(config, store, data, build_accelerator(config), stop)
        built.student.load_state_dict(student.state_dict())
        restore_head(built.parts, run)
        try:
            yield FineTuning(built.parts, built.student, config, stop)
        finally:
            built.parts.train_loader.close()
            built.parts.val_loader.close()


def restore_head(parts: Parts, run: Path) -> None:
    """The alignment head of the student's own checkpoint: a fresh one would pull the student away from what it learned."""
    if parts.module.projector is None:
        return
    own, last = run / BEST if run.is_dir() else run, run_folder(run) / LAST
    for path in (own, last):  # checkpoints of older versions may have no head in best.pt
        state = load_checkpoint(path).get("alignment_head") if path.exists() else None
        if state:
            parts.module.projector.load_state_dict(state)
            return


def run_finetuning(tuning: FineTuning, student: Student | None = None) -> Student:
    """Train to the end and return the student of the best epoch; how it began counts as one.

    `student` replaces the forward pass (its parameters are what is trained). Raises Stopped after a signal.
    """
    parts, config = tuning.parts, tuning.config
    if student is not None:
        parts.module.student = student
        optimizer = build_optimizer(parts.module, config.optimizer, config.learning_rate, config.weight_decay)
        parts.optimizer = parts.accelerator.prepare_optimizer(optimizer)
        parts.guard = type(parts.guard)(parts.module)
    trained = student or tuning.student
    metric = parts.objective.task.best_metric
    total = len(parts.train_loader.batches.rows) * config.epochs
    with track_progress(total, "fine-tuning", "samples") as display:
        loop = Loop(parts)
        loop.display = display
        best, best_state = loop.validate()[metric], copy.deepcopy(trained.state_dict())
        display.note(f"before: {metric} {best:.4f}")
        try:
            for record in loop.run():
                display.note(f"epoch {record['epoch']}/{config.epochs}: {metric} {record[metric]:.4f}")
                if record[metric] > best:
                    best, best_state = record[metric], copy.deepcopy(trained.state_dict())
                parts.progress.finish_epoch(record)
        except Stopped as stopped:
            raise Stopped(
                "stopped while fine-tuning; the same command starts again", stopped.exit_code
            ) from None
    trained.load_state_dict(best_state)
    return trained.eval()
