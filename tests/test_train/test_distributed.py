"""Two processes give the curves of one with the same global batch; every validation sample counts once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Several runs in one process (group): starting Python and torch costs more than they do.
SCRIPT = """
import atexit, json, sys
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import torch
from torch import nn
torch.set_num_threads(1)
import train.students.unet as unet
from train.config import load_config
from train.run import run_training

# Batch norm sees a rank's own samples only, so the comparison needs students without it.
unet.nn = SimpleNamespace(**{{**vars(nn), "BatchNorm2d": lambda width: nn.GroupNorm(1, width)}})
atexit.register(lambda: print(f"group left: {{not torch.distributed.is_initialized()}}\\n", end=""))  # runs last
for options in json.loads(sys.argv[1]):
    run_training(load_config(options))
"""


def run_all(runs: list[dict[str, Any]], processes: int) -> None:
    command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT)), json.dumps(runs)]
    if processes > 1:
        command = [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from processes.stop import StopRequest\nfrom processes.ranks import run_ranks\n"
            "with StopRequest() as stop:\n"
            "    sys.exit(run_ranks(sys.argv[1:], ['cpu', 'cpu'], stop).exit_code)",
            *command[1:],
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("group left: True") == processes


def curves(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if v is not None and k != "epoch_time_s"} for line in lines]


@pytest.mark.slow
def test_two_processes_equal_one_for_every_loss(tmp_path, make_store):
    # 27 and 7 samples in batches of 6: ranks get unequal shares of the last ones.
    images = str(make_store("images.zarr", train=27, val=7, logits=True, unlabelled=(3, 5)))
    masks = str(make_store("masks.zarr", train=14, val=5, masks=True))
    unmasked = {f"train/{row:04d}.png" for row in range(4, 14)}
    maps = str(
        make_store("maps.zarr", train=14, val=5, masks=True, maps=True, labels=False, unmasked=unmasked)
    )
    plain = {"student": "timm:test_vit", "image_size": 32, "batch_size": 6, "epochs": 2, "workers": 0}
    plain |= {"device": "cpu", "learning_rate": 1e-3, "store": images, "seed": 1}
    # AdamW divides a gradient by its size: where that is near 0, its rounding decides the step. SGD does not.
    unet = {"student": "unet/small", "epochs": 1, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.05}
    cases = {
        "mse": plain | {"feature_loss_type": "mse"},
        "cosine": plain | {"feature_loss_type": "cosine", "grad_accum_steps": 2},
        "smooth_l1": plain | {"feature_loss_type": "smooth_l1", "distillation_type": "feature"},
        "relation": plain | {"feature_loss_type": "relation", "grad_accum_steps": 2},
        "logit": plain | {"distillation_type": "logit", "control": True},
        "features": plain | {"task": "features"},
        "two phases": plain | {"pretrain_epochs": 1, "epochs": 1, "labeled_share": 0.5},
        "segmentation": plain | unet | {"store": masks},
        "maps": plain | unet | {"store": maps, "distillation_type": "logit"},
    }
    for processes in (1, 2):
        run_all(
            [case | {"out": str(tmp_path / f"{name}{processes}")} for name, case in cases.items()], processes
        )
    for name in cases:
        compare(name, curves(tmp_path / f"{name}1"), curves(tmp_path / f"{name}2"))
    compare("control", curves(tmp_path / "logit1" / "control"), curves(tmp_path / "logit2" / "control"))
    assert json.loads((tmp_path / "mse2" / "config.json").read_text())["resolved"]["processes"] == 2


def compare(name: str, one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, abs=1e-5), f"{name}: {key} in epoch {left['epoch']}"
