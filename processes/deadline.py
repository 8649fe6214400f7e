"""The four-second promise: once a stop is requested, the process ends in time, whatever it is doing."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Self

from console.stop import SIGNALS, Stopped, StopRequest
from processes.ending import exit_now

#: Seconds that the work gets to stop by itself: to finish its step or batch and save.
ORDERLY_S = 1.5
#: Seconds that observers get to report that the run ended.
REPORT_S = 0.8
POLL_S = 0.1


def nothing_to_save() -> str:
    return "stopped before the first step: nothing to save"


class StopDeadline:
    """While entered: if the work has not stopped `orderly_s` seconds after a stop request, save and end the process.

    Python runs signal handlers only between two operations of the main thread, which may be loading a model or deep
    inside one long forward pass. So a thread is woken by the signal itself (`signal.set_wakeup_fd`, written to by the
    C-level handler) and does what the main thread cannot do in time.

    `save` saves what is finished, in about a second, and returns a line for the user; the work assigns its own there
    as soon as it has something to save. `report` tells others that the run ended. Both run in the watching thread.
    """

    def __init__(
        self,
        stop: StopRequest,
        save: Callable[[], str] = nothing_to_save,
        *,
        orderly_s: float = ORDERLY_S,
        report: Callable[[Stopped], None] | None = None,
    ) -> None:
        self.stop, self.save, self.orderly_s, self.report = stop, save, orderly_s, report
        self.acknowledged = threading.Event()
        self.closed = threading.Event()
        self.wakeup: tuple[socket.socket, socket.socket] | None = None
        self.previous_descriptor = -1
        self.thread = threading.Thread(target=self.watch, name="stop-deadline", daemon=True)

    def acknowledge(self) -> None:
        """The work has seen the request and saves by itself, which must not be interrupted."""
        self.acknowledged.set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.wakeup = socket.socketpair()
            self.wakeup[0].settimeout(POLL_S)
            self.wakeup[1].setblocking(False)
            self.previous_descriptor = signal.set_wakeup_fd(
                self.wakeup[1].fileno(), warn_on_full_buffer=False
            )
        self.thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.closed.set()
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.previous_descriptor)
            with contextlib.suppress(OSError):
                self.wakeup[1].send(b"\0")
        self.thread.join(timeout=5)
        if self.wakeup is not None:
            for end in self.wakeup:
                end.close()

    def watch(self) -> None:
        number = self.wait_for_stop()
        if number is None or self.wait_for_work():
            return
        text = self.save_work()
        if self.closed.is_set():  # it stopped by itself meanwhile
            return
        if text:
            print(text, file=sys.stderr, flush=True)
        if self.report is not None:
            stopped = Stopped(text, 128 + number)
            reporter = threading.Thread(target=self.report, args=(stopped,), daemon=True)
            reporter.start()
            reporter.join(REPORT_S)
        exit_now(128 + number)

    def save_work(self) -> str:
        try:
            return self.save()
        except Exception as error:  # the process ends in any case; the user reads why nothing was saved
            kind = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
            return kind + " ".join(str(error).split())

    def wait_for_work(self) -> bool:
        """True when the work stops by itself within its time."""
        # `acknowledged` and `closed` are both the end of the waiting, whichever comes first.
        for _ in range(max(1, round(self.orderly_s / POLL_S))):
            if self.closed.is_set() or self.acknowledged.wait(POLL_S):
                return True
        return self.closed.is_set()

    def wait_for_stop(self) -> int | None:
        """The number of the signal; None when closed before there was one."""
        while not self.closed.is_set():
            if self.stop.requested:  # also by `StopRequest.set`, which is no signal
                return int(self.stop.signal_number)
            if self.wakeup is None:
                self.closed.wait(POLL_S)
                continue
            with contextlib.suppress(TimeoutError):
                for number in self.wakeup[0].recv(64):
                    if number in SIGNALS:
                        return number
        return None
