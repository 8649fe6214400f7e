"""Training over several devices: one process each, started, watched and ended together.

Each is a rank of one distributed run (train.run reads RANK and WORLD_SIZE, as under torchrun); rank 0 reports.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import PlatformError
from console.cores import core_share
from console.log import get_logger
from console.stop import Stopped, StopRequest

if TYPE_CHECKING:
    from train.config import TrainConfig

log = get_logger("platform")

POLL_S = 0.05
# A rank that is alone because another one died waits for it for ever: it gets this long, in seconds.
ALONE_S = 3.0
TASK_VARIABLE = "QWEN_DISTILL_TASK"
PIPE_VARIABLE = "QWEN_DISTILL_PIPE"


def train_on_ranks(config: TrainConfig, task_id: str, pipe: int | None, stop: StopRequest) -> dict[str, Any]:
    """Run the training on `config.devices`; the content of summary.json.

    Raises:
        Stopped: after a signal, with the last finished step saved.
        PlatformError: when a rank failed; its own message stands in the log.
    """
    log.info("training on %s, one process each", ", ".join(config.devices))
    shared = shared_environment(config.devices)
    ranks = [start_rank(rank, config, shared, task_id, pipe) for rank in range(len(config.devices))]
    try:
        wait_for(ranks, stop)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    codes = [process.returncode for process in ranks]
    if stop.requested:
        raise Stopped(
            "the last finished step is saved; starting the task again goes on from it", stop.exit_code
        )
    if any(codes):
        raise PlatformError(f"training failed, exit codes of the ranks {codes}: the reason stands in the log")
    summary: dict[str, Any] = json.loads((Path(config.out) / "summary.json").read_text("utf-8"))
    return summary


def shared_environment(devices: Sequence[str]) -> dict[str, str]:
    """What all ranks have in common: where they meet, and which GPUs they see."""
    threads = core_share({**os.environ, "LOCAL_WORLD_SIZE": str(len(devices))})
    numbers = [name.removeprefix("cuda:") for name in devices if name != "cpu"]
    return {
        "WORLD_SIZE": str(len(devices)),
        "LOCAL_WORLD_SIZE": str(len(devices)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **({"CUDA_VISIBLE_DEVICES": visible(numbers)} if numbers else {}),
    }


def visible(numbers: Sequence[str]) -> str:
    """The chosen GPUs by their outer names, where some are hidden already."""
    outer = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(outer[int(number)] if outer else number for number in numbers)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(
    rank: int, config: TrainConfig, shared: dict[str, str], task_id: str, pipe: int | None
) -> subprocess.Popen[bytes]:
    """One rank; only rank 0 is given the pipe to the reporter."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), TASK_VARIABLE: task_id}
    passed = []
    if rank == 0 and pipe is not None:
        own[PIPE_VARIABLE], passed = str(pipe), [pipe]
    process = subprocess.Popen(
        [sys.executable, "-m", "backend.rank"],
        env=os.environ | shared | own,
        stdin=subprocess.PIPE,
        pass_fds=passed,
    )
    assert process.stdin is not None
    process.stdin.write(config.model_dump_json().encode("utf-8"))
    process.stdin.close()
    return process


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> None:
    """Wait until all have ended, or one has failed and the others had time to notice."""
    passed_on = False
    failed_at: float | None = None
    while any(process.poll() is None for process in ranks):
        if stop.requested and not passed_on:
            passed_on = True
            for process in ranks:
                process.send_signal(stop.signal_number)
        if failed_at is None and any(process.returncode for process in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > ALONE_S:
            return
        time.sleep(POLL_S)
