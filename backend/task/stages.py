"""One task from data to report: features from the cache or extracted into it, training, evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.task.calls import PipeSender, Sender, TaskCalls
from backend.task.configs import StageConfigs
from backend.task.errors import OptionError, PlatformError
from backend.task.events import ExtractionEvents, TrainingEvents
from backend.task.feature_cache import (
    FeatureCache,
    cache_key,
    digest_folder,
    digest_source,
    teacher_digest,
)
from backend.task.request import TaskRequest
from console.devices import device_index
from console.output import get_logger
from processes.stop import Stopped, StopRequest

if TYPE_CHECKING:
    from extract.config import ExtractConfig
    from train.config import TrainConfig

log = get_logger("platform")

# What of a summary goes into `detailedResults`.
DETAILS = [
    *("student", "task", "num_classes", "epochs_done", "best_epoch", "metrics", "control", "parameters"),
    "platform",
]


class TaskPipeline:
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
        make_folder("output_dir", request.output_dir)
        make_folder("cache_dir", request.cache_dir)
        check_devices(request.devices)
        store = self.features()
        summary = self.train(store)
        self.send_evaluation(summary, store)
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
        with self.cache.lock(key, f"task {self.request.task_id}", self.stop, self.extraction.send):
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
        return cache_key({**self.configs.store_features(), "weights": teacher, "data": self.data_digests()})

    def data_digests(self) -> dict[str, str]:
        request, memo = self.request, self.cache.digests
        if request.database:
            # Rows of the query with their contents: a database has no times of change to rely on.
            from extract.plan import open_data

            source = open_data(self.configs.extract_config(Path("unused")))
            return {"rows": digest_source(source, self.check_stop)}
        folders = request.splits or {"all": str(request.dataset_dir)}
        return {name: digest_folder(Path(path), memo, self.check_stop) for name, path in folders.items()}

    def extract(self, path: Path) -> None:
        from extract.plan import DifferentStore
        from extract.run import run_extraction

        config = self.configs.extract_config(path)
        try:
            result = run_extraction(config, [self.extraction], self.stop)
        except DifferentStore as error:
            # Another precision (a GPU's, a CPU's) or another version of ours was stopped half-way: no task uses it.
            log.warning("features: replacing a store that was never finished: %s", error)
            result = run_extraction(
                config.model_copy(update={"overwrite": True}), [self.extraction], self.stop
            )
        if not result.complete:
            raise PlatformError(f"{path}: the extraction ended without being complete: see the log")
        counts = (result.rows, result.bad, result.images_per_second)
        log.info("features: %d images, %d unreadable, %.1f images/s", *counts)

    def add_logits(self, path: Path) -> None:
        """A store of another task may lack the class logits that this one needs: they are made from its features."""
        config = self.configs.extract_config(path)
        if config.logits != "none":
            from extract.logits import add_logits

            add_logits(config, [self.extraction], self.stop)

    # -- stage two --------------------------------------------------------------------------------------

    def train(self, store: Path) -> dict[str, Any]:
        """Train, or resume the run in the output folder; the content of summary.json."""
        self.check_stop()
        config = self.configs.train_config(store)
        if config.resume:
            log.info("%s holds a run: resuming it", self.request.output_dir)
        if len(config.devices) > 1 and config.student_type != "yolov8":
            from backend.task.worker import train_on_ranks

            pipe = self.sender.descriptor if isinstance(self.sender, PipeSender) else None
            return train_on_ranks(config, self.request.task_id, pipe, self.stop)
        from train.run import run_training

        listener = TrainingEvents(self.calls, self.sender, config.epochs, config.out)
        return dict(run_training(config, [listener], self.stop))

    # -- the end ----------------------------------------------------------------------------------------

    def send_evaluation(self, summary: dict[str, Any], store: Path) -> None:
        """Publish the best model, note the platform's part in summary.json, send the evaluation."""
        from console.output import plain_json
        from store.reader import open_store
        from train.run_folder import RunFolder

        request = self.request
        TrainingEvents(self.calls, self.sender, self.epochs, request.output_dir).publish_best()
        summary["platform"] = {"task_id": request.task_id, "notes": self.configs.notes}
        RunFolder(request.output_dir).write_summary(summary)
        evaluations = self.calls.evaluations(
            values=evaluation_values(summary.get("metrics") or {}),
            dataset_id=request.val_dataset_id,
            dataset_name=request.val_dataset_id,
            samples=int(open_store(store)["val"].valid.sum()),
            details={name: plain_json(summary[name]) for name in DETAILS if name in summary},
        )
        self.sender.send(evaluations)


def make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise PlatformError(
            f"--{option}: {path}: {error.strerror}: give a folder that this user can write to"
        ) from None


def is_complete(path: Path) -> bool:
    """True when there is a finished store at `path`."""
    from store.errors import StoreError
    from store.reader import open_store

    if not path.exists():
        return False
    try:
        return bool(open_store(path, allow_incomplete=True).manifest.complete)
    except StoreError:
        return False


def evaluation_values(metrics: MappingType[str, Any]) -> dict[str, Any]:
    """Final metrics under the names of the evaluations call, fractions of 1. F1 of detection is P and R's."""
    precision, recall = (metrics.get(name, metrics.get(f"macro_{name}")) for name in ("precision", "recall"))
    f1 = metrics.get("macro_f1")
    if f1 is None and precision is not None and recall is not None:
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    detection = {"map50": metrics.get("map50"), "map95": metrics.get("map50_95")}
    return {"precision": precision, "recall": recall, "f1Score": f1, **detection}


# -- what a task cannot work with, found before hours of extraction instead of after them ------------------


def check_devices(devices: tuple[str, ...]) -> None:
    """Raises PlatformError for a GPU that is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = [device_index(name) for name in devices if name != "cpu"]
    missing = [str(number) for number in numbers if number >= count]
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

    # Without a number the data's counts; a head of another size is initialized randomly, so any will do here.
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
    if len(source.splits) > 1 and not {"train", "val"} <= source.splits.keys():
        raise OptionError(
            f"--dataset_id: {source.root} has the splits {', '.join(sorted(source.splits))}, expected train and val: "
            "add what is missing, or name the data set that has val with --val_dataset_id"
        )
    classes, asked = len(source.class_names), training.num_classes
    if training.task != "features" and asked is not None and asked < classes:
        raise OptionError(
            f"--num_classes: {source.root} has {classes} classes, got {asked}: raise it, or leave it out"
        )
