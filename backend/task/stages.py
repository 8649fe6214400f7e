"""One task from data to report: features from the cache or extracted into it, training, evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.task.calls import PipeSender, Sender, TaskCalls
from backend.task.configs import StageConfigs
from backend.task.errors import OptionError, PlatformError
from backend.task.events import ExtractionEvents, TrainingEvents, training_observers
from backend.task.feature_cache import (
    FeatureCache,
    cache_key,
    digest_folder,
    digest_source,
    teacher_digest,
)
from backend.task.request import TaskRequest
from console.devices import device_index
from console.log import get_logger
from console.stop import Stopped, StopRequest

if TYPE_CHECKING:
    from extract.config import ExtractConfig
    from train.config import TrainConfig

log = get_logger("platform")

SUMMARY = "summary.json"


class Task:
    """Does the work of one request; calls go to `sender`, a stop request ends it with a checkpoint."""

    def __init__(self, request: TaskRequest, sender: Sender, stop: StopRequest) -> None:
        self.request, self.sender, self.stop = request, sender, stop
        self.calls = TaskCalls(request.task_id)
        self.configs = StageConfigs(request)
        self.cache = FeatureCache(request.cache_dir)
        self.epochs = int(self.configs.settings["epochs"])
        self.extraction = ExtractionEvents(self.calls, sender, self.epochs)

    def run(self) -> dict[str, Any]:
        """Everything, to the evaluation's report; the summary of the training.

        Raises:
            Stopped: after a signal, with everything saved.
            DistillError, PlatformError: for what a user can do something about.
        """
        request = self.request
        log.info("task %s: student %s, %s", request.task_id, request.student, request.task)
        for note in self.configs.notes[len(request.notes) :]:
            log.warning("%s", note)
        make_folder(request.output_dir)
        self.cache.prepare()
        check_devices(request.devices)
        store = self.features()
        summary = self.train(store)
        self.report(summary, store)
        return summary

    def check_stop(self) -> None:
        if self.stop.requested:
            raise Stopped("stopped before the training began", self.stop.exit_code)

    # -- stage one --------------------------------------------------------------------------------------

    def features(self) -> Path:
        """The store with this task's features, from the cache or extracted now; one task at a time makes it."""
        self.extraction.send("looking for cached features")
        key = self.feature_key()
        path = self.cache.store_path(key)
        owner = f"task {self.request.task_id}"
        with self.cache.lock(key, owner, self.stop, self.extraction.send):
            if not is_complete(path):
                training = self.configs.train_config(path)
                check_student(training)
                check_data(self.configs.extract_config(path), training)
                log.info("features: extracting into the cache, %s", path)
                self.extract(path)
            else:
                log.info("features: taken from the cache, %s", path)
                self.add_logits(path)
        return path

    def feature_key(self) -> str:
        """The store's name: data, teacher and all that decides what is extracted."""
        teacher = teacher_digest(self.request.teacher_path, self.cache.digests, self.check_stop)
        data = self.database_digests() if self.request.database else self.folder_digests()
        return cache_key({**self.configs.store_features(), "weights": teacher, "data": data})

    def folder_digests(self) -> dict[str, str]:
        request = self.request
        folders = request.splits or {"all": str(request.dataset_dir)}
        memo = self.cache.digests
        return {name: digest_folder(Path(path), memo, self.check_stop) for name, path in folders.items()}

    def database_digests(self) -> dict[str, str]:
        """Rows of the query with their contents: a database has no times of change to rely on."""
        from extract.inputs import open_data

        return {
            "rows": digest_source(open_data(self.configs.extract_config(Path("unused"))), self.check_stop)
        }

    def extract(self, path: Path) -> None:
        from extract.existing import DifferentStore
        from extract.run import run_extraction

        config = self.configs.extract_config(path)
        try:
            result = run_extraction(config, [self.extraction], self.stop)
        except DifferentStore as error:
            # Another precision (a GPU's, a CPU's) or another version of ours, stopped half-way: nobody uses that.
            log.warning("features: starting anew what was never finished: %s", error)
            again = config.model_copy(update={"overwrite": True})
            result = run_extraction(again, [self.extraction], self.stop)
        if not result.complete:
            raise PlatformError(f"{path}: the extraction ended without being complete: see the log")
        log.info(
            "features: %d images, %d unreadable, %.1f images/s",
            result.rows,
            result.bad,
            result.images_per_second,
        )

    def add_logits(self, path: Path) -> None:
        """A store of another task may lack the class logits that this one needs: they are made from its features."""
        config = self.configs.extract_config(path)
        if config.logits == "none":
            return
        from extract.logits import add_logits

        add_logits(config, [self.extraction], self.stop)

    # -- stage two --------------------------------------------------------------------------------------

    def train(self, store: Path) -> dict[str, Any]:
        """Train, or go on with what lies in the output folder; the content of summary.json."""
        self.check_stop()
        config = self.configs.train_config(store)
        if config.resume:
            log.info("%s holds a run: going on with it", self.request.output_dir)
        if len(config.devices) > 1 and config.student_type != "yolov8":
            from backend.task.worker import train_on_ranks

            pipe = self.sender.descriptor if isinstance(self.sender, PipeSender) else None
            return train_on_ranks(config, self.request.task_id, pipe, self.stop)
        from train.run import run_training

        observers = training_observers(config, self.calls, self.sender)
        return dict(run_training(config, observers, self.stop))

    # -- the end ----------------------------------------------------------------------------------------

    def report(self, summary: dict[str, Any], store: Path) -> None:
        """Publish the best model, note the platform's part in summary.json, send the evaluation."""
        folder = self.request.output_dir
        TrainingEvents(self.calls, self.sender, self.epochs, folder).publish_best()
        summary["platform"] = {"task_id": self.request.task_id, "notes": self.configs.notes}
        write_summary(folder / SUMMARY, summary)
        metrics = summary.get("metrics") or {}
        self.sender.send(
            self.calls.evaluations(
                values=evaluation_values(metrics),
                dataset_id=self.request.val_dataset_id,
                dataset_name=self.request.val_dataset_id,
                samples=count_validated(store),
                details=plain_details(summary),
            )
        )


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise PlatformError(f"--output_dir: {path}: {error.strerror}") from None


