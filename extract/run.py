"""`cli extract`: source → plan → decoding processes → teacher → writer thread → store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from console.output import get_logger
from console.progress import PhaseProgress
from extract.addition import addition_task, begin_addition, finish_addition
from extract.config import ConfigError, ExtractConfig
from extract.follow.version import changes_of, follow
from extract.output import complete_store, count_still_bad, extract_lock, prepare_store, work_path
from extract.pipeline import Pipeline
from extract.plan import decode_workers, make_task, open_data, open_teacher
from extract.result import (
    EncodedRows,
    ExtractObserver,
    ExtractResult,
    count_bad,
    note,
    read_measured,
    record_encoded,
    stop_message,
)
from files.writing import check_writable
from processes.stop import StopDeadline, Stopped, StopRequest
from store.create import check_free
from store.errors import DistillError
from store.job import Job, Unit, features_job, units_left
from store.metadata import ZARR_JSON
from store.version import publish_version
from store.writer import StoreWriter

if TYPE_CHECKING:
    from store.upload import Uploader

log = get_logger("extract")

STOPPED_DRY_RUN = "stopped: a dry run writes nothing"
COMMIT_S = 1.0  # how long a commit may take that a stop waits for


def run_extraction(
    config: ExtractConfig, observers: Sequence[ExtractObserver] = (), stop: StopRequest | None = None
) -> ExtractResult:
    """Encode a data set into a store; a second run with the same options goes on where the first ended.

    Raises:
        Stopped: after SIGINT or SIGTERM (or `stop.set()`), with everything encoded committed.
        DistillError: for everything the user can do something about.
    """
    config = begin_addition(config)
    with StopRequest() if stop is None else nullcontext(stop) as stop:
        if config.dry_run:
            return dry_run(config, stop)
        if config.url is not None:
            from extract.bucket import extract_to_url

            return extract_to_url(config, observers, stop)
        check_writable(config.folder, "--out")
        # With --shard-range a neighbor may be making the store at this moment.
        if not (config.overwrite or config.shards or (config.folder / ZARR_JSON).exists()):
            check_free(config.folder)
        with open_executor(config, observers, stop) as executor:
            config = executor.config
            result = ExtractResult(store=config.out if config.base is None else str(config.folder))
            if (config.folder / ZARR_JSON).exists() and not config.overwrite:
                with extract_lock(config.folder):
                    publish_version(
                        config.folder
                    )  # finish a switch that was killed: without it the store is incomplete
            executor.plan()
            more = True
            while more:  # a second time for the rows that a data set that has changed since needs
                executor.encode(result)
                complete = complete_store(work_path(config.folder), own_all=config.shards is None)
                more = complete and config.base is None and executor.follow(result)
        if config.base is not None and complete:
            finish_addition(config)
            result.store = config.out
        result.read_store()
        if config.logits != "none" and result.complete:
            from extract.logits import add_logits

            result.probe = add_logits(config, observers, stop)
        return result


def extract_and_measure(config: ExtractConfig) -> ExtractResult:
    """`run_extraction` with a progress display; the time that it took stays with the store.

    Raises: as `run_extraction`.
    """
    with PhaseProgress() as progress, ExtractionClock(config.folder) as timer:
        return run_extraction(config, [progress, timer])


class ExtractionClock:
    """An observer of the extraction that adds its time and its images to the record while it runs.

    So a run that is stopped or killed counts too, but for what it did since the last record (`every_s` seconds).
    """

    def __init__(self, store: Path, every_s: float = 10.0) -> None:
        self.store, self.every_s = store, every_s
        self.last: tuple[int, int, float] | None = None  # images done, images in all, when
        self.seconds, self.encoded = 0.0, 0  # not recorded yet

    def progress(self, done: int, total: int, message: str) -> None:
        if message != "encoding":
            return
        now = time.monotonic()
        # Otherwise another job begins, with images that came later; what it starts with was done before.
        if self.last is not None and self.last[1] == total and self.last[0] <= done:
            self.seconds += now - self.last[2]
            self.encoded += done - self.last[0]
        self.last = done, total, now
        if self.seconds >= self.every_s or done >= total:
            self.record()

    def record(self) -> None:
        """Add what is not recorded yet: other processes may be encoding other parts of the store."""
        # The staging store of a bucket is gone when it is complete.
        if not self.encoded or not self.store.exists():
            return
        before = read_measured(self.store)
        note(
            self.store,
            extraction_s=float(before.get("extraction_s", 0.0)) + self.seconds,
            encoded=int(before.get("encoded", 0)) + self.encoded,
        )
        self.seconds, self.encoded = 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # An extraction that ends with an error, of a full disk for one, must end with that one.
        with contextlib.suppress(*((OSError, DistillError) if kind else ())):
            self.record()


def dry_run(config: ExtractConfig, stop: StopRequest) -> ExtractResult:
    """Sizes and times alone; nothing is written. Raises Stopped."""
    from extract.estimate import estimate

    with StopDeadline(stop, lambda: STOPPED_DRY_RUN):
        result = estimate(config)
    if stop.requested:
        raise Stopped(STOPPED_DRY_RUN, stop.exit_code)
    return result


class Executor(Protocol):
    """What fills the store: this process (`LocalExecutor`), or the workers of a cluster (extract/cluster.py).

    uploader: of a store at a URL: another shard is begun only when there is room for it.
    """

    config: ExtractConfig
    observers: Sequence[ExtractObserver]
    stop: StopRequest
    uploader: Uploader | None

    def plan(self) -> None:
        """Make the store with its plan of rows, or check the one that exists."""

    def encode(self, result: ExtractResult) -> None:
        """Encode what is missing of the unfinished job, if there is one, and count it in `result`."""

    def follow(self, result: ExtractResult) -> bool:
        """Bring the complete store to what the data set is now. True when rows are to be encoded for that first."""

    def raise_if_stopped(self) -> None:
        """Raises Stopped when a signal came."""


@contextlib.contextmanager
def open_executor(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> Iterator[Executor]:
    if config.scheduler is not None or len(config.devices) > 1:
        from extract.cluster import open_cluster

        with open_cluster(config, observers, stop) as executor:
            yield executor
    else:
        with StopDeadline(stop, lambda: stop_message(config)) as deadline:
            yield LocalExecutor(config, observers, stop, deadline)


# -- one device, in this process ------------------------------------------------------------------------


class LocalExecutor:
    """One device in this process, for the whole extraction or the shards of `--shard-range`."""

    def __init__(
        self,
        config: ExtractConfig,
        observers: Sequence[ExtractObserver],
        stop: StopRequest,
        deadline: StopDeadline,
    ) -> None:
        self.config, self.observers, self.stop, self.deadline = config, observers, stop, deadline
        self.uploader: Uploader | None = None

    def plan(self) -> None:
        source = open_data(self.config)
        self.raise_if_stopped()
        self.teacher = open_teacher(self.config)
        self.raise_if_stopped()
        self.data = addition_task(self.config, make_task(self.config, source, self.teacher))
        self.task = prepare_store(self.config, self.data, self.teacher)

    def encode(self, result: ExtractResult) -> None:
        job = features_job(self.task.path)
        if job is None:
            return
        self.encoded = EncodedRows()
        self.first_batch_at: float | None = None
        self.done, bad = count_still_bad(self.task, job)
        self.bad = bad + self.task.reused_bad
        self.total = sum(end - first for _, first, end in job.units())
        self.tell()
        self.check_bad()  # of an earlier run: there may be no batch left to check after
        with Pipeline(self.task, self.teacher, job.batch_rows, decode_workers(self.config)) as pipeline:

            def commit_in_time() -> str:
                """The last resort of a stop: commit what the teacher has encoded, end the decoders."""
                pipeline.give_up(COMMIT_S)
                return stop_message(self.config)

            self.deadline.save = commit_in_time
            started = time.monotonic()
            try:
                for split, first, end in ranges_left(self.config, self.task.path, job):
                    writer = StoreWriter(
                        self.task.path,
                        split,
                        (first, end),
                        break_lock=self.config.break_lock,
                        wait_for_room=self.wait_for_room,
                    )
                    pipeline.encode(writer, self.encoded, self.stop, self.after_batch)
                    self.check_bad()
                    self.raise_if_stopped()
            finally:
                self.deadline.save = lambda: stop_message(self.config)
                record_encoded(self.config.folder, self.encoded)
        result.seconds += time.monotonic() - started
        result.startup_seconds += (self.first_batch_at or started) - started
        result.add(self.encoded)

    def after_batch(self, rows: int) -> None:
        self.first_batch_at = self.first_batch_at or time.monotonic()
        self.done += rows
        self.tell()
        self.check_bad()
        if self.uploader is not None:
            self.uploader.check()

    def wait_for_room(self) -> None:
        """Before each shard. Raises what an upload raised."""
        if self.uploader is not None:
            self.uploader.wait_for_room(lambda: self.stop.requested)

    def check_bad(self) -> None:
        count_bad(self.config, self.bad, self.encoded.bad, self.total + self.task.reused)

    def follow(self, result: ExtractResult) -> bool:
        if self.config.shards is not None:
            # The numbers of `--shard-range` are those of the shards that were planned first.
            changes = changes_of(self.config, self.data)
            if changes.any:
                log.warning(
                    "%s: the data set has changed: %s. Run the same command without --shard-range: the store follows it",
                    self.config.out,
                    changes.describe(),
                )
            return False
        planned, changes = follow(self.config, self.data, self.raise_if_stopped)
        result.note_changes(changes.summary())
        self.task = planned or self.task
        return planned is not None

    def raise_if_stopped(self) -> None:
        """Raises Stopped when a signal came."""
        if self.stop.requested:
            raise Stopped(stop_message(self.config), self.stop.exit_code)

    def tell(self) -> None:
        for observer in self.observers:
            observer.progress(self.done, self.total, "encoding")


def ranges_left(config: ExtractConfig, path: Path, job: Job) -> list[Unit]:
    """What this process is to encode: its shards that are not published yet, neighbors of one split as one range.

    So the pipeline is drained once a split. A published shard between two others must not be in a range: the writer
    would write all after the first unfinished one.

    Raises:
        ConfigError: when `--shard-range` begins beyond the last shard.
    """
    units = job.units()
    if config.shards is not None:
        first, end = config.shards
        if first >= len(units):
            raise ConfigError(
                f"--shard-range {config.shard_range}: the plan has {len(units)} shards, 0:{len(units)}"
            )
        units = units[first:end]
    ranges: list[Unit] = []
    left = set(units_left(path, job))
    for split, first, end in units:
        if (split, first, end) not in left:
            continue
        if ranges and (ranges[-1][0], ranges[-1][2]) == (split, first):
            ranges[-1] = (split, ranges[-1][1], end)
        else:
            ranges.append((split, first, end))
    return ranges
