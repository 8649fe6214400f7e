"""Several GPUs through ultralytics' own DDP launcher: tested with two CPU processes, UNTESTED on GPUs.

The launcher starts one process a GPU, each of which builds its own `StoreTrainer`. What a rank needs is in the run
folder: config.json, and last.pt when it is resumed. Rank 0 writes what a single process would write, with the events,
which the launching process follows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from console.progress import Progress, track_progress
from processes.stop import StopDeadline, Stopped
from store.reader import open_store
from train.config import TrainConfig
from train.errors import TrainError
from train.events import EpochEnded, EventStream, follow
from train.run_folder import RunFolder, read_json, write_json
from train.yolo.fit import epoch_line, stopped_message
from train.yolo.job import TrainingJob

# What rank 0 leaves for summary.json (`train.yolo.recorder.ending_of`).
ENDING = ".ending-of-rank-0.json"
# The address as it was given: config.json leaves out passwords.
STORE_ADDRESS = "QWEN_DISTILL_STORE_ADDRESS"


def job_of_rank(run: Path) -> TrainingJob:
    """The job that the launching process described in `run`/config.json."""
    from ultralytics.utils import RANK

    from train.students.offline import prepare_ultralytics
    from train.yolo.job import build_job
    from train.yolo.recorder import Recorder, best_epoch_of, describe_run, ending_of, resume_state

    prepare_ultralytics()
    options = RunFolder(run).read_config()["options"]
    options["store"] = os.environ.get(STORE_ADDRESS, options["store"])
    config = TrainConfig(**options)
    state = resume_state(run)
    job = build_job(config, run, open_store(config.store), state)
    if RANK in (-1, 0):
        first_epoch = 0 if state is None else state["epoch"] + 1
        events = EventStream()
        events.start(RunFolder(run))
        recorder = Recorder(run, config, describe_run(job), events, first_epoch, best_epoch_of(state))
        save_before_termination(recorder)
        job.epoch_finished = recorder.epoch_finished

        def training_finished(trainer: Any) -> None:
            recorder.close()
            write_json(run / ENDING, ending_of(trainer))

        job.training_finished = training_finished
    return job


def save_before_termination(recorder: Any) -> None:
    """Rank 0 has the last finished epoch on disk before SIGTERM, which the launcher passes on, ends it."""

    def terminate(number: int, frame: Any) -> None:
        recorder.save_latest()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)


@contextmanager
def address_for_ranks(store: str) -> Iterator[None]:
    """Inside, processes started from here read the store's address, which may hold a secret, from the environment."""
    os.environ[STORE_ADDRESS] = store
    try:
        yield
    finally:
        del os.environ[STORE_ADDRESS]


@contextmanager
def following_rank(events: EventStream, progress: Progress, job: TrainingJob) -> Iterator[None]:
    """Inside, a thread passes the events of rank 0 on; at the end all are passed on."""
    assert events.file is not None
    ended, position = threading.Event(), events.file.stat().st_size if events.file.exists() else 0

    def pass_on() -> None:
        for event in follow(file, ended, position):
            if isinstance(event, EpochEnded):
                progress.advance(job.batches_per_epoch)
                progress.note(epoch_line(event.record, job.config.epochs, len(job.splits["val"].records)))
            events.pass_on(event)

    file = events.file
    thread = threading.Thread(target=pass_on, name="events-of-ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def train_on_ranks(
    trainer: Any,
    watch: StopDeadline,
    events: EventStream,
    first_epoch: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let ultralytics start the ranks and wait for them; returns the records of all epochs and `ending_of` rank 0.

    Raises TrainError when a rank failed, Stopped after a
    signal, which ends the ranks as well.
    """
    job = trainer.job
    (job.run / ENDING).unlink(missing_ok=True)
    total, done = job.config.epochs * job.batches_per_epoch, first_epoch * job.batches_per_epoch

    def end_ranks() -> str:
        for child in psutil.Process().children():  # the launcher, which ends its ranks
            child.terminate()
        return stopped_message(job.run)

    watch.save = end_ranks
    with track_progress(total, f"training {job.run.name}", "batches", done) as progress:
        try:
            with address_for_ranks(job.config.store), following_rank(events, progress, job):
                trainer.train()
        except subprocess.CalledProcessError as error:
            if watch.stop.requested:
                raise Stopped(stopped_message(job.run), watch.stop.exit_code) from error
            raise TrainError(
                f"a process of ultralytics' DDP launcher failed (exit code {error.returncode}): its own error stands "
                "above; --resume continues after the last finished epoch"
            ) from error
    ending = read_json(job.run / ENDING)
    (job.run / ENDING).unlink(missing_ok=True)
    if ending is None:
        raise TrainError(
            f"{job.run}: ultralytics' DDP launcher ended, but rank 0 did not finish the training"
        )
    return RunFolder(job.run).read_records(), ending
