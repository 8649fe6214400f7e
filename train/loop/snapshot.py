"""A snapshot of the last finished step within seconds of SIGTERM, even when the step that runs takes longer.

Weights change only while the loop holds `update()`; batch-norm statistics change in every forward pass, so they
are copied at the end of each step. A watching thread, woken by the signal itself (the main thread may be deep
inside one operation and run no Python for a while), first lets the loop stop by itself, then saves what the last
finished step left and ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from console.stop import SIGNALS, Stopped, StopRequest
from store.errors import DistillError

#: Seconds that the loop gets to finish its step and save by itself.
GRACE_S = 1.5
#: Seconds to wait for an optimizer step that is writing weights right now.
LOCK_S = 1.0
#: Seconds that observers get to say that the run ended.
REPORT_S = 0.8


def nothing_to_save() -> str:
    return "stopped before the first step: nothing to save"


class StopWatch:
    """Ends the process in time after a signal, when the loop itself does not get to it.

    `save` writes the snapshot and returns a line for the user; a training puts its own there. `report` tells
    others that the run ended. Both are called from the watching thread.
    """

    def __init__(
        self,
        stop: StopRequest,
        save: Callable[[], str] = nothing_to_save,
        *,
        report: Callable[[Stopped], None] = lambda stopped: None,
    ) -> None:
        self.stop, self.save, self.report = stop, save, report
        self.acknowledged = threading.Event()
        self.closed = threading.Event()
        self.ends: tuple[socket.socket, socket.socket] | None = None
        self.previous_descriptor = -1
        self.thread = threading.Thread(target=self.watch, name="stop-watch", daemon=True)

    def acknowledge(self) -> None:
        """The loop has seen the request and saves by itself."""
        self.acknowledged.set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.ends = socket.socketpair()
            self.ends[1].setblocking(False)
            self.previous_descriptor = signal.set_wakeup_fd(self.ends[1].fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        if self.ends is not None:
            signal.set_wakeup_fd(self.previous_descriptor)
            self.ends[1].send(b"\0")
        self.thread.join(timeout=5)
        if self.ends is not None:
            for end in self.ends:
                end.close()

    def watch(self) -> None:
        number = self.wait_for_signal()
        if number is None or self.acknowledged.wait(GRACE_S) or self.closed.is_set():
            return
        try:
            text = self.save()
        except DistillError as error:
            text = str(error)
        print(text, file=sys.stderr, flush=True)
        reporter = threading.Thread(target=self.report, args=(Stopped(text, 128 + number),), daemon=True)
        reporter.start()
        reporter.join(REPORT_S)
        end_process(128 + number)

    def wait_for_signal(self) -> int | None:
        """The number of the first stop signal; None when closed before."""
        while not self.closed.is_set():
            if self.ends is None:
                if self.stop.wait(0.2):
                    return int(self.stop.signal_number)
                continue
            for number in self.ends[0].recv(64):
                if number in {int(value) for value in SIGNALS}:
                    return number
        return None


def end_process(exit_code: int) -> Any:
    """End now, without unwinding the main thread, which may be deep inside one operation."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(exit_code)
