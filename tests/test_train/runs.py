"""Finished runs for tests of what comes after a training, and what a run has recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.config import load_config
from train.run import run_training

ROOT = Path(__file__).parents[2]
STUDENT = "timm:test_resnet"


def trained(store: Path, out: Path, student: str = STUDENT, **options: Any) -> Path:
    settings = {
        "epochs": 1,
        "image_size": 32,
        "batch_size": 8,
        "workers": 0,
        "learning_rate": 1e-3,
        **options,
    }
    run_training(load_config({"store": str(store), "student": student, "out": out, **settings}))
    return out


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


def records(config: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
