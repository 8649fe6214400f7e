"""Extraction by many processes: several devices of this machine, or the workers of a dask scheduler.

One shard of the plan is one task. A worker keeps the data set's listing, the teacher and its decoders between
tasks; a worker that is lost loses its shard's uncommitted rows, and dask gives the shard to another one.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from console.log import configure_logging, get_logger
from console.stop import Stopped, StopRequest
from extract.config import ExtractConfig
from extract.follow.version import rows_task, work_path
from extract.plan import ExtractTask, make_task
from extract.prepare import (
    count_still_bad,
    decode_workers,
    follow_data,
    open_data,
    open_teacher,
    prepare_store,
    record_halving,
    use_threads,
)
from extract.result import BadSample, ExtractObserver, ExtractResult, append_ledger, count_bad, stop_message
from extract.resume import FOLDER, Unit, adopt_rows, count_committed, job_of, list_units, planned_keys
from extract.session import Session
from extract.teachers import Teacher
from processes.dask_cluster import ClusterStartError, connect, local_cluster
from processes.deadline import StopDeadline
from processes.ending import block_stop_signals
from store.errors import DistillError, LockedError
from store.writer import StoreWriter

if TYPE_CHECKING:
    from distributed import Client, Future


log = get_logger("extract")

STOP_FILE = "stop"
POLL_S = 0.5
PROGRESS_S = 2.0
STOP_S = 1.5  # how long workers may take to commit when a stop is requested
ORDERLY_S = 2.3  # the same, and to end the workers of this machine; after that they end with this process
GPU = "GPU"
LOCK_WAIT_S = 300.0  # longer than the store takes to call a lost worker's lock stale


# -- on the workers: prepare the store, encode one shard, plan new images --------------------------------


class UnitReport(NamedTuple):
    """What one task did."""

    rows: int
    bad: list[BadSample]
    halved: list[int]


class FollowReport(NamedTuple):
    """Whether there are rows to encode, and what changed in the data set (None: nothing)."""

    more: bool
    counts: dict[str, int] | None
    text: str


class FileStop(StopRequest):
    """A stop request by a file, which all machines see."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.looked = file, 0.0

    @property
    def requested(self) -> bool:
        if time.monotonic() - self.looked > POLL_S:
            self.looked = time.monotonic()
            if self.file.exists():
                self.set()
        return self.event.is_set()


class WorkerState:
    """What a worker process keeps between tasks. One task at a time: a device has no room for two teachers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.options: dict[str, Any] | None = None
        self.teacher: Teacher | None = None
        self.task: ExtractTask | None = None
        self.session: Session | None = None

    def open(self, options: dict[str, Any]) -> tuple[ExtractConfig, ExtractTask, Teacher]:
        """Data set and teacher of these options, from the last task where possible."""
        config = ExtractConfig(**options)
        config = config.model_copy(update={"device": own_device(config), "scheduler": None})
        if self.options != options or self.task is None or self.teacher is None:
            configure_logging(logging.WARNING)
            self.close()
            self.teacher = open_teacher(config)
            self.task = make_task(config, open_data(config), self.teacher)
            self.options = options
        return config, self.task, self.teacher

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = self.task = self.teacher = self.options = None


STATE = WorkerState()


def own_device(config: ExtractConfig) -> str:
    """The device of this worker: that of its number among the local workers, else the only one."""
    from distributed import get_worker

    name = get_worker().name
    return config.devices[int(name) % len(config.devices)] if isinstance(name, int) else config.devices[0]


def prepare_on_worker(options: dict[str, Any]) -> None:
    """Make or check the store: a worker has the device that its scales need."""
    with STATE.lock:
        config, task, teacher = STATE.open(options)
        prepare_store(config, task, teacher)
        STATE.options = {**options, "overwrite": False}


def count_bad_on_worker(options: dict[str, Any]) -> tuple[int, int]:
    """Bad rows so far, and rows that the store keeps beside those that are being encoded."""
    with STATE.lock:
        config, task, _ = STATE.open(options)
        planned = planned_rows(config, task)
        job = job_of(planned.path)
        return planned.reused_bad + (count_still_bad(planned, job)[1] if job else 0), planned.reused


def follow_on_worker(options: dict[str, Any]) -> FollowReport:
    """Bring a complete store to what the data set is now, or plan the rows that must be encoded first."""
    with STATE.lock:
        config, task, _ = STATE.open(options)
        planned, changes = follow_data(config, task)
        counts = changes.counts.as_dict() if changes.any else None
        return FollowReport(planned is not None, counts, changes.describe() if changes.any else "")


def encode_unit(options: dict[str, Any], unit: Unit, share: int) -> UnitReport:
    """Encode one shard; waits for a lock that a lost worker has left. share: workers that use this machine's cores."""
    with STATE.lock:
        config, task, teacher = STATE.open(options)
        job, stop = job_of(work_path(config.out)), FileStop(config.out / FOLDER / STOP_FILE)
        if job is None or stop.requested:
            return UnitReport(0, [], [])
        session = worker_session(config, task, teacher, job.batch_rows, share)
        report = session.report
        rows, bad, halved = report.rows, len(report.bad), len(report.halved)
        session.encode(open_writer(config, unit), stop)
        return UnitReport(report.rows - rows, report.bad[bad:], report.halved[halved:])


