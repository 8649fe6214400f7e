"""A run folder: its files, and whether a run may start in it or be resumed.

`RunFolder` is the only reader and writer of config.json, metrics.jsonl and summary.json; the content of checkpoints is
`train.checkpoint`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from console.options import names_where
from console.output import get_logger, plain_json, redact_values
from files.writing import check_writable, replace_file, replacing, shortened
from store.format import RANDOM_WEIGHTS_NOTICE
from store.reader import Store
from train.config import TrainConfig, config_to_json
from train.errors import ConfigError, TrainError

log = get_logger("train")

CONFIG, METRICS, EVENTS, SUMMARY = "config.json", "metrics.jsonl", "events.jsonl", "summary.json"
LATENCY = "latency.json"  # measured by `cli report`
#: What the detector of `--boxes-from` found.
BOXES_FOUND = "boxes.npz"
OURS = (CONFIG, METRICS, EVENTS, SUMMARY, LATENCY, BOXES_FOUND, "best.pt", "last.pt")
#: The folder of phase one, and the `phase` of its lines in metrics.jsonl.
PRETRAIN = "pretrain"
#: The rotations of the teachers' features, with `--standardize phi-s`.
ROTATIONS = "rotations"
OUR_FOLDERS = ("tensorboard", "control", PRETRAIN, ROTATIONS, "ultralytics", "wandb", "mlflow")

PACKAGES = ("torch", "timm", "accelerate", "numpy", "zarr", "peft", "ultralytics")


class RunFolder:
    """The folder of one run, and its files. It may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / CONFIG, path / METRICS, path / SUMMARY
        self.events = path / EVENTS  # written by `train.events`
        self.best, self.last = path / "best.pt", path / "last.pt"

    # What is in it -----------------------------------------------------------------------------------------------

    def has_results(self) -> bool:
        """Whether a run has saved anything: a checkpoint, an epoch's line, a summary."""
        written = self.metrics.exists() and self.metrics.stat().st_size > 0
        files = (
            self.summary,
            self.best,
            self.last,
            self.path / PRETRAIN / "best.pt",
            self.path / PRETRAIN / "last.pt",
        )
        return written or any(file.exists() for file in files)

    def has_config(self) -> bool:
        """Whether config.json is that of a run: other programs have files of that name too."""
        return {"options", "resolved"} <= self.read_config().keys()

    def is_interrupted(self) -> bool:
        """Whether there is a checkpoint of one of the phases to continue from, and no summary."""
        started = (
            self.last.exists() or (self.path / PRETRAIN / "last.pt").exists() or self.phase_one() is not None
        )
        return started and not self.summary.exists()

    def is_pretrained(self) -> bool:
        """Whether this is the folder of a phase one that is complete."""
        return bool((self.read_summary() or {}).get("complete")) and self.best.exists()

    def phase_one(self) -> Path | None:
        """The checkpoint that phase two of this run starts from; None for a run without phase one."""
        folder = RunFolder(self.path / PRETRAIN)
        return folder.best if folder.is_pretrained() else None

    def is_complete(self, config: TrainConfig) -> bool:
        """Whether the summary answers this command: as many epochs, and a control when one is wanted."""
        summary = self.read_summary() or {}
        enough = summary.get("complete", False) and summary.get("epochs", 0) >= config.epochs
        return bool(enough) and (not config.control or "control" in summary)

    def read_config(self) -> dict[str, Any]:
        """The content of config.json; empty where there is none."""
        return read_json(self.config) or {}

    def read_options(self) -> dict[str, Any] | None:
        """The options that the run was started with; None where there is no run.

        The store is named by its full path, so that the run can be resumed from another working directory.
        """
        if not self.has_config():
            return None
        content = self.read_config()
        options: dict[str, Any] = dict(content["options"])
        if path := content.get("store", {}).get("path"):
            options["store"] = path
        return options

    def read_resolved(self) -> dict[str, Any]:
        """What the run's options were resolved to."""
        resolved: dict[str, Any] = self.read_config()["resolved"]
        return resolved

    def read_summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None when the run has not ended."""
        return read_json(self.summary)

    def read_records(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one per epoch of the task's training, or with `phase` of phase one ("pretrain").

        A last line that is not complete yet is left out.
        """
        return [record for record in self.read_lines() if record.get("phase") == phase]

    def read_lines(self) -> list[dict[str, Any]]:
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # being written, or cut off by a crash
                break
        return records

    # Writing -----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        make_folder(self.path)

    def write_config(
        self, config: TrainConfig, resolved: Mapping[str, Any], store: Mapping[str, Any]
    ) -> None:
        """config.json: the options, what they were resolved to, versions, and the store's fingerprint."""
        content = {
            "options": config_to_json(config),
            "resolved": dict(resolved),
            "store": dict(store),
            "versions": installed_versions(),
        }
        write_json(self.config, content)

    def write_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """metrics.jsonl of these epochs (after a resume: without the lines of steps that are repeated).

        The lines of phase one, as they are in its folder, come before them.
        """
        before = [{"phase": PRETRAIN, **record} for record in RunFolder(self.path / PRETRAIN).read_records()]
        lines = [json.dumps(plain_json(record)) + "\n" for record in [*before, *records]]
        write_text(self.metrics, "".join(lines))

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain_json(record)) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary, summary)

    # Starting and resuming ---------------------------------------------------------------------------------------

    def check_place(self, config: TrainConfig) -> None:
        """Raise ConfigError for a folder that is probably a mistake: --resume without a run, files of others in it.

        For the command line: a training platform keeps files of its own in the output folder.
        """
        folder = self.path
        check_writable(folder, "--out")
        started = self.has_results() or self.has_config()
        if config.resume and not started:
            raise ConfigError(f"--resume: nothing to resume in {folder}: check --out, or leave --resume out")
        if started or not folder.is_dir():
            return
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if others := sorted(visible - {METRICS, EVENTS, *OUR_FOLDERS}):
            raise ConfigError(
                f"--out {folder}: holds other files ({', '.join(others[:3])}{' …' if others[3:] else ''}), expected a "
                "run or an empty folder: name a folder of its own"
            )

    def prepare(self, config: TrainConfig, store: Store) -> None:
        """Create the folder, or check that the run in it may be resumed.

        A start that failed is not a run: its files are removed, or it is resumed (--resume) with any options.
        Raises ConfigError when the folder holds a run and neither --resume nor --overwrite is given, and when the run
        to resume was started with other options or with another store (all that differs is listed).
        """
        taken = self.has_results()
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path}: is a file, expected a folder")
        if taken and not (config.resume or config.overwrite):
            raise ConfigError(
                f"{self.path} holds a run already: pass --resume to continue it, or --overwrite"
            )
        if not config.resume and (taken or self.has_config()):
            self.remove_run()
        self.create()
        if not config.resume:
            self.events.unlink(missing_ok=True)  # of a start that failed
        if config.resume and taken:
            self.check_same_options(config)
            self.check_same_store(store_reference(store, config))

    def take_boxes(self, other: RunFolder) -> None:
        """Copy what the detector of `--boxes-from` found for another run."""
        if (other.path / BOXES_FOUND).exists():
            self.create()
            with replacing(self.path / BOXES_FOUND) as partial:
                shutil.copyfile(other.path / BOXES_FOUND, partial)

    def remove_run(self) -> None:
        """Delete what an earlier run wrote, and no other file of the folder."""
        for pattern in (*OURS, "adapters.pt", "checkpoint_epoch_*.pt", "*_run_id"):
            for path in self.path.glob(pattern):
                path.unlink()
        for name in OUR_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def check_same_options(self, config: TrainConfig) -> None:
        """Raise ConfigError when the run was started with other options."""
        before, now = self.read_config().get("options", {}), config_to_json(config)
        compared = before.keys() & now.keys() - names_where(TrainConfig, "free_on_resume") - {"sources"}
        differing = [
            f"{name} {before[name]} → {now[name]}"
            for name in sorted(compared)
            if before[name] != now[name] and (name != "control" or before[name])  # a control may be added
        ]
        if differing:
            raise ConfigError(
                f"--resume {self.path}: other options than the run was started with: {', '.join(differing)}"
            )

    def check_same_store(self, store: Mapping[str, Any]) -> None:
        """Raise ConfigError when the run learned from other data so far; a store that only moved is the same."""
        before = self.read_config().get("store", {})
        teachers = before.get("teachers", store["teachers"])
        if before.get("fingerprint") in (None, store["fingerprint"]) and teachers == store["teachers"]:
            return
        # Runs of older versions recorded the first alone.
        compared = ("teacher", "teachers", "splits", "class_names")
        differing = [
            f"{name} {before[name]} → {store[name]}"
            for name in compared
            if name in before and before[name] != store[name]
        ]
        raise ConfigError(
            f"--resume {self.path}: {store['path']} is not the data that the run was started with "
            f"({'; '.join(differing) or 'images, targets or preprocessing differ'}; fingerprint "
            f"{before['fingerprint'][:8]} → {store['fingerprint'][:8]}): resume with the store as it was, or start "
            "another run with another --out"
        )

    def check_same_distillation(self, resolved: Mapping[str, Any]) -> None:
        """Raise ConfigError when `auto` options are resolved differently now, as after `cli probe` added logits."""
        before, now = self.read_resolved(), json.loads(json.dumps(resolved))  # tuples are lists there
        differing = []
        for name in ("augment", "distilled", "other_teachers"):
            old, new = before.get(name), now[name]
            if isinstance(old, dict) and isinstance(new, dict):
                differing += [
                    f"{key} {old[key]} → {new[key]}" for key in old if key in new and old[key] != new[key]
                ]
            elif old != new and old is not None:
                differing.append(f"{name} {old} → {new}")
        if differing:
            raise ConfigError(
                f"--resume {self.path}: the store offers other targets than when the run was started "
                f"({', '.join(differing)}): name the earlier ones (--distillation-type, --teacher-logits), or start "
                "another run with another --out"
            )


