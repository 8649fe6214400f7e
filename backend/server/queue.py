"""The queue: one thread that brings processes and the table of tasks together.

Everything it does follows from the table: a waiting task gets a process when a slot is free, a task that is to stop
gets its signals, a task whose process has ended gets its final state. So a restarted server continues where the
last one ended, however that was.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from backend.server.command import Order
from backend.server.database import Task, TaskState
from backend.server.processes import Waiting
from backend.server.tasks import Tasks, requested_devices
from backend.server.undelivered import apply_undelivered
from backend.task.errors import OptionError
from console.output import get_logger

log = get_logger("server")

POLL_S = 0.2
# After an error, such as a database that does not answer.
PAUSE_S = 2.0
CLOSE_S = 10.0


class Handle(Protocol):
    """The process of one task."""

    @property
    def identity(self) -> tuple[int, float] | None:
        """Process id and start time, by which a later server finds it again; None where the runner has other ways."""

    def ended(self) -> bool:
        """Whether the process has ended."""

    @property
    def reason(self) -> str | None:
        """Why it failed, where its exit code does not say it."""

    @property
    def exit_code(self) -> int | None:
        """Its exit code after the end; None where it cannot be known."""

    def stop(self) -> None:
        """Called again and again until it has ended: SIGTERM first, after 5 seconds SIGKILL."""


class Runner(Protocol):
    """Where processes run."""

    name: str

    def choose(self, waiting: Sequence[Waiting], running: Sequence[str]) -> list[Waiting]:
        """Which waiting tasks start now, and on what; `running` are the devices of those that run."""

    def start(self, order: Order) -> Handle:
        """Start a task's process. Raises OSError."""

    def find(self, task: Task, words: Sequence[str]) -> Handle | None:
        """The process of a task that an earlier server started; None when there is none any more."""

    def close(self) -> None:
        """Let go of what runs, without ending it."""


class Running(NamedTuple):
    """A task's process and the devices that it occupies."""

    handle: Handle
    devices: str


class TaskQueue:
    """Starts with `open`, ends with `close`; processes that run then go on without it."""

    def __init__(self, tasks: Tasks, runner: Runner) -> None:
        self.tasks, self.runner = tasks, runner
        self.running: dict[str, Running] = {}
        self.wake = threading.Event()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, name="task-queue", daemon=True)

    def open(self) -> None:
        self.tasks.wake = self.wake.set
        self.wake.set()  # an earlier server may have left tasks that run or wait
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(CLOSE_S)
        self.runner.close()

    def run(self) -> None:
        failing = False
        while not self.closing.is_set():
            self.wake.wait(POLL_S if self.running or failing else None)
            self.wake.clear()
            try:
                self.step()
                failing = False
            except Exception as error:
                # A database or cluster that does not answer: processes go on, and the next step does what is left.
                if not failing:
                    log.exception("the queue cannot go on, trying again: %s", error)
                failing = True
                self.closing.wait(PAUSE_S)

    def step(self) -> None:
        for task_id, running in list(self.running.items()):
            if running.handle.ended():
                self.finish(task_id, running.handle.exit_code, running.handle.reason)
                del self.running[task_id]
        for task in self.tasks.in_states(TaskState.RUNNING, TaskState.STOPPING):
            if task.task_id not in self.running:
                self.recover(task)
            elif task.state == TaskState.STOPPING:
                self.running[task.task_id].handle.stop()
        waiting = [Waiting(task.task_id, requested_devices(task)) for task in self.tasks.waiting()]
        occupied = [running.devices for running in self.running.values()]
        for start in self.runner.choose(waiting, occupied):
            self.start(start.task_id, start.devices or "cpu")

    def recover(self, task: Task) -> None:
        """Find the process that an earlier server started, or give the task its final state."""
        handle = None
        if task.runner == self.runner.name:
            handle = self.runner.find(task, self.tasks.words_of(task))
        if handle is None:
            self.finish(task.task_id, None)
        else:
            log.info("task %s: found again", task.task_id)
            self.running[task.task_id] = Running(handle, task.devices or "cpu")

    def start(self, task_id: str, devices: str) -> None:
        """Mark the task as running, then start its process: after a crash in between there is no second one."""
        try:
            order = self.tasks.begin(task_id, self.runner.name, devices)
            if order is None:
                return
            handle = self.runner.start(order)
        except (OptionError, OSError) as error:
            self.tasks.refuse(task_id, f"the process cannot be started: {error}")
            return
        self.running[task_id] = Running(handle, devices)
        if handle.identity is not None:
            self.tasks.set_process(task_id, *handle.identity)
        log.info("task %s: started on %s", task_id, devices)

    def finish(self, task_id: str, exit_code: int | None, reason: str | None = None) -> None:
        apply_undelivered(self.tasks, task_id)
        self.tasks.finish(task_id, exit_code, reason)
        log.info("task %s: %s", task_id, self.tasks.read(task_id).state)
