"""The run folder: config.json, metrics.jsonl, summary.json, and whether a run may start, go on or start anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from console.output import plain_json
from train.config import TrainConfig, config_to_json
from train.errors import ConfigError, TrainError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
OURS = (CONFIG, METRICS, SUMMARY, "best.pt", "last.pt")

#: What may differ between the command that started a run and the one that resumes it.
FREE_ON_RESUME = frozenset(
    [
        "store",
        "out",
        "epochs",
        "device",
        "workers",
        "resume",
        "overwrite",
        "control",
        "data_root",
        "tracker",
        "auto_batch",
        "checkpoint_interval",
        "checkpoint_minutes",
        "sources",
        "student_path",
        "pretrained",
        "early_stopping_patience",
        "compile",
    ]
)
PACKAGES = ("torch", "timm", "accelerate", "numpy", "zarr", "peft", "ultralytics")


def prepare_run_folder(config: TrainConfig) -> Path:
    """Create the run folder, or check that the run in it may go on.

    Raises ConfigError when it holds a run and neither --resume nor --overwrite is given, and when the run to
    resume was started with other options (all that differ are listed).
    """
    folder = config.out
    taken = folder.exists() and any((folder / name).exists() for name in OURS)
    if taken and config.overwrite:
        remove_run(folder)
    elif taken and not config.resume:
        raise ConfigError(f"{folder} holds a run already: pass --resume to continue it, or --overwrite")
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file, expected a folder")
    make_folder(folder)
    if config.resume:
        check_same_run(config)
    return folder


def make_folder(folder: Path) -> None:
    """Create the folder that --out names. Raises TrainError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out {folder}: cannot be created: {error.strerror}") from None


def remove_run(folder: Path) -> None:
    """Delete what an earlier run wrote, and nothing else that may lie in the folder."""
    for pattern in (*OURS, "adapters.pt", "checkpoint_epoch_*.pt", "*_run_id"):
        for path in folder.glob(pattern):
            path.unlink()
    for name in ("tensorboard", "control", "ultralytics", "wandb", "mlflow"):
        shutil.rmtree(folder / name, ignore_errors=True)


def check_same_run(config: TrainConfig) -> None:
    """Raise ConfigError when the folder's run was started with other options."""
    path = config.out / CONFIG
    if not path.exists():
        return
    before, now = json.loads(path.read_text()).get("options", {}), config_to_json(config)
    differing = [
        f"{name} {before[name]} → {now[name]}"
        for name in sorted(before.keys() & now.keys() - FREE_ON_RESUME)
        if before[name] != now[name]
    ]
    if differing:
        raise ConfigError(
            f"--resume {config.out}: other options than the run was started with: {', '.join(differing)}"
        )


def write_config(
    folder: Path, config: TrainConfig, resolved: Mapping[str, Any], store: Mapping[str, Any]
) -> None:
    """config.json: the options, what they were resolved to, versions, and the store's fingerprint."""
    content = {
        "options": config_to_json(config),
        "resolved": dict(resolved),
        "store": dict(store),
        "versions": installed_versions(),
    }
    write_json(folder / CONFIG, content)


def read_resolved(folder: Path) -> dict[str, Any]:
    """What a run's options were resolved to, from its config.json."""
    resolved: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["resolved"]
    return resolved


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """metrics.jsonl from a run's history (after a resume: without the lines of steps that are repeated)."""
    write_text(folder / METRICS, "".join(json.dumps(plain_json(record)) + "\n" for record in history))


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Add one epoch's line to metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain_json(record)) + "\n")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, complete or not at all; not-a-number becomes null."""
    write_text(path, json.dumps(plain_json(content), indent=2, ensure_ascii=False) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The content of summary.json; None when the run has not ended."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def is_complete(summary: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether an earlier summary answers this command: as many epochs, and a control when one is wanted."""
    enough = summary.get("complete", False) and summary.get("epochs", 0) >= config.epochs
    return bool(enough) and (not config.control or "control" in summary)


def store_reference(store: Any) -> dict[str, Any]:
    """What config.json and summary.json say about the store."""
    return {
        "path": store.location,
        "fingerprint": store.fingerprint,
        "teacher": store.manifest.teacher.name,
        "teacher_fingerprint": store.manifest.teacher.fingerprint,
        "random_teacher": store.manifest.teacher.random_weights,
    }


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainError(f"{path}: cannot be written: {error.strerror}") from error


def installed_versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    found = {}
    for name in (*PACKAGES, "qwen-distill"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
