"""What runs on the workers of a cluster: prepare the store, encode one shard, plan new images."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from console.log import configure_logging
from console.stop import StopRequest
from extract.config import ExtractConfig
from extract.follow.version import rows_task, work_path
from extract.inputs import decode_workers, open_data, open_teacher
from extract.plan import ExtractTask, make_task
from extract.prepare import count_still_bad, follow_data, prepare_store, use_threads
from extract.resume import FOLDER, Unit, adopt_rows, job_of, planned_keys
from extract.session import BadSample, Session
from extract.teachers import Teacher
from store.errors import LockedError
from store.writer import StoreWriter

STOP_FILE = "stop"
POLL_S = 0.5
LOCK_WAIT_S = 300.0  # longer than the store takes to call a lost worker's lock stale


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

    def after(self, counts: dict[str, int] | None, text: str) -> FollowReport:
        """This report, with what an earlier one found where this one found nothing."""
        return self if self.counts is not None else FollowReport(self.more, counts, text)


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
