"""Whole trainings of YOLOv8n on a few small images, as several test files need them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from processes.stop import StopRequest
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.events import CheckpointSaved, EpochEnded, Event, TrainingFinished

ROOT = Path(__file__).parents[2]
# Two batches a step, mosaic closed in the last epoch: what a resumed run must get right.
OPTIONS: dict[str, Any] = {
    "student": "yolov8/n",
    "epochs": 3,
    "batch_size": 4,
    "image_size": 64,
    "device": "cpu",
    "workers": 0,
    "yolo_settings": "plots=false,close_mosaic=1,nbs=8",
}
# What the session's finished run (`yolo_run`) asks for besides.
RUN_OPTIONS: dict[str, Any] = {"checkpoint_interval": 2, "distill_layers": "P4,P5"}


class Listener:
    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.saved: list[tuple[str, int, bool]] = []
        self.summary: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, EpochEnded):
            self.epochs.append(event.record)
        elif isinstance(event, CheckpointSaved):
            self.saved.append((event.path.name, event.epoch, event.is_best))
        elif isinstance(event, TrainingFinished):
            self.summary = event.summary


def stop_after(epoch: int, stop: StopRequest) -> Callable[[Event], None]:
    """A listener that requests a stop when the epoch has ended."""

    def listener(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record["epoch"] == epoch:
            stop.set(signal.SIGTERM)

    return listener


def make_config(store: Path, out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(**{**OPTIONS, "store": store, "out": out, **options})


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learnt(run: Path) -> dict[str, Any]:
    """Everything in last.pt that training made."""
    content = load_checkpoint(run / "last.pt")
    return {"model": content["model_state_dict"], "training": content["training"]}


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_equal(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert one == other, where


class Crash(Exception):
    """Ends a training where no cleaning up happens."""


def crash_in(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """End the next training in the middle of its `batch`-th batch."""
    from train.yolo import fit as yolo_fit

    counted = yolo_fit.count_batches

    def count(*arguments: Any) -> Any:
        after_batch, seen = counted(*arguments), iter(range(1, 1000))

        def finished(trainer: Any) -> None:
            after_batch(trainer)
            if next(seen) == batch:
                raise Crash

        return finished

    monkeypatch.setattr(yolo_fit, "count_batches", count)
