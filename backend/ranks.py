"""Training over several devices: one process each, started, watched and ended together.

Each is a rank of one distributed run (train.run reads RANK and WORLD_SIZE, as under torchrun); rank 0 reports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import PlatformError
from console.log import get_logger
from console.stop import Stopped, StopRequest
from processes.ranks import run_ranks

if TYPE_CHECKING:
    from train.config import TrainConfig

log = get_logger("platform")

PIPE_VARIABLE = "QWEN_DISTILL_PIPE"


def train_on_ranks(config: TrainConfig, task_id: str, pipe: int | None, stop: StopRequest) -> dict[str, Any]:
    """Run the training on `config.devices`; the content of summary.json.

    Raises:
        Stopped: after a signal, with the last finished step saved.
        PlatformError: when a rank failed; its own message stands in the log.
    """
    log.info("training on %s, one process each", ", ".join(config.devices))
    exits = run_ranks(
        ["-m", "backend.rank", task_id],
        config.devices,
        stop,
        stdin=config.model_dump_json().encode("utf-8"),
        of_rank_zero={} if pipe is None else {PIPE_VARIABLE: str(pipe)},
        descriptors_of_rank_zero=() if pipe is None else (pipe,),
    )
    if stop.requested:
        raise Stopped(
            "the last finished step is saved; starting the task again goes on from it", stop.exit_code
        )
    if exits.exit_code:
        raise PlatformError(
            f"training failed, exit codes of the ranks {exits.codes}: the reason stands in the log"
        )
    summary: dict[str, Any] = json.loads((Path(config.out) / "summary.json").read_text("utf-8"))
    return summary
