"""`cli train` for YOLOv8 students: store → ultralytics' trainer → run folder.

The run folder holds what other students' run folders hold (config.json, metrics.jsonl, TensorBoard, best.pt,
last.pt, summary.json) and `ultralytics/` with what ultralytics writes (best.pt, results.csv, plots).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from console.log import get_logger
from console.progress import Progress, track_progress
from console.stop import Stopped, StopRequest
from processes.deadline import StopDeadline
from store.reader import Store, open_store
from train.checkpoint import LAST
from train.config import TrainConfig
from train.data.splits import warn_of_splits
from train.errors import ConfigError, TrainError
from train.events import Observer, Observers
from train.loop.machine import MEMORY_ADVICE, OutOfMemoryError, is_out_of_memory
from train.rundir import (
    SUMMARY,
    is_complete,
    prepare_run_folder,
    read_summary,
    store_reference,
    warn_of_random_teacher,
    write_config,
    write_json,
)
from train.yolo.offline import prepare_ultralytics
from train.yolo.options import check_options

log = get_logger("train")


def run_yolo(
    config: TrainConfig, observers: Sequence[Observer] = (), stop: StopRequest | None = None
) -> dict[str, Any]:
    """Train one YOLO student into `config.out`, and its control when asked for; returns summary.json's content.

    Raises ConfigError for options that it cannot follow, TrainError for data that does not fit, Stopped after a
    signal: the last finished epoch is saved.
    """
    prepare_ultralytics()
    check_options(config)
    check_own_process()
    if config.control_only:
        # ultralytics' augmentations do not depend on what is distilled, so this is the control of `--control`.
        config = config.replace(distillation_type="none")
    if config.distillation_type == "hybrid":
        log.info("distillation_type hybrid: YOLO students learn features; there is no logit term")
    store = open_store(config.store)
    group = Observers(observers)
    folder = prepare_run_folder(config, store)
    warn_of_random_teacher(config.store, store)
    warn_of_splits(config, store, "detection")
    done = read_summary(folder)
    if done is not None and config.resume and is_complete(done, config):
        log.info("%s is complete: nothing left to do", folder)
        return done
    with (
        nullcontext(stop) if stop is not None else StopRequest() as request,
        StopDeadline(request, report=group.failed) as watch,
    ):
        summary = train_yolo(config, store, folder, watch, group)
        if config.control:
            summary["control"] = run_control(config, store, folder, watch, summary)
    write_json(folder / SUMMARY, summary)
    group.finished(summary)
    return summary


def check_own_process() -> None:
    """Raises ConfigError inside torchrun: ultralytics starts the processes of several GPUs by itself."""
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "YOLO students start their own process for each GPU: run cli train without torchrun or accelerate launch, "
            "with --device cuda:0,cuda:1"
        )


def run_control(
    config: TrainConfig, store: Store, folder: Path, watch: StopDeadline, main: dict[str, Any]
) -> dict[str, Any]:
    """The same student, seed, images and schedule on the task loss alone, at weight 1, in RUN/control."""
    # Batches as the main run ended up with, in case it ran out of memory.
    batch, metrics = main["batch_size"], main["metrics"]
    control = config.replace(
        distillation_type="none",
        out=folder / "control",
        control=False,
        batch_size=batch,
        grad_accum_steps=config.grad_accum_steps * max(config.batch_size // batch, 1),
    )
    control.out.mkdir(exist_ok=True)
    found = train_yolo(control, store, control.out, watch, Observers())
    return {
        "metrics": found["metrics"],
        "best_epoch": found["best_epoch"],
        "difference": {name: metrics[name] - value for name, value in found["metrics"].items()},
    }


def train_yolo(
    config: TrainConfig, store: Store, folder: Path, watch: StopDeadline, observer: Observer
) -> dict[str, Any]:
    """One training in `folder`, from the start or after the epoch that its last.pt holds; returns its summary."""
    from train.yolo.ddp import train_on_ranks
    from train.yolo.job import build_job
    from train.yolo.recorder import resume_state, summarize
    from train.yolo.trainer import StoreTrainer

    state = resume_state(folder)
    first_epoch = 0 if state is None else state["epoch"] + 1
    job = build_job(config, folder, store, state)
    trainer = StoreTrainer(job)
    write_config(
        folder,
        config,
        {"task": "detection", "ultralytics": trainer_arguments(trainer)},
        store_reference(store),
    )
    if trainer.ddp:
        records, ending = train_on_ranks(
            trainer, watch, observer, first_epoch, lambda: stopped_message(folder)
        )
    else:
        records, ending = train_here(trainer, watch, observer, first_epoch)
    return summarize(config, store, folder, job, records, ending)


def train_here(
    trainer: Any, watch: StopDeadline, observer: Observer, first_epoch: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train in this process; returns the records of all epochs and `ending_of` the trainer."""
    from train.yolo.recorder import Recorder, best_epoch_of, describe_run, ending_of
    from train.yolo.trainer import close_loaders

    job = trainer.job
    recorder = Recorder(
        job.run, job.config, describe_run(job), observer, first_epoch, best_epoch_of(job.state)
    )
    total, done = job.config.epochs * job.batches_per_epoch, first_epoch * job.batches_per_epoch

    def stop() -> str:
        recorder.save_latest()
        return stopped_message(job.run)

    try:
        watch.save = stop
        with track_progress(total, f"training {job.run.name}", "batches", done) as progress:
            job.batch_finished = count_batches(watch, progress, stop)
            job.epoch_finished = announce_epochs(
                recorder.epoch_finished, progress, len(job.splits["val"].records)
            )
            trainer.train()
    except TrainError as error:
        raise type(error)(last_line(str(error))) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"{MEMORY_ADVICE} (batch_size {trainer.batch_size})") from error
        if watch.stop.requested:  # a signal to the whole group ended loader workers first
            raise Stopped(stop(), watch.stop.exit_code) from error
        raise
    finally:
        recorder.close()
        close_loaders(trainer)
    return recorder.records, ending_of(trainer)


