"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

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
