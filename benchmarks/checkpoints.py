"""What saving costs a training of little data: share of its wall time, and bytes written.

    python benchmarks/checkpoints.py [--epochs 120] [--images 250] [--minutes 1]

resnet18 on images of 32 px with random features: epochs of about a second, in which saving weighs most. Counted is the time
in which the training waits: copies of the state, and whatever it waits for of the thread that writes. `--minutes 0` saves
after every epoch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.train_data import make_store
from console.output import print_json, print_table

COUNTED = ("due", "note_best", "save", "save_beside", "finished", "finish")


class Cost:
    """Seconds in the calls of `CheckpointWriter` that the training makes, and bytes of the checkpoints written."""

    def __init__(self) -> None:
        self.seconds, self.written, self.files, self.inside = 0.0, 0, 0, False

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                return method(*arguments, **options)
            self.inside, started = True, time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.inside = False
                self.seconds += time.perf_counter() - started

        return call

    def counted(self, save: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, content: Any) -> None:
            save(path, content)
            self.written += path.stat().st_size
            self.files += 1

        return call


def measure(work: Path, images: int, epochs: int, minutes: float) -> dict[str, Any]:
    from train.config import load_config
    from train.loop import saving
    from train.run import run_training

    cost = Cost()
    for name in COUNTED:
        setattr(saving.CheckpointWriter, name, cost.timed(getattr(saving.CheckpointWriter, name)))
    saving.save_checkpoint = cost.counted(saving.save_checkpoint)
    options = {"student": "resnet18", "image_size": 32, "epochs": epochs, "device": "cpu", "workers": 0}
    store = make_store(work / "store.zarr", images, side=32)
    config = load_config({"store": store, "out": work / "run", "checkpoint_minutes": minutes, **options})
    started = time.perf_counter()
    run_training(config)
    wall = time.perf_counter() - started
    return {
        "epochs": epochs,
        "images": images,
        "wall_s": wall,
        "saving_s": cost.seconds,
        "share": cost.seconds / wall,
        "files": cost.files,
        "written_mb": cost.written / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--minutes", type=float, default=1.0, help="--checkpoint-minutes (%(default)g)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        row = measure(Path(work), arguments.images, arguments.epochs, arguments.minutes)
    if arguments.json:
        print_json(row)
    else:
        print_table(
            [row], list(row), "saving, of a training of resnet18 on images of 32 px (aim: share <= 0.03)"
        )


if __name__ == "__main__":
    main()
