"""`cli extract`: source → plan → decoding processes → teacher → writer thread → store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from console.progress import PhaseProgress
from console.stop import Stopped, StopRequest
from extract.config import ConfigError, ExtractConfig
from extract.follow.version import work_path
from extract.metadata import ExtractionClock, note_probe
from extract.plan import make_task
from extract.prepare import (
    count_still_bad,
    decode_workers,
    finalize,
    follow_data,
    open_data,
    open_teacher,
    prepare_store,
    record_halving,
    resume_switch,
    warn_of_changes,
)
from extract.result import ExtractObserver, ExtractResult, append_ledger, count_bad, stop_message
from extract.resume import Unit, job_of, list_units
from extract.session import Session
from files.writing import check_writable
from processes.deadline import StopDeadline
from store.create import check_free
from store.job import Job, log_path, read_commits
from store.metadata import ZARR_JSON
from store.writer import StoreWriter

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
    with own_or(stop) as stop:
        if config.dry_run:
            return dry_run(config, stop)
        check_writable(config.out, "--out")
        # With --shard-range a neighbor may be making the store at this moment.
        if not (config.overwrite or config.shards or (config.out / ZARR_JSON).exists()):
            check_free(config.out)
        with open_executor(config, observers, stop) as executor:
            result = fill_store(executor)
        result.read_store()
        if config.logits != "none" and result.complete:
            from extract.logits import add_logits

            result.probe = add_logits(config, observers, stop)
        return result


def extract_and_measure(config: ExtractConfig) -> ExtractResult:
    """`run_extraction` with a progress display; the time that it took and what a probe found stay with the store.

    Raises: as `run_extraction`.
    """
    with PhaseProgress() as progress, ExtractionClock(config.out) as timer:
        result = run_extraction(config, [progress, timer])
    if result.probe is not None:
        note_probe(config.out, result.probe)
    return result


def dry_run(config: ExtractConfig, stop: StopRequest) -> ExtractResult:
    """Sizes and times alone; nothing is written. Raises Stopped."""
    from extract.estimate import estimate

    with StopDeadline(stop, lambda: STOPPED_DRY_RUN):
        result = estimate(config)
    if stop.requested:
        raise Stopped(STOPPED_DRY_RUN, stop.exit_code)
    return result


@contextmanager
def own_or(stop: StopRequest | None) -> Iterator[StopRequest]:
    """The caller's stop request, or one of our own."""
    if stop is not None:
        yield stop
    else:
        with StopRequest() as own:
            yield own


class Executor(Protocol):
    """What fills the store: this process (`LocalExecutor`), or the workers of a cluster (extract/cluster.py)."""

    config: ExtractConfig

    def plan(self) -> None:
        """Make the store with its plan of rows, or check the one that exists."""

    def encode(self, result: ExtractResult) -> None:
        """Encode what is missing of the unfinished job, if there is one, and count it in `result`."""

    def follow(self, result: ExtractResult) -> bool:
        """Bring the complete store to what the data set is now. True when rows are to be encoded for that first."""


