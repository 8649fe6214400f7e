"""What a YOLO run writes in our own formats, epoch by epoch: checkpoints, metrics.jsonl, TensorBoard, events."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from console.output import get_logger
from store.reader import Store
from train.checkpoint import BEST, FORMAT, LAST, load_checkpoint, load_student_from_run
from train.config import TrainConfig, config_to_json
from train.data.splits import count_validation
from train.errors import TrainError
from train.events import CheckpointSaved, EpochEnded, EventStream
from train.fit import FitResult
from train.loop.machine import peak_memory
from train.loop.saving import CheckpointWriter, HostCopy, adopt_best
from train.loop.trackers import Tracker, open_trackers
from train.metrics import warn_of_zero_metric
from train.run_folder import RunFolder
from train.yolo.job import TrainingJob
from train.yolo.model import DISTILLATION_ITEM, is_distilled

log = get_logger("train")
STATE_VERSION = 1

HARD_ITEMS = ("box_loss", "cls_loss", "dfl_loss")
METRICS = {
    "map50": "metrics/mAP50(B)",
    "map50_95": "metrics/mAP50-95(B)",
    "precision": "metrics/precision(B)",
    "recall": "metrics/recall(B)",
}


def describe_run(job: Any) -> dict[str, Any]:
    """What every checkpoint records of the student besides its weights (see `train.checkpoint`).

    LoRA is merged into the weights of checkpoints, so the configuration in them has none.
    """
    return {
        "format": FORMAT,
        "student": job.student.spec.to_dict(),
        "task": "detection",
        "class_names": list(job.class_names),
        "preprocessing": {
            "image_size": job.config.image_size,
            "resize": "letterbox",
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "bit_depth": job.bit_depth,
        },
        "config": {**config_to_json(job.config), "lora_rank": 0},
        "merged_lora_rank": job.config.lora_rank,
    }


class Recorder:
    """Writes an epoch's files in the order in which a crash between any two of them can be resumed from.

    `described` is what every checkpoint of the run records of the student besides its weights. The record of
    metrics.jsonl comes first, `last.pt` last: a run continues after the epoch that `last.pt` holds, and drops later
    lines of metrics.jsonl. Checkpoints are written by time (`train.loop.saving`); the state after the last finished
    epoch is kept in memory for a stop signal, since ultralytics' trainer can be resumed between two epochs only.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        described: Mapping[str, Any],
        events: EventStream,
        first_epoch: int,
        best_epoch: int = 0,
    ) -> None:
        """`first_epoch`: epochs that are finished, `best_epoch`: the best of them, both of a resumed run."""
        self.run, self.config, self.described, self.events = run, config, described, events
        # Lines of later epochs are dropped: a resumed run repeats these.
        self.files = RunFolder(run)
        self.records = [line for line in self.files.read_records() if line["epoch"] <= first_epoch]
        self.files.write_records(self.records)
        self.events.catch_up(self.records)
        self.trackers: list[Tracker] = open_trackers(config.tracker, run, config_to_json(config), first_epoch)
        self.writer = CheckpointWriter(run, 60 * config.checkpoint_minutes)
        self.latest: dict[str, Any] = {}
        self.saved_epoch, self.best_epoch = first_epoch, best_epoch
        self.reports: list[CheckpointSaved] = []
        self.unsaved_best: dict[str, Any] | None = None
        self.started = time.perf_counter()

    def epoch_finished(self, trainer: Any) -> None:
        """Called with the trainer right after an epoch's validation and ultralytics' own files."""
        record = self.describe_epoch(trainer)
        self.records.append(record)
        self.files.append_record(record)
        warn_of_zero_metric(self.config, self.run, self.records)
        for tracker in self.trackers:
            tracker.log(record, record["epoch"])
        due = self.writer.due(after_epoch=True)
        self.keep(trainer, record)
        if due or trainer.stop:
            self.save(trainer, last=bool(trainer.stop))
        self.events.emit(EpochEnded(record))
        self.announce()

    def describe_epoch(self, trainer: Any) -> dict[str, Any]:
        """One line of metrics.jsonl; losses are the terms before their weights, `train_loss` is weighted."""
        now = time.perf_counter()
        train = {name: float(value) for name, value in (trainer.tloss or {}).items()}
        # Without a validation the trainer still has the metrics of the one before.
        measured = trainer.metrics if trainer.validated else {}
        values = {name: float(value) for name, value in measured.items()}
        validation = {n.removeprefix("val/"): v for n, v in values.items() if n.startswith("val/")}
        weight = weight_of_term(trainer)
        record = {
            "epoch": trainer.epoch + 1,
            "train_loss": self.weighted(train, weight),
            "hard_loss": hard_sum(train),
            "feature_loss": train.get(DISTILLATION_ITEM),
            "logit_loss": None,
            "val_loss": self.weighted(validation, weight) if trainer.validated else None,
            "val_hard_loss": hard_sum(validation) if trainer.validated else None,
            "val_feature_loss": validation.get(DISTILLATION_ITEM),
            "learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
            **{name: values.get(key) for name, key in METRICS.items()},
            **{name: train.get(name) for name in HARD_ITEMS},
            "epoch_time_s": round(now - self.started, 3),
            "train_time_s": round(trainer.train_seconds, 3),
        }
        self.started = now
        return record

    def weighted(self, items: Mapping[str, float], weight: float) -> float:
        """The loss that is minimized, per image. `weight`: of the distillation term."""
        if self.config.distillation_type == "none":
            return hard_sum(items)
        return self.config.hard_label_weight * hard_sum(items) + weight * items.get(DISTILLATION_ITEM, 0.0)

    def keep(self, trainer: Any, record: Mapping[str, Any]) -> None:
        """Copy the state after this epoch to the host, for the next time that it is written."""
        epoch = record["epoch"]
        content = {
            **self.described,
            "epoch": epoch,
            "accuracy": record.get("map50"),
            "metrics": {name: record[name] for name in METRICS},
            "model_state_dict": student_state(trainer.job.merged(trainer.ema.ema)),
        }
        state = {**training_state(trainer), "best_epoch": epoch if trainer.is_best else self.best_epoch}
        self.latest = HostCopy({**content, "training": state}).content()
        content = {name: value for name, value in self.latest.items() if name != "training"}
        if trainer.is_best:
            self.best_epoch, self.unsaved_best = epoch, content
            self.writer.note_best(content, None, epoch)
        interval = self.config.checkpoint_interval
        if interval is not None and epoch % interval == 0:
            self.writer.save_beside(self.run / f"checkpoint_epoch_{epoch}.pt", content, epoch)

    def save(self, trainer: Any, *, last: bool) -> None:
        """Write the checkpoints of the epoch that has just ended; after the `last` one they are on disk on return.

        ultralytics' own files are written then only, before `last.pt` records that only the validation is left.
        """
        if last:
            self.reports += self.writer.finish()
            trainer.write_checkpoints(self.unsaved_best or load_checkpoint(self.run / BEST))
        self.unsaved_best, self.saved_epoch = None, self.latest["epoch"]
        self.writer.save(self.latest, self.saved_epoch, wait=last)

    def save_latest(self) -> None:
        """Have the last finished epoch on disk: at a stop signal or after an error, from any thread."""
        if self.latest and self.saved_epoch != self.latest["epoch"]:
            self.saved_epoch = self.latest["epoch"]
            self.writer.save(self.latest, self.saved_epoch, wait=True)
        self.reports += self.writer.finish()

    def announce(self) -> None:
        """Emit the checkpoints that are complete on disk by now."""
        reports, self.reports = self.reports + self.writer.finished(), []
        for saved in reports:
            self.events.emit(saved)

    def close(self) -> None:
        try:
            self.save_latest()
            self.announce()
        finally:
            self.writer.close()
            for tracker in self.trackers:
                tracker.close()


