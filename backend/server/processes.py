"""Training processes of this machine: started in sessions of their own, found again by process id and start time."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import psutil

from backend.server.command import Order, command_line
from backend.server.database import Task
from backend.server.logs import LOG_FILE
from backend.server.settings import DATABASE_VARIABLE, TOKEN_VARIABLE, Settings
from backend.task.http_client import TOKEN_VARIABLE as REPORT_TOKEN_VARIABLE

KILL_AFTER_S = 5.0
# A process of the same id that started this close to the recorded time is the same one: clocks are adjusted.
SAME_START_S = 2.0
PRIVATE = (TOKEN_VARIABLE, DATABASE_VARIABLE)


class Waiting(NamedTuple):
    """A task in the queue; `devices` is None where any will do."""

    task_id: str
    devices: str | None


class LocalProcess:
    """A process with its id and start time; `child` is None when an earlier server started it."""

    reason: str | None = None  # the exit code says it all

    def __init__(
        self, process: psutil.Process, started: float, child: subprocess.Popen[bytes] | None
    ) -> None:
        self.process, self.started, self.child = process, started, child
        self.stopping_since: float | None = None

    @property
    def identity(self) -> tuple[int, float]:
        return self.process.pid, self.started

    def ended(self) -> bool:
        if self.child is not None:
            return self.child.poll() is not None
        try:
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    @property
    def exit_code(self) -> int | None:
        return None if self.child is None else self.child.returncode

    def stop(self) -> None:
        """As Java's Process.destroy() and destroyForcibly(): the entry process alone gets the signals."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.stopping_since is None:
                self.stopping_since = time.monotonic()
                self.process.terminate()
            elif time.monotonic() - self.stopping_since > KILL_AFTER_S:
                self.process.kill()


class LocalRunner:
    """Processes of this machine, with its GPUs."""

    name = "local"

    def __init__(self, settings: Settings) -> None:
        self.token = settings.token
        self.gpus = visible_gpus()
        self.slots = settings.jobs or max(1, len(self.gpus))

    def choose(self, waiting: Sequence[Waiting], running: Sequence[str]) -> list[Waiting]:
        return choose(waiting, running, self.slots, self.gpus)

    def start(self, order: Order) -> LocalProcess:
        """Raises OSError."""
        child = start_training(order, self.token)
        process = psutil.Process(child.pid)
        return LocalProcess(process, process.create_time(), child)

    def find(self, task: Task, words: Sequence[str]) -> LocalProcess | None:
        """By process id and start time; by its command line where the server ended before it could record them."""
        if task.process_id is None or task.process_started is None:
            return find_by_words(words)
        try:
            process = psutil.Process(task.process_id)
            started = process.create_time()
        except psutil.NoSuchProcess:
            return None
        if abs(started - task.process_started) > SAME_START_S:
            return None
        return LocalProcess(process, started, None)

    def close(self) -> None:
        """Nothing: the processes go on."""


def choose(
    waiting: Sequence[Waiting], running: Sequence[str], slots: int, gpus: Sequence[str]
) -> list[Waiting]:
    """Which waiting tasks start now, and on what: first come first, within the slots and the GPUs.

    A GPU takes as many tasks as the slots come to per GPU. A task that waits for its GPUs keeps them from later ones,
    which may start on others.
    """
    per_gpu = max(1, -(-slots // len(gpus))) if gpus else 1
    used = Counter(device for devices in running for device in devices.split(",") if device != "cpu")
    kept: set[str] = set()
    starts: list[Waiting] = []
    for task_id, asked in waiting:
        if len(running) + len(starts) >= slots:
            break
        if asked is not None:
            wanted = [device for device in asked.split(",") if device != "cpu"]
        else:
            free = [gpu for gpu in gpus if used[gpu] < per_gpu and gpu not in kept]
            wanted = [min(free, key=lambda gpu: used[gpu])] if free else []
            if gpus and not free:
                continue
        if any(used[device] >= per_gpu or device in kept for device in wanted):
            kept.update(wanted)
            continue
        used.update(wanted)
        starts.append(Waiting(task_id, asked or ",".join(wanted) or "cpu"))
    return starts


def start_training(
    order: Order, token: str | None, preexec_fn: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """Start the training process with its output in the task's log. Raises OSError."""
    order.output_dir.mkdir(parents=True, exist_ok=True)
    with (order.output_dir / LOG_FILE).open("ab") as output:
        output.write(f"== attempt {order.attempt}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())
        output.flush()
        return subprocess.Popen(
            command_line(list(order.words)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=training_environment(token),
            start_new_session=True,  # the end of the server, and Ctrl-C in its terminal, do not reach it
            preexec_fn=preexec_fn,
        )


def training_environment(token: str | None) -> dict[str, str]:
    """The server's own, without its secrets; the training process presents the token when it reports."""
    environment = {name: value for name, value in os.environ.items() if name not in PRIVATE}
    return environment | ({REPORT_TOKEN_VARIABLE: token} if token else {})


def find_by_words(words: Sequence[str]) -> LocalProcess | None:
    command = command_line(list(words))[1:]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == command:
                return LocalProcess(process, process.create_time(), None)
    return None


def visible_gpus() -> list[str]:
    """The numbers by which training processes know the GPUs of this machine. PyTorch is not imported for it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [str(index) for index, _ in enumerate(filter(None, map(str.strip, chosen.split(","))))]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]
