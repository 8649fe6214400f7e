"""The Qwen2.5-VL tower against transformers' own: dispatched operators, and forward time on this machine.

    python benchmarks/teacher.py [--quick] [--json] [--rounds 7]

Operators: 32 images of 224 pixels through 32 blocks, counted with a TorchDispatchMode under inference mode; the count
does not depend on the width, so the towers are narrow. Time: the published width with two blocks (one of them with
full attention), float32, one torch thread, CPU time, medians of interleaved rounds. Random weights: time only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from extract.teachers import load_teacher
from extract.teachers.pixels import normalize
from extract.teachers.qwen_transformers import save_random_checkpoint
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.teachers.tiny import TINY_TEXT, tiny_vision

LIMIT = 2500
torch.set_num_threads(1)


class OpCounter(TorchDispatchMode):
    """Counts every operator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def make(folder: Path, **vision: Any) -> tuple[QwenVLTeacher, Any]:
    """Our teacher and transformers' tower of one random checkpoint."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    save_random_checkpoint(folder, vision=tiny_vision(2) | vision, text=TINY_TEXT, seed=0)
    teacher = load_teacher("qwen2.5-vl", str(folder), device="cpu", dtype="float32")
    assert isinstance(teacher, QwenVLTeacher)
    return teacher, Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval().model.visual


def reference_inputs(teacher: QwenVLTeacher, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' tower takes: patches in 2 × 2 merge order, and the grid of each image."""
    batch, h, w = len(images), images.shape[2] // 14, images.shape[3] // 14
    values = normalize(images, teacher.mean, teacher.std)[:, None].expand(-1, 2, -1, -1, -1)
    cells = values.reshape(batch, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cells.reshape(-1, 1176), torch.tensor([[1, h, w]] * batch)


def count_operators(folder: Path) -> dict[str, int]:
    narrow = {"hidden_size": 64, "intermediate_size": 40, "num_heads": 2}
    teacher, tower = make(folder, depth=32, fullatt_block_indexes=[7, 15, 23, 31], **narrow)
    images = torch.zeros(32, 3, 224, 224, dtype=torch.uint8)
    patches, grid = reference_inputs(teacher, images)
    teacher.encode(images)
    with OpCounter() as ours:
        teacher.encode(images)
    with torch.inference_mode(), OpCounter() as theirs:
        tower(patches, grid_thw=grid)
    return {"ours": ours.count, "transformers": theirs.count}


def time_forward(folder: Path, batch: int, rounds: int) -> dict[str, float]:
    teacher, tower = make(folder)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    patches, grid = reference_inputs(teacher, images)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(rounds + 1):  # the first round warms up
        began = time.process_time()
        teacher.encode(images)
        seconds["ours"].append(time.process_time() - began)
        began = time.process_time()
        with torch.inference_mode():
            tower(patches, grid_thw=grid)
        seconds["transformers"].append(time.process_time() - began)
    return {name: statistics.median(values[1:]) / batch for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    batch, rounds = (2, 2) if options.quick else (8, options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        operators = count_operators(Path(scratch) / "narrow")
        seconds = time_forward(Path(scratch) / "wide", batch, rounds)
    ratio = seconds["ours"] / seconds["transformers"]
    if options.json:
        print(json.dumps({"operators": operators, "cpu_seconds_per_image": seconds, "time_ratio": ratio}))
    else:
        print("                                       ours   transformers")
        print(f"operators, 32 images, 32 blocks     {operators['ours']:7,} {operators['transformers']:14,}")
        print(
            f"CPU ms an image, 2 blocks           {1e3 * seconds['ours']:7.1f} {1e3 * seconds['transformers']:14.1f}"
        )
        print(f"time ratio {ratio:.2f}; operators allowed {LIMIT:,}")
    sys.exit(operators["ours"] > LIMIT)


if __name__ == "__main__":
    main()
