"""Several GPUs through ultralytics' own DDP launcher: tested with two CPU processes, UNTESTED on GPUs.

The launcher starts one process a GPU, each of which builds its own `StoreTrainer`. What a rank needs is in the run
folder: config.json, and last.pt when it is resumed. Rank 0 writes what a single process would write, and tells the
launching process what happens through a file of events.
"""

from __future__ import annotations

import json
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
from console.stop import Stopped
from processes.deadline import StopDeadline
from store.reader import open_store
from train.config import TrainConfig
from train.errors import TrainError
from train.events import Observer, SilentObserver
from train.run_folder import RunFolder
from train.yolo.fit import stopped_message
from train.yolo.job import TrainingJob

EVENTS = ".events-of-ranks.jsonl"
POLL_S = 0.5
# The address as it was given: config.json leaves out passwords.
STORE_ADDRESS = "QWEN_DISTILL_STORE_ADDRESS"


def job_of_rank(run: Path) -> TrainingJob:
    """The job that the launching process described in `run`/config.json."""
    from ultralytics.utils import RANK

    from train.yolo.job import build_job
    from train.yolo.offline import prepare_ultralytics
    from train.yolo.recorder import Recorder, best_epoch_of, describe_run, resume_state

    prepare_ultralytics()
    options = RunFolder(run).read_config()["options"]
    options["store"] = os.environ.get(STORE_ADDRESS, options["store"])
    config = TrainConfig(**options)
    state = resume_state(run)
    job = build_job(config, run, open_store(config.store), state)
    if RANK in (-1, 0):
        first_epoch = 0 if state is None else state["epoch"] + 1
        events = EventWriter(run / EVENTS)
        recorder = Recorder(run, config, describe_run(job), events, first_epoch, best_epoch_of(state))
        save_before_termination(recorder)
        job.epoch_finished = recorder.epoch_finished

        def training_finished(trainer: Any) -> None:
            recorder.close()
            events.training_finished(trainer)

        job.training_finished = training_finished
    return job


def save_before_termination(recorder: Any) -> None:
    """Rank 0 has the last finished epoch on disk before SIGTERM, which the launcher passes on, ends it."""

    def terminate(number: int, frame: Any) -> None:
        recorder.save_latest()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)


class EventWriter(SilentObserver):
    """Rank 0's observer: one line of JSON an event, for `EventReader` in the launching process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def epoch_end(self, record: dict[str, Any]) -> None:
        self.write(event="epoch_end", record=record)

    def checkpoint_saved(self, path: Path, epoch: int, is_best: bool) -> None:
        self.write(event="checkpoint_saved", path=str(path), epoch=epoch, is_best=is_best)

    def training_finished(self, trainer: Any) -> None:
        from train.yolo.recorder import ending_of

        self.write(event="training_finished", ending=ending_of(trainer))

    def write(self, **event: Any) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


class EventReader:
    """Passes the events of rank 0 on to `observer` and `progress`; `ending` is the content of the last one."""

    def __init__(self, file: Path, observer: Observer, progress: Progress, batches: int) -> None:
        """`batches`: of one epoch."""
        self.file, self.observer, self.progress, self.batches = file, observer, progress, batches
        self.position = 0
        self.ending: dict[str, Any] | None = None

    def poll(self) -> None:
        """Pass on the lines that are complete by now."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self.position)
            *lines, _ = file.read().split(b"\n")
        for line in lines:
            self.position += len(line) + 1
            self.pass_on(json.loads(line))

    def pass_on(self, event: dict[str, Any]) -> None:
        if event["event"] == "epoch_end":
            record = event["record"]
            self.progress.advance(self.batches)
            self.progress.note(f"epoch {record['epoch']}: mAP50 {record['map50'] or 0:.4f}")
            self.observer.epoch_end(record)
        elif event["event"] == "checkpoint_saved":
            self.observer.checkpoint_saved(Path(event["path"]), event["epoch"], event["is_best"])
        else:
            self.ending = event["ending"]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, a thread polls; at the end everything has been passed on."""
        done = threading.Event()

        def follow() -> None:
            while not done.wait(POLL_S):
                self.poll()

        thread = threading.Thread(target=follow, name="events-of-ranks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.poll()


def train_on_ranks(
    trainer: Any,
    watch: StopDeadline,
    observer: Observer,
    first_epoch: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let ultralytics start the ranks and wait for them; returns the records of all epochs and `ending_of` rank 0.

    Raises TrainError when a rank failed, Stopped after a
    signal, which ends the ranks as well.
    """
    job = trainer.job
    events = job.run / EVENTS
    events.unlink(missing_ok=True)
    total, done = job.config.epochs * job.batches_per_epoch, first_epoch * job.batches_per_epoch

    def end_ranks() -> str:
        end_children()
        return stopped_message(job.run)

    watch.save = end_ranks
    os.environ[STORE_ADDRESS] = job.config.store
    with track_progress(total, f"training {job.run.name}", "batches", done) as progress:
        reader = EventReader(events, observer, progress, job.batches_per_epoch)
        try:
            with reader.following():
                trainer.train()
        except subprocess.CalledProcessError as error:
            if watch.stop.requested:
                raise Stopped(stopped_message(job.run), watch.stop.exit_code) from error
            raise TrainError(
                f"a process of ultralytics' DDP launcher failed (exit code {error.returncode}): its own error stands "
                "above; --resume continues after the last finished epoch"
            ) from error
    events.unlink(missing_ok=True)
    if reader.ending is None:
        raise TrainError(
            f"{job.run}: ultralytics' DDP launcher ended, but rank 0 did not finish the training"
        )
    return RunFolder(job.run).read_records(), reader.ending


def end_children() -> None:
    """Ask the launcher to end; it ends its ranks."""
    for child in psutil.Process().children():
        child.terminate()