def is_complete(path: Path) -> bool:
    """True when a finished store lies at `path`."""
    from store.errors import StoreError
    from store.reader import open_store

    if not path.exists():
        return False
    try:
        return bool(open_store(path, allow_incomplete=True).manifest.complete)
    except StoreError:
        return False


def count_validated(store: Path) -> int:
    """Samples of the validation split that have features."""
    from store.reader import open_store

    return int(open_store(store)["val"].valid.sum())


def evaluation_values(metrics: MappingType[str, Any]) -> dict[str, Any]:
    """Final metrics under the names of the evaluations call, fractions of 1. F1 of detection is P and R's."""
    precision, recall = (metrics.get(name, metrics.get(f"macro_{name}")) for name in ("precision", "recall"))
    f1 = metrics.get("macro_f1")
    if f1 is None and precision is not None and recall is not None:
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    detection = {"map50": metrics.get("map50"), "map95": metrics.get("map50_95")}
    return {"precision": precision, "recall": recall, "f1Score": f1, **detection}


def plain_details(summary: MappingType[str, Any]) -> dict[str, Any]:
    """The part of a summary that goes into `detailedResults`."""
    from console.output import plain_json

    names = (
        "student",
        "task",
        "num_classes",
        "epochs_done",
        "best_epoch",
        "metrics",
        "parameters",
        "platform",
    )
    return {name: plain_json(summary[name]) for name in names if name in summary}


def write_summary(path: Path, summary: MappingType[str, Any]) -> None:
    """Replace summary.json, complete or not at all."""
    from console.output import plain_json
    from files.writing import replace_file

    replace_file(path, json.dumps(plain_json(summary), indent=2, ensure_ascii=False) + "\n")


def check_devices(devices: tuple[str, ...]) -> None:
    """Raises PlatformError for a GPU that is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [
        name.removeprefix("cuda:") for name in devices if name != "cpu" and device_index(name) >= count
    ]
    if missing:
        raise PlatformError(
            f"--gpu_devices: GPU {', '.join(missing)} is not there, this machine shows {count} to PyTorch: "
            "choose others, or pass --gpu_devices cpu"
        )


def check_student(config: TrainConfig) -> None:
    """Build the student once, with its weights and adapters.

    Raises:
        ConfigError, StudentError, LoraError: what the training itself would raise.
    """
    from train.lora import apply_lora_options
    from train.students.build import build_student

    # Without a number the data's counts; a head of another size is drawn anew, so any will do here.
    classes = None if config.task == "features" else config.num_classes or 2
    student = build_student(
        config.student,
        num_classes=classes,
        image_size=config.image_size,
        student_path=config.student_path,
        pretrained=config.pretrained,
    )
    apply_lora_options(student, config.model_dump(), trained=False)


def check_data(extraction: ExtractConfig, training: TrainConfig) -> None:
    """List the data set: splits to train on and to validate on, and no more classes than the head is to have.

    Raises:
        OptionError: naming what the data set has.
        SourceError: when it cannot be read.
    """
    from extract.sources.detect import open_source

    # A missing split is cut later: that may take reading every file, and changes neither names nor classes.
    source = open_source(
        extraction.data,
        extraction.source,
        split=extraction.split or None,
        val_fraction=0.0,
        **extraction.source_options,
    )
    if len(source.parts) > 1 and not {"train", "val"} <= source.parts.keys():
        raise OptionError(
            f"--dataset_id: {source.root} has the splits {', '.join(sorted(source.parts))}, expected train and val: "
            "add what is missing, or name the data set that has val with --val_dataset_id"
        )
    classes, asked = len(source.class_names), training.num_classes
    if training.task != "features" and asked is not None and asked < classes:
        raise OptionError(
            f"--num_classes: {source.root} has {classes} classes, got {asked}: raise it, or leave it out"
        )