def release(options: dict[str, Any]) -> None:
    """Give back what this worker keeps of the extraction with these options, unless it is at work."""
    if STATE.lock.acquire(blocking=False):
        try:
            if STATE.options == options:
                STATE.close()
        finally:
            STATE.lock.release()


def worker_session(
    config: ExtractConfig, task: ExtractTask, teacher: Teacher, batch_rows: int, share: int
) -> Session:
    """The worker's session over the planned rows; another one when other rows were planned."""
    path = work_path(config.out)
    planned = sum(len(keys) for keys in planned_keys(path).values())
    old = STATE.session
    if old is None or old.task.path != path or old.task.rows != planned:
        if old is not None:
            old.close()
        use_threads(config.out, teacher)
        workers = decode_workers(config, share)
        STATE.session = Session(planned_rows(config, task), teacher, batch_rows, workers)
    assert STATE.session is not None
    return STATE.session


def planned_rows(config: ExtractConfig, task: ExtractTask) -> ExtractTask:
    """The task of the rows that are planned and not complete."""
    return rows_task(task) if work_path(config.out) != config.out else adopt_rows(task, config.out)


def open_writer(config: ExtractConfig, unit: Unit) -> StoreWriter:
    """The shard's writer. A lost worker of another machine leaves a lock that takes minutes to go stale.

    Raises:
        LockedError: when somebody else is really writing it.
    """
    split, first, end = unit
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return StoreWriter(work_path(config.out), split, (first, end), break_lock=config.break_lock)
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(5)


# -- on the coordinator ----------------------------------------------------------------------------------


class ClusterError(DistillError):
    """The scheduler cannot be reached, or its workers keep dying."""


