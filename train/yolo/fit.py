"""`cli train` for YOLOv8 students: store → ultralytics' trainer → run folder.

The run folder holds what other students' run folders hold (config.json, metrics.jsonl, TensorBoard, best.pt,
last.pt, summary.json) and `ultralytics/` with what ultralytics writes (best.pt, results.csv, plots).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.output import get_logger
from console.progress import Progress, track_progress
from processes.stop import StopDeadline, Stopped
from store.reader import open_store
from train.checkpoint import LAST
from train.config import TrainConfig
from train.distill.resolve import chosen_teachers
from train.errors import ConfigError, TrainError
from train.events import EventStream
from train.fit import FitRequest, FitResult
from train.loop.machine import is_out_of_memory
from train.run_folder import RunFolder, store_reference
from train.students.offline import prepare_ultralytics
from train.yolo.options import check_options

if TYPE_CHECKING:
    from train.yolo.recorder import Recorder

log = get_logger("train")


class YoloTrainer:
    """Trains YOLOv8 students with ultralytics (see `train.fit.Trainer`).

    Raises ConfigError for options that it cannot follow, TrainError for data that does not fit.
    """

    task = "detection"

    def __init__(self, config: TrainConfig) -> None:
        prepare_ultralytics()
        check_options(config)
        check_own_process()
        if config.control_only:
            # ultralytics' augmentations do not depend on what is distilled, so this is the control of `--control`.
            config = config.replace(distillation_type="none")
        if config.distillation_type == "hybrid":
            log.info("distillation_type hybrid: YOLO students learn features; there is no logit term")
        self.config, self.batch_size = config, config.batch_size
        self.store = chosen_teachers(config, open_store(config.store))[0]

    def fit(self, request: FitRequest) -> FitResult:
        """ultralytics trains from the start, or after the epoch that last.pt holds."""
        from train.yolo.ddp import train_on_ranks
        from train.yolo.job import build_job
        from train.yolo.recorder import fit_result, resume_state
        from train.yolo.trainer import StoreTrainer

        config, folder = request.config, request.folder
        if request.control:
            config = config.replace(distillation_type="none", out=folder.path, control=False)
            folder.path.mkdir(exist_ok=True)
        state = resume_state(folder.path)
        first_epoch = 0 if state is None else state["epoch"] + 1
        job = build_job(config, folder.path, self.store, state)
        trainer = StoreTrainer(job)
        images = len(job.splits["train"].records)
        resolved = {"task": self.task, "train_images": images, "ultralytics": trainer_arguments(trainer)}
        folder.write_config(config, resolved, store_reference(self.store, config))
        train = train_on_ranks if trainer.ddp else train_here
        try:
            records, ending = train(trainer, request.deadline, request.events, first_epoch)
        finally:
            self.batch_size = trainer.batch_size
        return fit_result(config, self.store, folder.path, job, records, ending)

    def reduce_batch(self, config: TrainConfig, folder: RunFolder) -> None:
        """ultralytics has tried smaller batches by itself (--auto-batch)."""


def check_own_process() -> None:
    """Raises ConfigError inside torchrun: ultralytics starts the processes of several GPUs by itself."""
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "YOLO students start their own process for each GPU: run cli train without torchrun or accelerate launch, "
            "with --device cuda:0,cuda:1"
        )


def train_here(
    trainer: Any, watch: StopDeadline, events: EventStream, first_epoch: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train in this process; returns the records of all epochs and `ending_of` the trainer."""
    from train.yolo.recorder import Recorder, best_epoch_of, describe_run, ending_of
    from train.yolo.trainer import close_loaders

    job = trainer.job
    recorder = Recorder(job.run, job.config, describe_run(job), events, first_epoch, best_epoch_of(job.state))
    total, done = job.config.epochs * job.batches_per_epoch, first_epoch * job.batches_per_epoch

    def stop() -> str:
        recorder.save_latest()
        return stopped_message(job.run)

    try:
        watch.save = stop
        with track_progress(total, f"training {job.run.name}", "batches", done) as progress:
            job.batch_finished = count_batches(watch, progress, stop)
            job.epoch_finished = announce_epochs(recorder, progress, len(job.splits["val"].records))
            trainer.train()
    except TrainError as error:
        raise type(error)(last_line(str(error))) from error
    except (RuntimeError, MemoryError) as error:
        # A signal to the whole group may have ended loader workers first.
        if watch.stop.requested and not is_out_of_memory(error):
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
    """After every batch: count it, and end when a stop was requested; `stop()` saves and returns what is saved."""

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


def announce_epochs(recorder: Recorder, progress: Progress, samples: int) -> Callable[[Any], None]:
    """After every epoch: record it, and show a line; `samples`: validation images."""

    def finished(trainer: Any) -> None:
        recorder.epoch_finished(trainer)
        progress.note(epoch_line(recorder.records[-1], trainer.epochs, samples))

    return finished


def epoch_line(record: Mapping[str, Any], epochs: int, samples: int) -> str:
    """`epoch 3/60: box_loss 1.204, …; mAP50 0.6134, mAP50-95 0.3851 (n=87)`; without the latter where it was not validated."""
    losses = ("box_loss", "cls_loss", "dfl_loss", "feature_loss")
    parts = [", ".join(f"{name} {record[name]:.3f}" for name in losses if record.get(name) is not None)]
    if record["map50"] is not None:
        parts.append(f"mAP50 {record['map50']:.4f}, mAP50-95 {record['map50_95']:.4f} (n={samples})")
    return f"epoch {record['epoch']}/{epochs}: {'; '.join(parts)}"