def student_state(network: Any) -> dict[str, Tensor]:
    """The detector's tensors, without alignment heads, under the names of `train.students.yolo.YoloStudent`."""
    return {
        f"network.{name}": value
        for name, value in network.state_dict().items()
        if not name.startswith("distillation.")
    }


def weight_of_term(trainer: Any) -> float:
    """The weight of the distillation term in the loss; 0 without one."""
    from ultralytics.utils.torch_utils import unwrap_model

    network: Any = unwrap_model(trainer.model)
    return float(network.distillation.weight) if is_distilled(network) else 0.0


def hard_sum(items: Mapping[str, float]) -> float:
    return sum(items.get(name, 0.0) for name in HARD_ITEMS)


def resume_state(folder: Path) -> dict[str, Any] | None:
    """The state in `last.pt` to resume from, or None for a new run. Raises TrainError when it holds none."""
    if not (folder / LAST).exists():
        return None
    state = load_checkpoint(folder / LAST).get("training")
    if not isinstance(state, dict) or "ema" not in state:
        raise TrainError(f"{folder / LAST} holds no state of a YOLO training: start again with --overwrite")
    if "best_epoch" in state:  # not in runs made before checkpoints were written by time
        adopt_best(folder, state["best_epoch"])
    log.info("%s: resumed after epoch %d", folder, state["epoch"] + 1)
    return state


def best_epoch_of(state: dict[str, Any] | None) -> int:
    """The best epoch, from 1, of what is resumed from; 0 for a new run."""
    return 0 if state is None else int(state.get("best_epoch", 0))


