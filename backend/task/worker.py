"""The processes that work, started by `main`: the task itself, and the ranks of a training on several devices.

`… worker task PARENT WORDS…` extracts, trains and sends its calls over the pipe to the reporting process `PARENT`.
`… worker rank TASK_ID` is one rank: its configuration comes on stdin, its place in the environment; rank 0 reports.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backend.task.calls import PIPE_VARIABLE, PipeSender, Sender, TaskCalls
from backend.task.errors import PlatformError
from backend.task.plain_output import finish_output, use_plain_output
from backend.task.request import TaskRequest, read_request
from console.output import configure_logging, get_logger
from processes.children import end_with_parent, exit_now, kill_group
from processes.ranks import run_ranks
from processes.stop import StopDeadline, Stopped, StopRequest

if TYPE_CHECKING:
    from train.config import TrainConfig

log = get_logger("platform")

# Seconds after a stop until the process ends in any case; a supervisor that is alive is quicker.
ORPHAN_STOP_S = 6.0
# What libraries would otherwise draw, download or send.
QUIET = {
    "NO_COLOR": "1",
    "TERM": "dumb",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "YOLO_OFFLINE": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(words: Sequence[str]) -> None:
    use_plain_output()
    # The supervisor ends what takes too long; a second SIGTERM must not interrupt the saving.
    with StopRequest(patient=True) as stop:
        code = run_task(words[1:], stop) if words[0] == "task" else run_rank(words[1], stop)
    finish_output()
    exit_now(code)


# -- the task -------------------------------------------------------------------------------------------


def run_task(words: Sequence[str], stop: StopRequest) -> int:
    configure_logging()
    os.environ.update(QUIET)
    # matplotlib, once for every Chinese character of every plot.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    sender = PipeSender(int(os.environ.pop(PIPE_VARIABLE)))
    # The platform kills only the supervisor: without it, this process stops with a checkpoint.
    end_with_parent(int(words[0]), signal.SIGTERM)
    with StopDeadline(stop, end_own_group, orderly_s=ORPHAN_STOP_S):
        return work(read_request(words[1:]), sender, stop)


def end_own_group() -> str:
    """Kill this process with everything that it started (it leads a session of its own)."""
    kill_group(os.getpid())
    return ""


def work(request: TaskRequest, sender: Sender, stop: StopRequest) -> int:
    """Do the task and report how it ended; the exit code."""
    calls = TaskCalls(request.task_id)
    try:
        from backend.task.stages import TaskPipeline

        TaskPipeline(request, sender, stop).run()
    except Stopped as stopped:
        log.info("%s", stopped)
        sender.send(calls.error(f"stopped: {stopped}"))
        return stopped.exit_code
    except Exception as error:
        return fail(error, sender, calls)
    sender.send(calls.complete())
    log.info("task %s: complete", request.task_id)
    return 0


def fail(error: Exception, sender: Sender | None, calls: TaskCalls) -> int:
    """The error as one line for log and platform, the traceback of a defect for the log; the exit code."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not hasattr(error, "exit_code"):
        traceback.print_exc()
        text = f"{type(error).__name__}: {text}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    if sender is not None:
        sender.send(calls.error(text))
    return int(getattr(error, "exit_code", 1))


# -- ranks ----------------------------------------------------------------------------------------------


def train_on_ranks(config: TrainConfig, task_id: str, pipe: int | None, stop: StopRequest) -> dict[str, Any]:
    """Run the training on `config.devices`, one process each; the content of summary.json.

    Raises:
        Stopped: after a signal, with the last finished step saved.
        PlatformError: when a rank failed; its own message is in the log.
    """
    log.info("training on %s, one process each", ", ".join(config.devices))
    exits = run_ranks(
        ["-m", "backend.task.worker", "rank", task_id],
        config.devices,
        stop,
        stdin=config.model_dump_json().encode("utf-8"),
        of_rank_zero={} if pipe is None else {PIPE_VARIABLE: str(pipe)},
        descriptors_of_rank_zero=() if pipe is None else (pipe,),
    )
    if stop.requested:
        raise Stopped("the last finished step is saved; start the task again to resume", stop.exit_code)
    if exits.exit_code:
        raise PlatformError(
            f"training failed, exit codes of the ranks {exits.codes}: the reason is in the log"
        )
    from train.run_folder import RunFolder

    return RunFolder(config.out).read_summary() or {}


def run_rank(task_id: str, stop: StopRequest) -> int:
    """One rank; the exit code. Its launcher reports what happened to the whole, rank 0 why."""
    configure_logging(logging.INFO if os.environ["RANK"] == "0" else logging.ERROR)
    pipe = os.environ.pop(PIPE_VARIABLE, None)
    sender = PipeSender(int(pipe)) if pipe else None
    calls = TaskCalls(task_id)
    text = sys.stdin.read()
    try:
        from backend.task.events import TrainingEvents
        from train.config import TrainConfig
        from train.run import run_training

        config = TrainConfig.model_validate_json(text)
        # Of the ranks, only rank 0 has a sender.
        listeners = [] if sender is None else [TrainingEvents(calls, sender, config.epochs, config.out)]
        run_training(config, listeners, stop)
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        # An error for the user explains itself; anything else (a lost connection) the launcher explains better.
        return fail(error, sender if hasattr(error, "exit_code") else None, calls)
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
