"""Lock files. One process at a time holds one; the system releases it when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[float], None] | None = None) -> Iterator[BinaryIO]:
    """Hold the lock file `path`, which is created if it is missing; yields it, open for reading and appending.

    A child process that inherits the file holds the lock too, until both have ended.

    wait: called whenever another process still holds the lock, with the seconds since the first call, which gets 0;
    it sleeps, or raises to give up. None: wait without end.
    """
    with path.open("a+b") as file:
        if wait is None:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            waited_s, started = 0.0, time.monotonic()
            while not try_lock(file):
                wait(waited_s)
                waited_s = time.monotonic() - started
        yield file


def try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
