"""Training processes on the workers of an existing dask cluster (`--scheduler`).

The workers need this package and the three roots under the same paths. A task is a future that the scheduler keeps
under a published name, so it goes on without the server, and the next server finds it by that name.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from backend.server.command import Order
from backend.server.database import Task
from backend.server.errors import ServerError
from backend.server.processes import KILL_AFTER_S, Waiting, start_training
from backend.server.settings import Settings
from console.output import get_logger, redact
from processes.children import signal_on_parent_death
from processes.dask_cluster import ClusterStartError, connect, unset_allocator_variable, worker_slots

if TYPE_CHECKING:
    from distributed import Client, Future

log = get_logger("server")

POLL_S = 0.5
# A future that has not ended this long after its stop waits for a worker: it is taken back.
CANCEL_AFTER_S = KILL_AFTER_S + 3
STOPPED = 143


class DaskTask:
    """The future of one task."""

    identity = None  # it has a name that a later server knows

    def __init__(self, client: Client, name: str, future: Future) -> None:
        from distributed import Event

        self.client, self.name, self.future = client, name, future
        self.stopping = Event(stop_name(name), client=client)
        self.stopping_since: float | None = None
        self.reason: str | None = None

    def ended(self) -> bool:
        if not self.future.done():
            return False
        with contextlib.suppress(KeyError):
            self.client.unpublish_dataset(self.name)
        return True

    @property
    def exit_code(self) -> int | None:
        """The process's own; that of a stop where it had not started; None where the cluster lost it."""
        if self.future.status == "finished":
            return int(self.future.result())
        if self.future.status == "cancelled" and self.stopping_since is not None:
            return STOPPED
        if self.future.status == "error":
            error = self.future.exception()
            self.reason = f"lost by the cluster: {type(error).__name__}: {' '.join(str(error).split())}"
            return 1
        return None

    def stop(self) -> None:
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            self.stopping.set()
        elif time.monotonic() - self.stopping_since > CANCEL_AFTER_S:
            self.future.cancel()


class DaskRunner:
    """The workers of a cluster; a task takes what its workers offer: a `GPU`, a `trial`, or one of their threads."""

    name = "dask"

    def __init__(self, settings: Settings) -> None:
        """Connect. Raises ServerError when the scheduler does not answer or has no workers."""
        scheduler = settings.scheduler or ""
        self.stack = ExitStack()
        try:
            self.client = self.stack.enter_context(connect(scheduler))
        except ClusterStartError as error:
            raise ServerError(f"--scheduler {redact(scheduler)}: cannot be reached: {error}") from None
        self.slot, count = worker_slots(self.client)
        if not count:
            self.close()
            raise ServerError(
                f"--scheduler {redact(scheduler)}: has no workers: start some with `dask worker {redact(scheduler)}`"
            )
        self.slots = settings.jobs or count
        self.devices = "0" if "GPU" in self.slot else "cpu"
        self.token = settings.token

    def choose(self, waiting: Sequence[Waiting], running: Sequence[str]) -> list[Waiting]:
        """First come first; on which worker's GPU, the scheduler decides."""
        free = max(0, self.slots - len(running))
        return [Waiting(task_id, asked or self.devices) for task_id, asked in waiting[:free]]

    def start(self, order: Order) -> DaskTask:
        """Submit a task. Raises OSError when the cluster does not answer."""
        name = future_name(order.task_id, order.attempt)
        future = self.client.submit(
            run_on_worker,
            order,
            self.token,
            stop_name(name),
            key=name,
            pure=False,
            resources=self.slot,
        )
        self.client.publish_dataset(future, name=name)
        return DaskTask(self.client, name, future)

    def find(self, task: Task, words: Sequence[str]) -> DaskTask | None:
        name = future_name(task.task_id, task.attempt)
        try:
            return DaskTask(self.client, name, self.client.get_dataset(name))
        except KeyError:
            return None

    def close(self) -> None:
        self.stack.close()


def future_name(task_id: str, attempt: int) -> str:
    return f"qwen-distill-{task_id}-{attempt}"


def stop_name(name: str) -> str:
    return f"stop-{name}"


def run_on_worker(order: Order, token: str | None, stop: str) -> int:
    """What dask calls on a worker: the training process, until it ends or the event named `stop` is set; its exit code."""
    from distributed import Event

    event = Event(stop)
    if event.is_set():
        return STOPPED
    unset_allocator_variable()
    # With this worker's end the training stops, too: another worker then resumes it.
    process = start_training(order, token, preexec_fn=signal_on_parent_death)
    while process.poll() is None:
        if event.is_set():
            stop_process(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    return process.returncode


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL after 5 seconds."""
    process.terminate()
    try:
        process.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
