"""Phase one of `cli train --pretrain-epochs`: the student learns what the teacher knows of all rows, labeled or not.

Those are the stored features, and for U-Nets the stored soft class maps, of rows with a mask as well: no label is used. It is a
training in RUN/pretrain, a run folder of its own; phase two starts from its best.pt. Its epochs are in the run's metrics.jsonl
too, before those of phase two. The trials of a sweep that differ in phase two
alone share one phase one: it is trained in a folder that is named after everything that determines it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from console.output import get_logger
from files.locking import locked
from files.writing import publish
from processes.stop import StopDeadline, Stopped, StopRequest
from store.format import MAPS, POOLED, TEACHERS
from store.reader import Split, Store
from train.config import TrainConfig, config_to_json
from train.errors import ConfigError
from train.events import EpochEnded, Event, EventStream, PhaseOneEpochEnded
from train.fit import FitRequest, FitResult
from train.loop.machine import choose_device
from train.loop.trainer import LoopTrainer
from train.memory import fit_in_memory
from train.ranks import barrier, world_size
from train.run_folder import PRETRAIN, RunFolder, store_reference
from train.students.families import FAMILIES

log = get_logger("train")

#: Options that phase one has in common with phase two. Those of the task and of the losses' weights are not among them.
SHARED = (
    *("store", "student", "out", "data_root", "student_path", "pretrained", "train_split", "val_split"),
    *("dropout", "freeze_encoder", "attention_pooling", "frame_encoder", "gradient_checkpointing", "compile"),
    *("batch_size", "lr_scheduler", "warmup_epochs", "weight_decay", "grad_accum_steps", "max_grad_norm"),
    *("precision", "ema_decay", "augment", "views", "auto_batch"),
    *("teachers", "standardize", "feature_loss_type", "feature_target", "align_feature", "align_head"),
    *("device", "workers", "seed", "deterministic", "resume", "tracker", "checkpoint_minutes"),
)
#: What of them has no influence on the weights.
WITHOUT_EFFECT = frozenset(
    [
        "store",
        "out",
        "data_root",
        "student_path",
        "workers",
        "resume",
        "tracker",
        "checkpoint_minutes",
        "sources",
    ]
)
POLL_S = 0.5
DIGEST_ROWS = 1024
STOPPED_BETWEEN = "stopped between the phases, phase one is complete: resume with cli train --resume"


def phase_one_of(config: TrainConfig, store: Store) -> TrainConfig:
    """Phase one of a run on this store."""
    return phase_one_config(config, config.pretrain_epochs, maps=bool(learned_maps(config, store)))


def phase_one_config(config: TrainConfig, epochs: int, *, maps: bool = False) -> TrainConfig:
    """The label-free training of the student that `config` trains: the same data and student, its own schedule.

    maps: it learns soft class maps too.
    """
    values = {name: getattr(config, name) for name in SHARED}
    sources = {name: source for name, source in config.sources.items() if name in SHARED}
    # YOLO's `auto` is ultralytics' choice, and that of its trainer's loss.
    optimizer = "adamw" if config.optimizer == "auto" else config.optimizer
    learned: dict[str, Any] = {"task": "features", "distillation_type": "feature"}
    if maps:
        learned = {
            "distillation_type": "hybrid",
            "teacher_logits": config.teacher_logits,
            "hard_label_weight": 0.0,
            "distill_until": "end",
        }
    return TrainConfig(
        **values,
        **learned,
        epochs=epochs,
        learning_rate=config.pretrain_learning_rate,
        optimizer=optimizer,
        image_size=config.pretrain_image_size or config.image_size,
        sources=sources,
    )


def learned_maps(config: TrainConfig, store: Store) -> list[str]:
    """The stored soft class maps, which U-Nets learn in phase one unless `feature` is asked for.

    Also where phase two learns features alone by default: a phase one with maps helps, one with features alone does not
    (docs/benchmarks.md, street scenes).
    """
    if FAMILIES[config.student_type].task != "segmentation" or config.task == "features":
        return []
    if config.distillation_type == "feature" and config.is_explicit("distillation_type"):
        return []
    return [name for name in store[config.train_split].names if name.startswith(f"{MAPS}/")]


@dataclass(frozen=True, kw_only=True)
class PhaseOne:
    """Phase one of one run. `config` is the run's, `ours` that of phase one; `run_events`: where the run's listeners are."""

    config: TrainConfig
    ours: TrainConfig
    store: Store
    deadline: StopDeadline
    run_events: EventStream
    is_main: bool

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.out)

    def complete(self) -> dict[str, Any]:
        """Train what is left of it; returns the summary's `pretrain`."""
        folder = RunFolder(self.config.out / PRETRAIN)
        if not folder.is_pretrained():
            if self.config.pretrain_cache is None or world_size() > 1:
                self.train(folder)
            else:
                self.share(folder, self.config.pretrain_cache)
            self.deadline.save = lambda: STOPPED_BETWEEN
        barrier()
        if self.is_main and not self.run.last.exists():
            self.run.write_records([])  # with the lines of phase one
        summary = folder.read_summary() or {}
        names = ("epochs", "best_epoch", "metrics", "samples", "wall_time_s", "images_per_second")
        return {name: summary.get(name) for name in names}

    def train(self, folder: RunFolder) -> None:
        """Train in `folder`; the epochs go to the run's metrics.jsonl as well."""
        ours = self.ours
        log.info(
            "phase one: %s learns the teacher's features%s of all %d samples for %d epochs",
            *(ours.student, "" if ours.task == "features" else " and class maps"),
            *(len(self.store[ours.train_split]), ours.epochs),
        )
        trainer = LoopTrainer(ours)
        if self.is_main:
            folder.create()
            reference = store_reference(self.store, self.config)
            self.run.write_config(self.config, {"phase": PRETRAIN}, reference)
        events = EventStream([self.pass_on])
        if self.is_main:
            events.start(folder)
        request = FitRequest(ours, ours, folder, events, self.deadline, control=False, pretraining=True)
        result = fit_in_memory(trainer, request)
        if self.is_main:
            folder.write_summary(summarize(result, trainer.task, len(trainer.data.train_rows)))
            folder.last.unlink(missing_ok=True)  # optimizer and averages: of no use any more

    def pass_on(self, event: Event) -> None:
        self.run.write_records([])  # the lines of phase one alone, as far as there are any
        if isinstance(event, EpochEnded):
            self.run_events.emit(PhaseOneEpochEnded(event.record, self.ours.epochs))

    def share(self, folder: RunFolder, cache: Path) -> None:
        """Take it from the shared folder, where whoever comes first trains it; its files are copied to the run."""
        key = phase_one_key(self.config, self.store)
        shared = RunFolder(cache / key)
        shared.create()
        with locked(cache / f"{key}.lock", partial(wait_for_other, shared, self.deadline.stop)):
            if shared.is_pretrained():
                log.info("phase one: taken from %s, which differs in nothing", shared.path)
            else:
                self.train(shared)
        folder.create()
        # The summary, which says that it is complete, comes last.
        for source in (shared.config, shared.metrics, shared.best, shared.summary):
            copy = folder.path / f".{source.name}.partial"
            shutil.copyfile(source, copy)
            publish(copy, folder.path / source.name)


