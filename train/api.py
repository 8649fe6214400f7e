"""`from train import train`: stage two for Python programs and notebooks."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from console.options import takes_options
from console.output import plain_json
from processes.stop import Stopped, StopRequest
from train.config import TrainConfig, load_config
from train.errors import TrainError
from train.run_folder import RunFolder


@takes_options(TrainConfig)
def train(**options: Any) -> dict[str, Any]:
    """Train one student from a store of teacher features into the run folder `out`; returns its summary.

    The keywords are the options of `cli train`; what is not given comes from the student's recipe, else from the
    defaults below. The summary is the content of `summary.json`: `metrics` of the best epoch, `parameters`, `macs`,
    `wall_time_s`, and with `control=True` the metrics without the teacher and the difference.

        summary = train(store="photos.zarr", student="resnet18", out="runs/resnet18", epochs=30, control=True)
        summary["metrics"]["top1"], summary["control"]["difference"]["top1"]

    Raises:
        ConfigError: options that make no sense, all problems together.
        TrainError, StoreError: anything else that the caller can do something about.
        processes.stop.Stopped: after Ctrl-C or SIGTERM; the same call with `resume=True` continues.
    """
    config = load_config(options)
    if os.environ.get("RANK", "0") == "0":
        RunFolder(config.out).check_place(config)
    if config.needs_ranks:
        return train_on_several_devices(config)
    from train.run import run_training

    return run_training(config)


def train_on_several_devices(config: TrainConfig) -> dict[str, Any]:
    """`cli train` once per device: the processes of torch.distributed cannot be those of the caller's program."""
    from processes.ranks import run_ranks

    explicit = {name: value for name, value in config.model_dump().items() if config.is_explicit(name)}
    with tempfile.TemporaryDirectory() as scratch, StopRequest() as stop:
        file = Path(scratch) / "options.json"
        file.write_text(json.dumps(plain_json(explicit)), encoding="utf-8")
        exits = run_ranks(["-m", "cli", "train", "--config", str(file)], config.devices, stop)
        if stop.requested:
            raise Stopped(f"{config.out}: stopped; the same call with resume=True continues", stop.exit_code)
    summary = RunFolder(config.out).read_summary()
    if exits.exit_code or summary is None:
        raise TrainError(
            f"{config.out}: training on {config.device} failed (exit code {exits.exit_code}): its lines on stderr name the reason"
        )
    return summary
