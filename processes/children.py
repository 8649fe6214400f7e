"""Child processes: what they inherit when they are started, which signals reach them, and how they end: with their parent, after
a signal, together with everything they started.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

PARENT_POLL_S = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ROOT = Path(__file__).resolve().parents[1]
_main_module_lock = threading.RLock()


def end_with_parent(parent: int, number: int) -> None:
    """Send signal `number` to this process as soon as `parent` is no longer its parent, however that one ended.

    A thread polls: the kernel's own signal (`signal_on_parent_death`) comes with the end of the parent's *thread*
    that started this process, which in a thread pool may be long before the parent ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def signal_on_parent_death() -> None:
    """Linux: SIGTERM for this process when the thread that started it ends. For `preexec_fn`, where the program that is
    started is not ours to change; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def exit_now(code: int) -> NoReturn:
    """End this process without unwinding: the main thread may be deep inside one operation, and the ordinary way out
    joins threads and frees a large heap. Processes started with multiprocessing are killed.
    """
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def kill_group(leader: int) -> None:
    """Kill the process group that `leader` leads (`start_new_session=True`), if there is still one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def stop_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM, so that it saves its work; after `grace_s` seconds SIGKILL for it and everything in its group."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)


@contextlib.contextmanager
def ignore_sigint() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to the whole group: their parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """SIGINT and SIGTERM wait; processes started inside inherit the mask and never see them (their children neither)."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a Python process that finds this checkout (or installation), and `more`."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, **more}


@contextmanager
def hide_main_module() -> Iterator[None]:
    """Processes that multiprocessing spawns meanwhile do not import the caller's program as `__mp_main__`.

    They would run every line of it that is not behind `if __name__ == "__main__":`, such as the call that started them.
    """
    with _main_module_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType(
            "__main__"
        )  # without a file or a spec there is nothing to import
        try:
            yield
        finally:
            sys.modules["__main__"] = main