def open_executor(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> AbstractContextManager[Executor]:
    if config.scheduler is not None or len(config.devices) > 1:
        from extract.cluster import open_cluster

        return open_cluster(config, observers, stop)
    return open_local(config, observers, stop)


def fill_store(executor: Executor) -> ExtractResult:
    """Plan, encode, finish; and once more for the rows that a data set that has changed since needs."""
    config = executor.config
    result = ExtractResult(store=str(config.out))
    resume_switch(config)
    executor.plan()
    more = True
    while more:
        executor.encode(result)
        more = finalize(work_path(config.out), own_all=config.shards is None) and executor.follow(result)
    return result


# -- one device, in this process ------------------------------------------------------------------------


@contextmanager
def open_local(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> Iterator[Executor]:
    with StopDeadline(stop, lambda: stop_message(config)) as deadline:
        yield LocalExecutor(config, observers, stop, deadline)


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

    def plan(self) -> None:
        source = open_data(self.config)
        self.raise_if_stopped()
        self.teacher = open_teacher(self.config)
        self.raise_if_stopped()
        self.data = make_task(self.config, source, self.teacher)
        self.task = prepare_store(self.config, self.data, self.teacher)

    def follow(self, result: ExtractResult) -> bool:
        if self.config.shards is not None:
            warn_of_changes(self.config, self.data)
            return False
        planned, changes = follow_data(self.config, self.data, self.raise_if_stopped)
        result.note_changes(changes)
        self.task = planned or self.task
        return planned is not None

    def encode(self, result: ExtractResult) -> None:
        job = job_of(self.task.path)
        if job is None:
            return
        self.first_batch_at: float | None = None
        self.done, self.bad = count_still_bad(self.task, job)
        self.bad += self.task.reused_bad
        self.total = sum(end - first for _, first, end in list_units(job))
        self.tell()
        with Session(self.task, self.teacher, job.batch_rows, decode_workers(self.config)) as session:
            self.session, self.deadline.save = session, partial(commit_in_time, session, self.config)
            started = time.monotonic()
            try:
                self.encode_units(job)
            finally:
                self.deadline.save = partial(stop_message, self.config)
                append_ledger(self.config.out, session.report.bad)
                record_halving(self.config.out, session.report.halved)
        result.add(session.report.rows, time.monotonic() - started, session.report.halved)
        result.startup_seconds += (self.first_batch_at or started) - started

    def encode_units(self, job: Job) -> None:
        units = unfinished_units(self.task.path, job, chosen_units(self.config, job))
        for split, first, end in merge_units(units):
            writer = StoreWriter(self.task.path, split, (first, end), break_lock=self.config.break_lock)
            self.session.encode(writer, self.stop, self.after_batch)
            self.check_bad()
            self.raise_if_stopped()

    def after_batch(self, rows: int) -> None:
        self.first_batch_at = self.first_batch_at or time.monotonic()
        self.done += rows
        self.tell()
        self.check_bad()

    def check_bad(self) -> None:
        count_bad(self.config, self.bad, self.session.report.bad, self.total + self.task.reused)

    def raise_if_stopped(self) -> None:
        """Raises Stopped when a signal came."""
        if self.stop.requested:
            raise Stopped(stop_message(self.config), self.stop.exit_code)

    def tell(self) -> None:
        for observer in self.observers:
            observer.progress(self.done, self.total, "encoding")


def commit_in_time(session: Session, config: ExtractConfig) -> str:
    """The last resort of a stop: commit what the teacher has encoded, end the decoders; the line for the user."""
    session.give_up(COMMIT_S)
    return stop_message(config)


def chosen_units(config: ExtractConfig, job: Job) -> list[Unit]:
    """The shards this run is to encode.

    Raises:
        ConfigError: when `--shard-range` begins beyond the last shard.
    """
    units = list_units(job)
    if config.shards is None:
        return units
    first, end = config.shards
    if first >= len(units):
        raise ConfigError(
            f"--shard-range {config.shard_range}: the plan has {len(units)} shards, 0:{len(units)}"
        )
    return units[first:end]


def unfinished_units(path: Path, job: Job, units: list[Unit]) -> list[Unit]:
    """Those of the shards that are not published yet: a writer over several shards writes all after the first of them."""
    left = []
    for split, first, end in units:
        commits = read_commits(log_path(path, job, split, first // job.shard_rows))
        if not commits or commits[-1].finished is None:
            left.append((split, first, end))
    return left


def merge_units(units: list[Unit]) -> list[Unit]:
    """Neighbouring shards of one split as one range, so that the pipeline is drained once a split."""
    merged: list[Unit] = []
    for split, first, end in units:
        if merged and merged[-1][0] == split and merged[-1][2] == first:
            merged[-1] = (split, merged[-1][1], end)
        else:
            merged.append((split, first, end))
    return merged