@contextmanager
def open_cluster(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> Iterator[ClusterExecutor]:
    """The workers of `config.scheduler`, or one process for each device here.

    Raises:
        ClusterError, Stopped, and what the tasks raise. TeacherError: a device that is not there.
    """
    config = absolute(config)
    if config.scheduler is None:
        check_devices(config)  # before a process for each is started, not when the last one gets its shard
    with (
        StopDeadline(stop, lambda: stop_message(config), orderly_s=ORDERLY_S),
        cluster_client(config) as client,
    ):
        executor = ClusterExecutor(config, client, observers, stop)
        try:
            yield executor
        finally:
            executor.release()


def check_devices(config: ExtractConfig) -> None:
    """Raises TeacherError when one of the devices is not there."""
    from extract.teachers.devices import pick_device

    for device in config.devices:
        pick_device(device)


def absolute(config: ExtractConfig) -> ExtractConfig:
    """The configuration with paths that mean the same in every process of this or another machine."""
    changes: dict[str, Any] = {"out": config.out.absolute()}
    if Path(config.data).exists():
        changes["data"] = str(Path(config.data).absolute())
    if config.teacher_path is not None and Path(config.teacher_path).exists():
        changes["teacher_path"] = str(Path(config.teacher_path).absolute())
    changes["split"] = {
        name: str(Path(path).absolute()) if Path(path).exists() else path
        for name, path in config.split.items()
    }
    return config.model_copy(update=changes)


@contextmanager
def cluster_client(config: ExtractConfig) -> Iterator[Client]:
    """A client of the given scheduler, or of a cluster of one process for each device."""
    try:
        if config.scheduler is not None:
            with connect(config.scheduler) as client:
                yield client
        else:
            # Signals are for this process alone: workers commit when it tells them to.
            with local_cluster([{}] * len(config.devices), block_stop_signals()) as client:
                yield client
    except ClusterStartError as error:
        what = f"scheduler {config.scheduler} does not answer" if config.scheduler else "no worker processes"
        raise ClusterError(f"{what}: {error}") from None


class ClusterExecutor:
    """Hands shards to workers, counts bad images, and stops them all."""

    def __init__(
        self, config: ExtractConfig, client: Client, observers: Sequence[ExtractObserver], stop: StopRequest
    ) -> None:
        self.config, self.client, self.observers, self.stop = config, client, observers, stop
        self.options = config.model_dump(mode="json")
        self.run_id = uuid.uuid4().hex[:8]
        self.resources = {GPU: 1} if self.has_gpu_resource() else {}
        self.stop_file = config.out / FOLDER / STOP_FILE
        self.share = self.workers_per_host()
        self.planned = False
        self.bad = self.reused = 0

    def has_gpu_resource(self) -> bool:
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return any(GPU in worker.get("resources", {}) for worker in workers)

    def workers_per_host(self) -> int:
        """The most workers that one machine has: they share its cores for decoding."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        hosts = Counter(str(worker.get("host", address)) for address, worker in workers.items())
        return max(hosts.values(), default=1)

    def plan(self) -> None:
        self.result_of(self.submit("prepare", prepare_on_worker, self.options))
        # Options such as --overwrite have done their work; the shards' tasks must not repeat it.
        self.options, self.planned = {**self.options, "overwrite": False}, True
        self.stop_file.unlink(missing_ok=True)

    def follow(self, result: ExtractResult) -> bool:
        report: FollowReport = self.result_of(self.submit("follow", follow_on_worker, self.options))
        if report.counts is not None:
            result.changes, result.changes_text = report.counts, report.text
        return report.more

    def release(self) -> None:
        """Workers of a scheduler live on: without this they would keep the teacher, buffers and decoders."""
        if self.planned:
            self.client.run(release, self.options, on_error="ignore")

    def submit(self, name: str, function: Any, *arguments: Any) -> Future:
        return self.client.submit(
            function,
            *arguments,
            key=f"extract-{name}-{self.run_id}-{uuid.uuid4().hex[:6]}",
            pure=False,
            resources=self.resources,
        )

    def encode(self, result: ExtractResult) -> None:
        path = work_path(self.config.out)
        job = job_of(path)
        if job is None:
            return
        done = count_committed(path, job)[0]
        self.bad, self.reused = self.result_of(self.submit("bad", count_bad_on_worker, self.options))
        units = list_units(job)
        self.total = sum(end - first for _, first, end in units)
        self.tell(done)
        started = time.monotonic()
        futures = {
            self.submit(f"{unit[0]}-{unit[1]}", encode_unit, self.options, unit, self.share): unit
            for unit in units
        }
        for report in self.reports(futures):
            result.add(report.rows, 0.0, report.halved)
            self.count_bad(report)
        result.add(0, time.monotonic() - started, [])

    def reports(self, futures: dict[Future, Unit]) -> Iterator[UnitReport]:
        """Reports of the tasks as they end. On a stop or an error the workers commit and end, too."""
        reported = time.monotonic()
        waiting = dict(futures)
        try:
            while waiting:
                if self.stop.requested:
                    raise Stopped("", self.stop.exit_code)
                for future in self.finished(waiting):
                    del waiting[future]
                    yield self.result_of(future)
                if time.monotonic() - reported >= PROGRESS_S:
                    reported = time.monotonic()
                    self.tell_committed()
        except BaseException:
            self.stop_workers(list(waiting))
            if self.stop.requested:
                raise Stopped(stop_message(self.config), self.stop.exit_code) from None
            raise
        self.tell(self.total)

    def finished(self, waiting: dict[Future, Unit]) -> list[Future]:
        """Those of the tasks that have ended; when there are none, after a moment."""
        ended = [future for future in waiting if future.done()]
        if not ended:
            self.stop.wait(POLL_S / 5)
        return ended

    def result_of(self, future: Future) -> Any:
        """A task's result; a worker that dies again and again becomes a readable error."""
        from distributed import KilledWorker

        while not future.done():
            if self.stop.requested:
                raise Stopped(stop_message(self.config), self.stop.exit_code)
            self.stop.wait(0.05)
        try:
            return future.result()
        except KilledWorker as error:
            raise ClusterError(
                f"a shard ended several workers ({error.last_worker.address}): out of memory? "
                "Try a smaller --batch-size; running the same command again goes on"
            ) from None

    def stop_workers(self, futures: list[Future]) -> None:
        """Ask all workers to commit what they have, and give them a moment for it.

        The stop file stays for a worker that is still in its batch then; the next run removes it.
        """
        self.stop_file.touch()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and not all(future.done() for future in futures):
            time.sleep(POLL_S / 10)
        self.client.cancel([future for future in futures if not future.done()])

    def count_bad(self, report: UnitReport) -> None:
        append_ledger(self.config.out, report.bad)
        record_halving(self.config.out, report.halved)
        self.bad = count_bad(self.config, self.bad, report.bad, self.total + self.reused)

    def tell_committed(self) -> None:
        path = work_path(self.config.out)
        job = job_of(path)
        if job is not None:
            self.tell(count_committed(path, job)[0])

    def tell(self, done: int) -> None:
        for observer in self.observers:
            observer.progress(done, self.total, "encoding")