def training_state(trainer: Any) -> dict[str, Any]:
    """The state after the trainer's current epoch."""
    from ultralytics.utils.torch_utils import unwrap_model

    stopper = trainer.stopper
    return {
        "version": STATE_VERSION,
        "epoch": trainer.epoch,
        "stopped_early": bool(trainer.stop) and trainer.epoch + 1 < trainer.epochs,
        "model": unwrap_model(trainer.model).state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "best_fitness": plain(trainer.best_fitness),
        "chosen": {
            "optimizer": str(trainer.args.optimizer),
            "lr0": float(trainer.args.lr0),
            "warmup_bias_lr": float(trainer.args.warmup_bias_lr),
        },
        "stopper": {
            "best_fitness": plain(stopper.best_fitness),
            "best_epoch": stopper.best_epoch,
            "possible_stop": stopper.possible_stop,
        },
    }


def restore_state(trainer: Any, content: dict[str, Any]) -> None:
    """Put a saved state into a trainer that is set up; training continues with the following epoch."""
    from ultralytics.utils.torch_utils import unwrap_model

    if content["version"] != STATE_VERSION:
        raise TrainError(
            f"resume: the checkpoint's state has version {content['version']}, this program reads {STATE_VERSION}: "
            "start again with --overwrite"
        )
    unwrap_model(trainer.model).load_state_dict(content["model"])
    trainer.ema.ema.load_state_dict(content["ema"])
    trainer.ema.updates = content["updates"]
    for saved, group in zip(
        content["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True
    ):
        saved["fused"] = group.get("fused")  # belongs to the device, which may be another one now
    trainer.optimizer.load_state_dict(content["optimizer"])
    trainer.scaler.load_state_dict(content["scaler"])
    trainer.best_fitness = content["best_fitness"]
    trainer.stopper.__dict__.update(content["stopper"])
    trainer.start_epoch = content["epoch"] + 1


def plain(value: Any) -> float | None:
    """A Python float of numpy's or torch's scalar; weights-only loading knows no numpy scalars."""
    return None if value is None else float(value)


def fit_result(
    config: TrainConfig,
    store: Store,
    run: Path,
    job: TrainingJob,
    records: list[dict[str, Any]],
    ending: dict[str, Any],
) -> FitResult:
    """The result of a finished training, from its best.pt and the lines of metrics.jsonl (`records`).

    `ending` is `ending_of` the trainer, in the process that trained.
    """
    student, content = load_student_from_run(run, BEST)
    best = next(record for record in records if record["epoch"] == content["epoch"])
    train_time = sum(record["train_time_s"] for record in records)
    images = len(job.splits["train"].records) * len(records)
    batch = ending["batch_size"]
    return FitResult(
        config=config.replace(
            batch_size=batch,
            grad_accum_steps=config.grad_accum_steps * max(job.config.batch_size // batch, 1),
        ),
        student=student,
        num_classes=student.spec.num_classes,
        validation_samples=count_validation(store, config.val_split, "detection"),
        epochs_done=len(records),
        best_epoch=best["epoch"],
        metrics={name: best[name] for name in METRICS},
        per_class=ending["per_class"],
        trainable_parameters=job.trainable_parameters,
        wall_time_s=round(sum(record["epoch_time_s"] for record in records), 3),
        images_per_second=round(images / train_time, 2) if train_time else None,
        details={name: value for name, value in ending.items() if name != "per_class"},
    )


def ending_of(trainer: Any) -> dict[str, Any]:
    """What only the trainer knows for summary.json, when it has ended: plain JSON types."""
    return {
        "per_class": per_class(trainer),
        "exported": {name: trainer.export_metrics.get(key) for name, key in METRICS.items()},
        "batch_size": trainer.batch_size,
        "optimizer": str(trainer.args.optimizer),
        "learning_rate": float(trainer.args.lr0),
        "grad_accum_steps": trainer.accumulate,
        **peak_memory(),
    }


def per_class(trainer: Any) -> dict[str, float | None]:
    """mAP50-95 of each class by ultralytics/best.pt; None: undefined, the validation split has no box of the class."""
    box: Any = getattr(getattr(trainer.validator, "metrics", None), "box", None)
    return name_precisions(box, trainer.job.class_names)


def name_precisions(box: Any, names: Sequence[str]) -> dict[str, float | None]:
    """ultralytics' AP of each class by name, None for the classes that it did not meet; empty without any."""
    found = {
        int(index): float(box.ap[place]) for place, index in enumerate(getattr(box, "ap_class_index", []))
    }
    return {name: found.get(index) for index, name in enumerate(names)} if found else {}
