"""Extraction by many processes: several devices of this machine, or the workers of a dask scheduler.

One shard of the plan is one task. A worker keeps the data set's listing, the teacher and its decoders between
tasks; a worker that is lost loses its shard's uncommitted rows, and dask gives the shard to another one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.output import configure_logging, get_logger
from extract.addition import addition_task
from extract.config import ExtractConfig
from extract.follow.version import follow
from extract.output import count_still_bad, planned_rows, prepare_store, use_threads, work_path
from extract.pipeline import Pipeline
from extract.plan import ExtractTask, decode_workers, make_task, open_data, open_teacher, planned_keys
from extract.result import (
    EncodedRows,
    ExtractObserver,
    ExtractResult,
    count_bad,
    record_encoded,
    stop_message,
)
from extract.teachers import Teacher
from processes.children import block_stop_signals
from processes.dask_cluster import ClusterStartError, connect, local_cluster
from processes.stop import StopDeadline, Stopped, StopRequest
from store.errors import DistillError, LockedError
from store.format import NOTES_FOLDER
from store.job import Unit, count_committed, features_job, units_left
from store.writer import StoreWriter

if TYPE_CHECKING:
    from distributed import Client, Future

    from store.upload import Uploader

log = get_logger("extract")

STOP_FILE = "stop"
POLL_S = 0.5
PROGRESS_S = 2.0
STOP_S = 1.5  # how long workers may take to commit when a stop is requested
ORDERLY_S = 2.3  # the same, and to end the workers of this machine; after that they end with this process
GPU = "GPU"
LOCK_WAIT_S = 300.0  # longer than the store takes to call a lost worker's lock stale


# -- on the workers: prepare the store, encode one shard, plan new images --------------------------------


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
        self.pipeline: Pipeline | None = None

    def open(
        self, options: dict[str, Any], *, check: bool = False
    ) -> tuple[ExtractConfig, ExtractTask, Teacher]:
        """Data set and teacher of these options, from the last task where possible.

        check: whether the images must be shown to be those of the store that a teacher is added to.
        """
        config = ExtractConfig(**options)
        config = config.model_copy(update={"device": own_device(config), "scheduler": None})
        if self.options != options or self.task is None or self.teacher is None:
            configure_logging(logging.WARNING)
            self.close()
            self.teacher = open_teacher(config)
            task = make_task(config, open_data(config), self.teacher)
            self.task = addition_task(config, task, check=check)
            self.options = options
        return config, self.task, self.teacher

    def close(self) -> None:
        if self.pipeline is not None:
            self.pipeline.close()
        self.pipeline = self.task = self.teacher = self.options = None


STATE = WorkerState()


def own_device(config: ExtractConfig) -> str:
    """The device of this worker: that of its number among the local workers, else the only one."""
    from distributed import get_worker

    name = get_worker().name
    return config.devices[int(name) % len(config.devices)] if isinstance(name, int) else config.devices[0]


def prepare_on_worker(options: dict[str, Any]) -> None:
    """Make or check the store: a worker has the device that its scales need."""
    with STATE.lock:
        config, task, teacher = STATE.open(options, check=True)
        prepare_store(config, task, teacher)
        STATE.options = {**options, "overwrite": False}


def count_bad_on_worker(options: dict[str, Any]) -> tuple[int, int]:
    """Bad rows so far, and rows that the store keeps beside those that are being encoded."""
    with STATE.lock:
        _, task, _ = STATE.open(options)
        planned = planned_rows(task)
        job = features_job(planned.path)
        return planned.reused_bad + (count_still_bad(planned, job)[1] if job else 0), planned.reused


def follow_on_worker(options: dict[str, Any]) -> tuple[bool, tuple[dict[str, int], str] | None]:
    """Bring a complete store to what the data set is now, or plan the rows that must be encoded first.

    Returns whether there are any, and `Changes.summary`.
    """
    with STATE.lock:
        config, task, _ = STATE.open(options)
        planned, changes = follow(config, task)
        return planned is not None, changes.summary()


def encode_unit(options: dict[str, Any], unit: Unit, share: int) -> EncodedRows:
    """Encode one shard; waits for a lock that a lost worker has left. share: workers that use this machine's cores."""
    encoded = EncodedRows()
    with STATE.lock:
        config, task, teacher = STATE.open(options)
        path, stop = work_path(config.folder), FileStop(config.folder / NOTES_FOLDER / STOP_FILE)
        job, pipeline = features_job(path), STATE.pipeline
        if job is None or stop.requested:
            return encoded
        rows = sum(len(keys) for keys in planned_keys(path).values())
        if pipeline is None or (pipeline.task.path, pipeline.task.rows) != (path, rows):
            # The first shard of this worker, or the first one after other rows were planned.
            if pipeline is not None:
                pipeline.close()
            use_threads(config.folder, teacher)
            workers = decode_workers(config, share)
            STATE.pipeline = pipeline = Pipeline(planned_rows(task), teacher, job.batch_rows, workers)
        pipeline.encode(open_writer(config, path, unit), encoded, stop)
    return encoded


