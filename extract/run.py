"""`cli extract`: source → plan → decoding processes → teacher → writer thread → store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from console.stop import Stopped, StopRequest
from extract.config import ExtractConfig
from extract.plan import ExtractTask, make_task
from extract.prepare import (
    chosen_units,
    count_still_bad,
    decode_workers,
    finalize,
    follow_data,
    merge_units,
    open_data,
    open_teacher,
    prepare_store,
    record_halving,
    resume_switch,
    unfinished_units,
    warn_of_changes,
)
from extract.result import ExtractObserver, ExtractResult, append_ledger, check_limit, stop_message
from extract.resume import Unit, job_of, list_units
from extract.session import Session
from extract.sources.base import REMOVED
from extract.teachers import Teacher
from files.writing import check_writable
from processes.deadline import StopDeadline
from store.create import check_free
from store.job import Job
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
        if config.scheduler is not None or len(config.devices) > 1:
            from extract.cluster import run_on_cluster

            result = run_on_cluster(config, observers, stop)
        else:
            result = run_here(config, observers, stop)
        if config.logits != "none" and result.complete:
            from extract.logits import add_logits

            result.probe = add_logits(config, observers, stop)
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


def run_here(config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest) -> ExtractResult:
    """The whole extraction, or its `--shard-range`, in this process on one device."""
    with StopDeadline(stop, lambda: stop_message(config)) as deadline:
        resume_switch(config)
        source = open_data(config)
        raise_if_stopped(config, stop)
        teacher = open_teacher(config)
        raise_if_stopped(config, stop)
        data = make_task(config, source, teacher)
        planned: ExtractTask | None = prepare_store(config, data, teacher)
        result = ExtractResult(store=str(config.out))
        while planned is not None:
            Run(config, planned, teacher, observers, stop, deadline).encode(result)
            complete = finalize(planned.path, own_all=config.shards is None)
            if not complete or config.shards is not None:
                if complete:
                    warn_of_changes(config, data)
                break
            planned, changes = follow_data(config, data, lambda: raise_if_stopped(config, stop))
            result.note_changes(changes)
    return result.read_store()


def raise_if_stopped(config: ExtractConfig, stop: StopRequest) -> None:
    """Raises Stopped when a signal came."""
    if stop.requested:
        raise Stopped(stop_message(config), stop.exit_code)


def commit_in_time(session: Session, config: ExtractConfig) -> str:
    """The last resort of a stop: commit what the teacher has encoded, end the decoders; the line for the user."""
    session.give_up(COMMIT_S)
    return stop_message(config)


class Run:
    """What is missing of one job, encoded on one device."""

    def __init__(
        self,
        config: ExtractConfig,
        task: ExtractTask,
        teacher: Teacher,
        observers: Sequence[ExtractObserver],
        stop: StopRequest,
        deadline: StopDeadline,
    ) -> None:
        self.config, self.task, self.teacher = config, task, teacher
        self.observers, self.stop, self.deadline = observers, stop, deadline
        self.done = self.bad = self.total = 0
        self.first_batch_at: float | None = None

    def encode(self, result: ExtractResult) -> None:
        """Encode the chosen shards of the unfinished job, if there is one, and count it in `result`."""
        job = job_of(self.task.path)
        if job is None:
            return
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
            raise_if_stopped(self.config, self.stop)

    def after_batch(self, rows: int) -> None:
        self.first_batch_at = self.first_batch_at or time.monotonic()
        self.done += rows
        self.tell()
        self.check_bad()

    def check_bad(self) -> None:
        found = [bad for bad in self.session.report.bad if bad.reason != REMOVED]
        last = found[-1] if found else None
        allowed = self.config.allowed_bad(self.total + self.task.reused)
        check_limit(self.bad + len(found), allowed, self.config.max_bad, self.config.out, last)

    def tell(self) -> None:
        for observer in self.observers:
            observer.progress(self.done, self.total, "encoding")


__all__ = ["ExtractObserver", "ExtractResult", "Unit", "run_extraction"]
