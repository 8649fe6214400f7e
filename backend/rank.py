"""One rank of a training over several devices: its configuration comes on stdin, its place in the environment."""

from __future__ import annotations

import logging
import os
import sys

from backend.calls import TaskCalls
from backend.ends import describe, leave
from backend.pipe import PipeSender
from backend.plain_output import use_plain_output
from backend.ranks import PIPE_VARIABLE
from console.log import configure_logging
from console.stop import Stopped, StopRequest


def main() -> None:
    use_plain_output()
    configure_logging(logging.INFO if os.environ["RANK"] == "0" else logging.ERROR)
    pipe = os.environ.pop(PIPE_VARIABLE, None)
    sender = PipeSender(int(pipe)) if pipe else None
    calls = TaskCalls(sys.argv[1])
    text = sys.stdin.read()
    with StopRequest(patient=True) as stop:
        leave(train(text, sender, calls, stop))


def train(text: str, sender: PipeSender | None, calls: TaskCalls, stop: StopRequest) -> int:
    """Run this rank; the exit code. The launcher says what became of the whole, rank 0 why."""
    try:
        from backend.events import training_observers
        from train.config import TrainConfig
        from train.run import run_training

        config = TrainConfig.model_validate_json(text)
        run_training(config, training_observers(config, calls, sender), stop)
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        message = describe(error)
        print(f"error: {message}", file=sys.stderr, flush=True)
        # An error meant for the user says all; for anything else (a lost neighbour) the launcher knows more.
        if sender is not None and hasattr(error, "exit_code"):
            sender.send(calls.error(message))
        return int(getattr(error, "exit_code", 1))
    return 0


if __name__ == "__main__":
    main()
