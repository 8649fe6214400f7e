"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once.

Once a stop is requested, the process ends within four seconds, whatever it is doing (`StopDeadline`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from processes.children import exit_now

#: Seconds that the work gets to stop by itself: to finish its step or batch and save.
ORDERLY_S = 1.5
#: Seconds that observers get to report that the run ended.
REPORT_S = 0.8
POLL_S = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Work ended early because it was asked to; what is done is saved and the text names the command that resumes."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process.

    Loops look at `requested` between steps; code that waits can use `wait(timeout_s)`. A second signal ends
    the process at once, unless it is `patient` because a deadline elsewhere ends it in time. Outside
    the main thread no handler can be installed: then only `set` requests a stop.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.event = threading.Event()
        self.requested_at: float | None = None  # time.monotonic() of the first request
        self.signal_number: int = signal.SIGTERM
        self.previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.event.is_set()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM: 128 + the signal, as shells count."""
        return 128 + self.signal_number

    def set(self, signal_number: int = signal.SIGTERM) -> None:
        self.signal_number = signal_number
        self.requested_at = self.requested_at or time.monotonic()
        self.event.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep up to `timeout_s` seconds; True as soon as a stop is requested."""
        return self.event.wait(timeout_s)

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.event.is_set() and not self.patient:
            os._exit(128 + signal_number)
        self.set(signal_number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()


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