def make_folder(folder: Path) -> None:
    """Create the folder that --out names. Raises TrainError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise TrainError(f"--out {folder}: is a file, expected a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainError(
            f"--out {shortened(str(folder))}: cannot be created: {reason}; choose another place"
        ) from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file, or none that is complete."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, complete or not at all; not-a-number becomes null, passwords in addresses are hidden."""
    write_text(path, json.dumps(redact_values(plain_json(content)), indent=2, ensure_ascii=False) + "\n")


def warn_of_random_teacher(path: str, store: Store) -> None:
    """Warn where the teacher of the features in `store`, at `path` as the user wrote it, has random weights."""
    if store.manifest.teacher.random_weights:
        log.warning("%s: teacher of %s", path, RANDOM_WEIGHTS_NOTICE)


def rotations_folder(config: TrainConfig) -> Path | None:
    """Where a run keeps the rotations of `--standardize phi-s`; None for other standardizations."""
    return config.out / ROTATIONS if config.standardize == "phi-s" else None


def store_reference(store: Store, config: TrainConfig) -> dict[str, Any]:
    """What config.json and summary.json record of the store. `teachers`: name → fingerprint of those that are learned from."""
    names = config.teacher_names or [store.teacher_name]
    return {
        "path": store.location,
        "fingerprint": store.fingerprint,
        "teacher": store.manifest.teacher.name,
        "teacher_fingerprint": store.manifest.teacher.fingerprint,
        "random_teacher": store.manifest.teacher.random_weights,
        "teachers": {name: store.of_teacher(name).manifest.teacher.fingerprint for name in names},
        "splits": {name: len(split) for name, split in store.items()},
        "class_names": list(store.manifest.class_names),
    }


def write_text(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise TrainError(f"{path}: cannot be written: {error.strerror}") from error


def installed_versions() -> dict[str, str]:
    """Versions of the packages that influence a result."""
    found = {}
    for name in (*PACKAGES, "qwen-distill"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
