"""The four-second promise: a stop that something holds up ends the process, with everything encoded committed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Self

from console.stop import StopRequest

ORDERLY_S = 1.5  # how long an orderly stop may take: the batch in work, the commit, the decoders
COMMIT_S = 1.0
POLL_S = 0.1


class Watchdog:
    """While entered: once a stop is requested, the process ends within 4 seconds.

    Loading a teacher, a forward pass of a large one on a CPU, or a hanging network disk cannot be interrupted from
    Python. Their rows are not committed yet, so nothing is lost by leaving them: the next run encodes them again.
    `give_up` is what is still to be done before the process ends, in at most so many seconds: commit what the teacher
    has encoded, end the decoders.
    """

    def __init__(self, stop: StopRequest, message: Callable[[], str], orderly_s: float = ORDERLY_S) -> None:
        self.stop, self.message, self.orderly_s = stop, message, orderly_s
        self.give_up: Callable[[float], None] | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="stop-watchdog", daemon=True)

    def watch(self) -> None:
        while not self.stop.requested:
            if self.over.wait(POLL_S):
                return
        if self.over.wait(self.orderly_s):
            return
        if self.give_up is not None:
            self.give_up(COMMIT_S)
        if self.over.is_set():
            return
        print(self.message(), file=sys.stderr, flush=True)
        os._exit(self.stop.exit_code)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.over.set()