def release(options: dict[str, Any]) -> None:
    """Give back what this worker keeps of the extraction with these options, unless it is at work."""
    if STATE.lock.acquire(blocking=False):
        try:
            if STATE.options == options:
                STATE.close()
        finally:
            STATE.lock.release()


def open_writer(config: ExtractConfig, path: Path, unit: Unit) -> StoreWriter:
    """The shard's writer. A lost worker of another machine leaves a lock that takes minutes to go stale.

    Raises:
        LockedError: when somebody else is really writing it.
    """
    split, first, end = unit
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return StoreWriter(path, split, (first, end), break_lock=config.break_lock)
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
        from extract.teachers.devices import pick_device

        for device in config.devices:
            pick_device(device)  # before a process for each is started, not when the last one gets its shard
    with (
        StopDeadline(stop, lambda: stop_message(config), orderly_s=ORDERLY_S),
        cluster_client(config) as client,
    ):
        executor = ClusterExecutor(config, client, observers, stop)
        try:
            yield executor
        finally:
            executor.release()


def absolute(config: ExtractConfig) -> ExtractConfig:
    """The configuration with paths that mean the same in every process of this or another machine."""
    changes: dict[str, Any] = {"out": config.url or os.path.abspath(config.out)}
    if config.staging_dir is not None:
        changes["staging_dir"] = config.staging_dir.absolute()
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
        self.stop_file = config.folder / NOTES_FOLDER / STOP_FILE
        workers = client.scheduler_info(n_workers=-1)["workers"]
        has_gpus = any(GPU in worker.get("resources", {}) for worker in workers.values())
        self.resources = {GPU: 1} if has_gpus else {}
        # The most workers that one machine has: they share its cores for decoding.
        hosts = Counter(str(worker.get("host", address)) for address, worker in workers.items())
        self.share = max(hosts.values(), default=1)
        self.planned = False
        self.uploader: Uploader | None = None

    def plan(self) -> None:
        self.result_of(self.submit("prepare", prepare_on_worker, self.options))
        # Options such as --overwrite have done their work; the shards' tasks must not repeat it.
        self.options, self.planned = {**self.options, "overwrite": False}, True
        self.stop_file.unlink(missing_ok=True)

    def follow(self, result: ExtractResult) -> bool:
        more, summary = self.result_of(self.submit("follow", follow_on_worker, self.options))
        result.note_changes(summary)
        return bool(more)

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
        path = work_path(self.config.folder)
        job = features_job(path)
        if job is None:
            return
        bad, reused = self.result_of(self.submit("bad", count_bad_on_worker, self.options))
        self.total = sum(end - first for _, first, end in job.units())
        self.tell(count_committed(path, job))
        bad = count_bad(self.config, bad, [], self.total + reused)  # of an earlier run
        started = time.monotonic()
        for encoded in self.encode_units(units_left(path, job)):
            record_encoded(self.config.folder, encoded)
            bad = count_bad(self.config, bad, encoded.bad, self.total + reused)
            result.add(encoded)
        result.seconds += time.monotonic() - started
        result.add(EncodedRows())

    def encode_units(self, units: Sequence[Unit]) -> Iterator[EncodedRows]:
        """Results of the shards as they end. On a stop or an error the workers commit and end, too."""
        reported = time.monotonic()
        left = deque(units)
        waiting: dict[Future, None] = {}
        try:
            while left or waiting:
                if self.stop.requested:
                    raise Stopped("", self.stop.exit_code)
                while left and self.has_room(len(waiting)):
                    unit = left.popleft()
                    name = f"{unit[0]}-{unit[1]}"
                    waiting[self.submit(name, encode_unit, self.options, unit, self.share)] = None
                ended = [future for future in waiting if future.done()]
                if not ended:
                    self.stop.wait(POLL_S / 5)
                for future in ended:
                    del waiting[future]
                    yield self.result_of(future)
                if time.monotonic() - reported >= PROGRESS_S:
                    reported = time.monotonic()
                    path = work_path(self.config.folder)
                    if (job := features_job(path)) is not None:
                        self.tell(count_committed(path, job))
        except BaseException:
            self.stop_workers(list(waiting))
            if self.stop.requested:
                raise Stopped(stop_message(self.config), self.stop.exit_code) from None
            raise
        self.tell(self.total)

    def has_room(self, begun: int) -> bool:
        """Whether another shard may be handed out while `begun` are encoded. Raises what an upload raised."""
        if self.uploader is None:
            return True
        self.uploader.check()
        return begun < 2 * len(self.config.devices) and self.uploader.has_room(begun)

    def raise_if_stopped(self) -> None:
        """Raises Stopped when a signal came."""
        if self.stop.requested:
            raise Stopped(stop_message(self.config), self.stop.exit_code)

    def result_of(self, future: Future) -> Any:
        """A task's result; a worker that dies again and again becomes a readable error."""
        from distributed import KilledWorker

        while not future.done():
            self.raise_if_stopped()
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

    def tell(self, done: int) -> None:
        for observer in self.observers:
            observer.progress(done, self.total, "encoding")
