"""What a distilled training step of YOLOv8n costs, as a multiple of the same step without distillation.

    python benchmarks/detection_cost.py [--sizes 640,320] [--rounds 12] [--json]

CPU time of this process on one thread: preprocessing, forward, loss, backward and optimizer step of a batch that the
trainer's own loader has made, reading the stored grids included. Steps of both kinds take turns, and the ratio of the
medians is printed. Noise images and random features: only the cost is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from benchmarks.stores import WIDTH, encoded, write_random_store
from console.output import print_json, print_table

GRID, BATCH, ROWS = 16, 8, 32
LEVELS = ("none", "P5", "P4,P5", "P3,P4,P5")


def make_store(path: Path) -> Path:
    """A detection store of noise images with two boxes each and random 16×16 grids, 1280 wide."""

    def rest(generator: np.random.Generator, count: int) -> dict[str, Any]:
        box = np.array([[20, 20, 200, 180], [300, 100, 420, 400]], np.float32)
        noise = [Image.fromarray(generator.integers(0, 255, (480, 480, 3), np.uint8)) for _ in range(count)]
        return {
            "sizes": np.full((count, 2), 480, np.int32),
            "content": np.zeros((count, 16), np.uint8),
            "images/encoded/values": [encoded(image, quality=75) for image in noise],
            "targets/boxes/values": [box] * count,
            "targets/boxes/classes": [np.zeros(2, np.int32)] * count,
        }

    kind: dict[str, Any] = {"grid": GRID, "images": "jpeg", "side": 0, "boxes": True}
    return write_random_store(path, {"train": ROWS, "val": ROWS}, rest, class_names=("thing",), **kind)


def set_up(
    store: Path,
    out: Path,
    image_size: int,
    levels: str,
    student: str = "yolov8/n",
    device: str = "cpu",
    batch_size: int = BATCH,
) -> Any:
    """A trainer that is ready for its first step."""
    from store.reader import open_store
    from train.config import TrainConfig
    from train.students.offline import prepare_ultralytics
    from train.yolo.job import build_job

    prepare_ultralytics()
    from train.yolo.trainer import StoreTrainer

    options: dict[str, Any] = {
        "store": store,
        "student": student,
        "out": out,
        "image_size": image_size,
        "batch_size": batch_size,
        "device": device,
        "workers": 0,
    }
    chosen = {"distillation_type": "none"} if levels == "none" else {"distill_layers": levels}
    trainer = StoreTrainer(build_job(TrainConfig(**options, **chosen), out, open_store(store), None))
    trainer._setup_train()
    trainer.epoch = 0
    trainer._model_train()
    return trainer


def step_time(trainer: Any, batch: dict[str, Any]) -> float:
    """CPU seconds of one step on a copy of `batch` as the loader gives it."""
    started = time.process_time()
    train_step(trainer, batch)
    return time.process_time() - started


def train_step(trainer: Any, batch: dict[str, Any]) -> None:
    """One step as ultralytics' loop makes it: autocast, scaled loss, optimizer, average of the weights."""
    from ultralytics.utils.torch_utils import autocast

    with autocast(torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp, device=trainer.device.type):
        loss, _ = trainer.model(trainer.preprocess_batch(dict(batch)))
        trainer.loss = loss.sum()
    trainer.scaler.scale(trainer.loss).backward()
    trainer.take_step()


def measure(store: Path, work: Path, image_size: int, rounds: int) -> dict[str, Any]:
    from train.yolo.targets import PENDING

    trainers = {
        levels: set_up(store, work / f"{image_size}-{levels}", image_size, levels) for levels in LEVELS
    }
    batches = {levels: next(iter(trainer.train_loader)) for levels, trainer in trainers.items()}
    for batch in batches.values():
        batch.pop(PENDING, None)  # what the loader has begun to read: each step reads its own
    times: dict[str, list[float]] = {levels: [] for levels in LEVELS}
    for turn in range(rounds + 2):
        for levels, trainer in trainers.items():
            seconds = step_time(trainer, batches[levels])
            if turn >= 2:  # the first steps allocate
                times[levels].append(seconds)
    medians = {levels: statistics.median(values) for levels, values in times.items()}
    return {
        "image_size": image_size,
        "step_ms": round(medians["none"] * 1e3, 1),
        **{
            levels: round(value / medians["none"], 3) for levels, value in medians.items() if levels != "none"
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="640,320", help="image sizes, comma-separated")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each kind")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(Path(scratch) / "store.zarr")
        sizes = [int(size) for size in arguments.sizes.split(",")]
        found = [measure(store, Path(scratch), size, arguments.rounds) for size in sizes]
    if arguments.json:
        print_json({"batch_size": BATCH, "grid": GRID, "width": WIDTH, "sizes": found})
        return
    print_table(
        found,
        ["image_size", "step_ms", *LEVELS[1:]],
        f"CPU time of a step of {BATCH} images, {GRID}×{GRID}×{WIDTH} grids: without distillation, and times that",
    )


if __name__ == "__main__":
    main()
