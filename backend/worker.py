"""The process that works: started by the supervisor, it extracts, trains and tells over the pipe."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import warnings

from backend.calls import TaskCalls
from backend.ends import describe, leave
from backend.pipe import PipeSender, Sender
from backend.plain_output import use_plain_output
from backend.ranks import PIPE_VARIABLE
from backend.request import TaskRequest, read_request
from backend.supervisor import PARENT_VARIABLE
from console.log import configure_logging, get_logger
from console.stop import Stopped, StopRequest

log = get_logger("platform")

PR_SET_PDEATHSIG = 1
# Seconds after a stop until the end comes in any case; a supervisor that lives is quicker.
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


def main() -> None:
    use_plain_output()
    configure_logging()
    os.environ.update(QUIET)
    # matplotlib, once for every Chinese character of every plot.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    sender = PipeSender(int(os.environ.pop(PIPE_VARIABLE)))
    # The supervisor ends what takes too long; a second SIGTERM must not break off the saving.
    with StopRequest(patient=True) as stop:
        threading.Thread(target=end_in_any_case, args=(stop,), name="platform-end", daemon=True).start()
        follow_parent(int(os.environ.pop(PARENT_VARIABLE)), stop)
        code = work(read_request(sys.argv[1:]), sender, stop)
    leave(code)


def follow_parent(parent: int, stop: StopRequest) -> None:
    """Stop, with a checkpoint, when the supervisor is gone: the platform kills only the process it knows."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        stop.set()


def end_in_any_case(stop: StopRequest) -> None:
    """The thread that ends this process and all it started when no supervisor is left to do it."""
    stop.event.wait()
    time.sleep(ORPHAN_STOP_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(stop.exit_code)


def work(request: TaskRequest, sender: Sender, stop: StopRequest) -> int:
    """Do the task and tell how it ended; the exit code."""
    calls = TaskCalls(request.task_id)
    try:
        from backend.task import Task

        Task(request, sender, stop).run()
    except Stopped as stopped:
        log.info("%s", stopped)
        sender.send(calls.error(f"stopped: {stopped}"))
        return stopped.exit_code
    except Exception as error:
        message = describe(error)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sender.send(calls.error(message))
        return int(getattr(error, "exit_code", 1))
    sender.send(calls.complete())
    log.info("task %s: complete", request.task_id)
    return 0


if __name__ == "__main__":
    main()
