"""What a resumed training needs, kept after every epoch: ultralytics resumes from a half-precision EMA.

Live weights and alignment heads, EMA, optimizer, scaler and early-stopping state, in full precision. Random state is
a function of seed and epoch (`epoch_seed`), so the epoch number is enough.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from console.log import get_logger
from train.checkpoint import LAST, load_checkpoint
from train.errors import TrainError
from train.loop.saving import adopt_best

log = get_logger("train")
STATE_VERSION = 1


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """The seed of an epoch's data order, augmentation and dropout; each DDP rank augments differently."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Python, numpy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resume_state(folder: Path) -> dict[str, Any] | None:
    """What `last.pt` holds for going on, or None for a new run. Raises TrainError when it holds none."""
    if not (folder / LAST).exists():
        return None
    state = load_checkpoint(folder / LAST).get("training")
    if not isinstance(state, dict) or "ema" not in state:
        raise TrainError(f"{folder / LAST} holds no state of a YOLO training: start again with --overwrite")
    if "best_epoch" in state:  # not in runs made before checkpoints were written by time
        adopt_best(folder, state["best_epoch"])
    log.info("%s: resumed after epoch %d", folder, state["epoch"] + 1)
    return state


def best_epoch_of(state: dict[str, Any] | None) -> int:
    """The best epoch, from 1, of what is resumed from; 0 for a new run."""
    return 0 if state is None else int(state.get("best_epoch", 0))


def training_state(trainer: Any) -> dict[str, Any]:
    """The state after the trainer's current epoch."""
    from ultralytics.utils.torch_utils import unwrap_model

    stopper = trainer.stopper
    return {
        "version": STATE_VERSION,
        "epoch": trainer.epoch,
        "stopped_early": bool(trainer.stop) and trainer.epoch + 1 < trainer.epochs,
        "model": unwrap_model(trainer.model).state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "best_fitness": plain(trainer.best_fitness),
        "chosen": {
            "optimizer": str(trainer.args.optimizer),
            "lr0": float(trainer.args.lr0),
            "warmup_bias_lr": float(trainer.args.warmup_bias_lr),
        },
        "stopper": {
            "best_fitness": plain(stopper.best_fitness),
            "best_epoch": stopper.best_epoch,
            "possible_stop": stopper.possible_stop,
        },
    }


def only_validation_left(content: dict[str, Any], epochs: int) -> bool:
    """True when the run was interrupted after its last epoch."""
    return bool(content["stopped_early"]) or content["epoch"] + 1 >= epochs


def restore_state(trainer: Any, content: dict[str, Any]) -> None:
    """Put a saved state into a trainer that is set up; training continues with the following epoch."""
    from ultralytics.utils.torch_utils import unwrap_model

    if content["version"] != STATE_VERSION:
        raise TrainError(
            f"resume: the checkpoint's state has version {content['version']}, this program reads {STATE_VERSION}: "
            "start again with --overwrite"
        )
    unwrap_model(trainer.model).load_state_dict(content["model"])
    trainer.ema.ema.load_state_dict(content["ema"])
    trainer.ema.updates = content["updates"]
    for saved, group in zip(
        content["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True
    ):
        saved["fused"] = group.get("fused")  # belongs to the device, which may be another one now
    trainer.optimizer.load_state_dict(content["optimizer"])
    trainer.scaler.load_state_dict(content["scaler"])
    trainer.best_fitness = content["best_fitness"]
    trainer.stopper.__dict__.update(content["stopper"])
    trainer.start_epoch = content["epoch"] + 1


def plain(value: Any) -> float | None:
    """A Python float of numpy's or torch's scalar; weights-only loading knows no numpy scalars."""
    return None if value is None else float(value)