def run_phase_one(
    config: TrainConfig,
    store: Store,
    task: str,
    deadline: StopDeadline,
    run_events: EventStream,
    is_main: bool,
) -> dict[str, Any]:
    """Phase one of a run, or what is left of it; returns the summary's `pretrain`.

    Raises ConfigError where there is nothing to learn, and what training raises.
    """
    check(config, store, task)
    return PhaseOne(
        config=config,
        ours=phase_one_of(config, store),
        store=store,
        deadline=deadline,
        run_events=run_events,
        is_main=is_main,
    ).complete()


def check(config: TrainConfig, store: Store, task: str) -> None:
    where = f"pretrain_epochs {config.pretrain_epochs}"
    if task == "features":
        raise ConfigError(f"{where}: task features learns the features already: use --epochs alone")
    if POOLED not in store[config.train_split].names:
        raise ConfigError(
            f"{where}: {config.store} has no features to learn: extract it again, or leave --pretrain-epochs out"
        )


def summarize(result: FitResult, task: str, samples: int) -> dict[str, Any]:
    """The content of phase one's summary.json."""
    return {
        "student": result.student.spec.name,
        "task": task,
        "epochs": result.config.epochs,
        "epochs_done": result.epochs_done,
        "best_epoch": result.best_epoch,
        "samples": samples,
        "metrics": result.metrics,
        "wall_time_s": result.wall_time_s,
        "images_per_second": result.images_per_second,
        **result.details,
        "complete": True,
    }


def phase_one_key(config: TrainConfig, store: Store) -> str:
    """Names everything that determines the weights of phase one: options, data, teacher, device, initial weights."""
    ours = phase_one_of(config, store)
    options = {name: value for name, value in config_to_json(ours).items() if name not in WITHOUT_EFFECT}
    options["device"] = choose_device(ours.devices[0]).type
    path = ours.student_path
    initial = (
        None
        if path is None
        else [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(path)]
    )
    # The same data may be stored with another grid, other layers, or with mirror images.
    stored = [
        spec.model_dump(mode="json")
        for spec in store.whole.manifest.arrays
        if spec.name.startswith(("features/", "views/", TEACHERS))
    ]
    reference = store_reference(store, ours)
    maps = [[name, digest_of(store[ours.train_split], name)] for name in learned_maps(config, store)]
    learned = [reference["fingerprint"], reference["teachers"], *maps]
    text = json.dumps([options, learned, stored, initial], sort_keys=True, default=str)
    return f"{ours.student.replace('/', '-').replace(':', '-')}-{blake2b(text.encode(), digest_size=8).hexdigest()}"


def digest_of(split: Split, name: str) -> str:
    """Of all values of an array: soft class maps are written again, by another probe, under the same name."""
    digest = blake2b(digest_size=16)
    for first in range(0, len(split), DIGEST_ROWS):
        rows = range(first, min(first + DIGEST_ROWS, len(split)))
        digest.update(split.gather(rows, [name])[name].tobytes())
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def wait_for_other(shared: RunFolder, stop: StopRequest, waited_s: float) -> None:
    """Another trial trains the same phase one. Raises Stopped on a stop request."""
    if not waited_s:
        log.info("phase one: another trial trains the same one in %s: waiting for it", shared.path)
    if stop.wait(POLL_S):
        raise Stopped("stopped while waiting for phase one", stop.exit_code)
