"""Events of extraction and training → calls to the platform, and the files it looks for."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.task.calls import Sender, TaskCalls, percent
from console.output import get_logger
from files.writing import replacing
from train.events import CheckpointSaved, EpochEnded, Event, PhaseOneEpochEnded
from train.metrics import accuracy_of
from train.run_folder import RunFolder

log = get_logger("platform")

BEST_MODEL = "best_model.pt"
EXTRACTION_EVERY_S = 2.0
LOG_EVERY_S = 30.0
MEGABYTE = 1_000_000


class ExtractionEvents:
    """Extraction can take hours: progress of epoch 0 with a message every few seconds, and now and then a log line."""

    def __init__(self, calls: TaskCalls, sender: Sender, total_epochs: int) -> None:
        self.calls, self.sender, self.total_epochs = calls, sender, total_epochs
        self.sent = float("-inf")
        self.logged = time.monotonic()

    def progress(self, done: int, total: int, message: str) -> None:
        """Called by stage one after each batch."""
        now, text = time.monotonic(), f"extracting features: {message}, {done} of {total}"
        if now - self.sent >= EXTRACTION_EVERY_S or done >= total:
            self.sent = now
            self.send(text)
        if now - self.logged >= LOG_EVERY_S:
            self.logged = now
            log.info("%s", text)

    def send(self, text: str) -> None:
        self.sender.send(self.calls.progress(epoch=0, total_epochs=self.total_epochs, message=text))


class TrainingEvents:
    """A listener of the training (`train.events`): each epoch and each better model becomes calls."""

    def __init__(self, calls: TaskCalls, sender: Sender, total_epochs: int, folder: Path) -> None:
        self.calls, self.sender, self.total_epochs = calls, sender, total_epochs
        self.run = RunFolder(folder)

    def __call__(self, event: Event) -> None:
        if isinstance(event, EpochEnded):
            self.send_epoch(int(event.record["epoch"]), event.record)
        elif isinstance(event, PhaseOneEpochEnded):
            self.send_phase_one(event)
        elif isinstance(event, CheckpointSaved) and event.path.name == self.run.best.name:
            self.publish_best()

    def send_epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        accuracy = accuracy_of(record)
        progress = self.calls.progress(
            epoch=epoch,
            total_epochs=self.total_epochs,
            train_loss=record.get("train_loss"),
            val_loss=record.get("val_loss"),
            val_accuracy=accuracy,
        )
        self.sender.send(progress)
        self.sender.send(self.calls.history(epoch=epoch, values=history_values(record, accuracy)))

    def send_phase_one(self, event: PhaseOneEpochEnded) -> None:
        """Phase one is no part of the platform's epochs: progress of epoch 0 with a message, as for extraction."""
        done, loss = event.record["epoch"], event.record["train_loss"]
        message = (
            f"phase one, learning the teacher's features: epoch {done} of {event.epochs}, loss {loss:.4f}"
        )
        self.sender.send(self.calls.progress(epoch=0, total_epochs=self.total_epochs, message=message))

    def publish_best(self) -> None:
        """Make best.pt the platform's best_model.pt and report it, when it is not that already.

        Checkpoints are replaced, never rewritten, so a link keeps what it was made of; a copy where links are
        impossible.
        """
        best, published = self.run.best, self.run.path / BEST_MODEL
        if not best.exists() or (published.exists() and os.path.samefile(best, published)):
            return
        with replacing(published) as partial:
            try:
                os.link(best, partial)
            except OSError:
                shutil.copyfile(best, partial)
        self.sender.send(self.calls.model_path(published.absolute()))


def history_values(record: Mapping[str, Any], accuracy: float | None) -> dict[str, Any]:
    """A record of metrics.jsonl under the names of the history call.

    `distillLoss` is the whole distillation term, `softLoss` its logit part, `hardLoss` the task loss.
    """
    terms = [record[name] for name in ("feature_loss", "logit_loss") if record.get(name) is not None]
    return {
        "trainLoss": record.get("train_loss"),
        "trainAccuracy": percent(record.get("train_accuracy")),
        "valLoss": record.get("val_loss"),
        "valAccuracy": percent(accuracy),
        "distillLoss": sum(terms) if terms else None,
        "hardLoss": record.get("hard_loss"),
        "softLoss": record.get("logit_loss"),
        "gpuUsage": gpu_usage(),
        "memoryUsage": memory_usage(),
        "epochTime": record.get("epoch_time_s"),
    }


def gpu_usage() -> float | None:
    """Percent of the GPU in use, None without a GPU or without a way to ask it."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.utilization())
    except Exception:  # pynvml missing, driver in the way: a number for a chart is not worth an error
        return None


def memory_usage() -> float:
    """Megabytes: the GPU's where there is one, else the resident memory of this process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / MEGABYTE
    import psutil

    return float(psutil.Process().memory_info().rss / MEGABYTE)