def last_line(text: str) -> str:
    """An error's own text; torch puts the traceback of a loader worker before it."""
    if "Original Traceback" not in text:
        return text
    return text.strip().splitlines()[-1].partition(": ")[2]


def trainer_arguments(trainer: Any) -> dict[str, Any]:
    """ultralytics' arguments as plain JSON types."""
    return {
        n: v if isinstance(v, (int, float, bool, list)) or v is None else str(v)
        for n, v in vars(trainer.args).items()
    }


def count_batches(watch: StopDeadline, progress: Progress, stop: Callable[[], str]) -> Callable[[Any], None]:
    """After every batch: count it, and end when a stop was asked for; `stop()` saves and says what is saved."""

    def batch_finished(trainer: Any) -> None:
        progress.advance()
        if watch.stop.requested:
            watch.acknowledge()
            raise Stopped(stop(), watch.stop.exit_code)

    return batch_finished


def stopped_message(folder: Path) -> str:
    if (folder / LAST).exists():
        return f"stopped: the last finished epoch is in {folder / LAST}, --resume continues after it"
    return f"stopped: in the first epoch, of which nothing is saved in {folder}"


def announce_epochs(
    epoch_finished: Callable[[Any], None], progress: Progress, samples: int
) -> Callable[[Any], None]:
    """After every epoch: record it, and show a line; `samples`: validation images."""

    def finished(trainer: Any) -> None:
        epoch_finished(trainer)
        losses = ", ".join(f"{name} {float(value):.3f}" for name, value in trainer.tloss.items())
        values = trainer.metrics
        progress.note(
            f"epoch {trainer.epoch + 1}/{trainer.epochs}: {losses}; mAP50 {values.get('metrics/mAP50(B)', 0):.4f}, "
            f"mAP50-95 {values.get('metrics/mAP50-95(B)', 0):.4f} (n={samples})"
        )

    return finished
