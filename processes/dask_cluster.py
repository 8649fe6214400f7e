"""Clients of dask clusters: a scheduler that is already running, or worker processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from processes.children import hide_main_module

if TYPE_CHECKING:
    from distributed import Client

#: Seconds that a local cluster gets to close; its processes end with this one in any case.
CLOSE_S = 10.0
# For worker processes, which read it from the environment, and only where the user chose nothing else:
WORKER_ENVIRONMENT = {
    # Their starts and ends are nothing the user can act on.
    "DASK_LOGGING__DISTRIBUTED": "error",
    # Workers would ask the driver for figures of the GPU, which nothing here uses and not every driver answers.
    "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False",
    # The tracker gives back what processes leave that were killed; that it had to is nothing the user can act on.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}
# What dask's nannies set in the environment of their workers.
NANNY_ENVIRONMENT = "distributed.nanny.pre-spawn-environ"
# One of it: glibc then returns the memory of every tensor of 128 KB or more to the kernel as soon as it is freed, and the
# next one faults each page in again. It is meant for workers that hold tables; a training takes up to twice as long.
ALLOCATOR_VARIABLE = "MALLOC_TRIM_THRESHOLD_"


class ClusterStartError(Exception):
    """The scheduler does not answer, or worker processes cannot be started; the text is one line, the bare reason."""


@contextmanager
def connect(address: str, timeout_s: float = 20.0) -> Iterator[Client]:
    """A client of the scheduler at `address`.

    Raises:
        ClusterStartError: when it does not answer.
    """
    with worker_environment():
        from distributed import Client

        try:
            client = Client(address, timeout=timeout_s, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterStartError(" ".join(str(error).split())) from None
        with client:
            yield client


@contextmanager
def local_cluster(
    workers: Sequence[Mapping[str, Any]], signals: AbstractContextManager[None]
) -> Iterator[Client]:
    """A client of a cluster of this machine: one process with one thread for each of `workers`.

    Each entry holds further options of `distributed.Nanny` (`env`, `resources`). `signals` is entered while processes
    start, and decides which signals they get (`processes.children`).

    Raises:
        ClusterStartError: when a worker cannot be started.
    """
    with worker_environment():
        import dask
        from distributed import Client, Nanny, Scheduler, SpecCluster

        # Without a host, scheduler and workers listen on every network of the machine.
        here = {"host": "127.0.0.1", "dashboard": False}
        options = {**here, "nthreads": 1, "memory_limit": 0}
        nannies = {
            index: {"cls": Nanny, "options": {**options, **worker}} for index, worker in enumerate(workers)
        }
        causes: list[str] = []
        try:
            settings = {
                "distributed.worker.daemon": False,  # daemonic workers could not start processes of their own
                f"{NANNY_ENVIRONMENT}.{ALLOCATOR_VARIABLE}": None,  # not set
            }
            with (
                dask.config.set(settings),
                signals,
                hide_main_module(),
                nanny_errors(causes),
            ):
                cluster = SpecCluster(
                    workers=nannies,
                    # Its HTTP server starts in any case: on a free port, or it warns where 8787 is in use.
                    scheduler={
                        "cls": Scheduler,
                        "options": {**here, "port": 0, "dashboard_address": "127.0.0.1:0"},
                    },
                    silence_logs=logging.CRITICAL,
                )
                client = Client(cluster, set_as_default=False)
        except RuntimeError as error:
            raise ClusterStartError((causes or [one_line(error)])[-1]) from error
        try:
            yield client
        finally:
            for part in (client, cluster):
                with contextlib.suppress(TimeoutError):
                    part.close(timeout=CLOSE_S)


def worker_slots(client: Client) -> tuple[dict[str, float], int]:
    """(what a piece of work takes of a worker, how many run at a time): a `GPU` or a `trial` where workers offer them,
    else one of their threads; 0 where there are no workers.
    """
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    for name in ("GPU", "trial"):
        offered = int(sum(worker.get("resources", {}).get(name, 0) for worker in workers.values()))
        if offered:
            return {name: 1}, offered
    return {}, sum(worker["nthreads"] for worker in workers.values())


def dask_defaults() -> dict[str, str]:
    """What dask sets in the environment of its workers where the user set nothing."""
    import dask
    import distributed  # noqa: F401  its defaults become part of dask's configuration

    values: dict[str, Any] = dask.config.get(NANNY_ENVIRONMENT, {})
    return {name: str(value) for name, value in values.items() if value is not None}


def unset_allocator_variable() -> None:
    """For a worker that someone else started, before it starts a training: see ALLOCATOR_VARIABLE.

    A value that is not dask's own is the user's, and stays.
    """
    value = os.environ.get(ALLOCATOR_VARIABLE)
    if value is not None and value == dask_defaults().get(ALLOCATOR_VARIABLE):
        del os.environ[ALLOCATOR_VARIABLE]


@contextmanager
def worker_environment() -> Iterator[None]:
    """WORKER_ENVIRONMENT in this process's environment, for the processes that start meanwhile and for dask's import."""
    missing = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def nanny_errors(found: list[str]) -> Iterator[None]:
    """Collect what dask's nannies log as errors, a line each: the exceptions they raise have no cause."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else None
            found.append(one_line(cause) if cause is not None else record.getMessage())

    nanny, handler = logging.getLogger("distributed.nanny"), Collector()
    before = nanny.level, nanny.propagate
    nanny.addHandler(handler)
    nanny.setLevel(logging.ERROR)
    nanny.propagate = False
    try:
        yield
    finally:
        nanny.removeHandler(handler)
        nanny.setLevel(before[0])
        nanny.propagate = before[1]


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
