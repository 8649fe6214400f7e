"""The run folder: config.json, metrics.jsonl, summary.json, and whether a run may start, go on or start anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from console.log import get_logger
from console.options import names_where
from console.output import plain_json
from console.redaction import redact_values
from files.writing import check_writable, replace_file, shortened
from store.format import RANDOM_WEIGHTS_NOTICE
from store.reader import Store
from train.config import TrainConfig, config_to_json
from train.errors import ConfigError, TrainError

log = get_logger("train")

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
LATENCY = "latency.json"  # measured by `cli report`
OURS = (CONFIG, METRICS, SUMMARY, LATENCY, "best.pt", "last.pt")
OUR_FOLDERS = ("tensorboard", "control", "ultralytics", "wandb", "mlflow")

PACKAGES = ("torch", "timm", "accelerate", "numpy", "zarr", "peft", "ultralytics")


def prepare_run_folder(config: TrainConfig, store: Store) -> Path:
    """Create the run folder, or check that the run in it may be resumed.

    What a start that failed left behind is no run: it is removed, or resumed (--resume) with any options.
    Raises ConfigError when it holds a run and neither --resume nor --overwrite is given, and when the run to
    resume was started with other options or with another store (all that differs is listed).
    """
    folder = config.out
    taken = has_results(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file, expected a folder")
    if taken and not (config.resume or config.overwrite):
        raise ConfigError(f"{folder} holds a run already: pass --resume to continue it, or --overwrite")
    if not config.resume and (taken or has_config(folder)):
        remove_run(folder)
    make_folder(folder)
    if config.resume and taken:
        check_same_run(config)
        check_same_store(config, store_reference(store))
    return folder


def check_run_folder(config: TrainConfig) -> None:
    """Raise ConfigError for a folder that a user can hardly mean: --resume without a run, files of others in it.

    For the command line: a training platform keeps files of its own in the output folder.
    """
    folder = config.out
    check_writable(folder, "--out")
    started = has_results(folder) or has_config(folder)
    if config.resume and not started:
        raise ConfigError(f"--resume: nothing to resume in {folder}: check --out, or leave --resume out")
    if started or not folder.is_dir():
        return
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if others := sorted(visible - {METRICS, *OUR_FOLDERS}):
        raise ConfigError(
            f"--out {folder}: holds other files ({', '.join(others[:3])}{' …' if others[3:] else ''}), expected a run "
            "or an empty folder: name a folder of its own"
        )


def has_results(folder: Path) -> bool:
    """Whether a run in the folder has saved anything: a checkpoint, an epoch's line, a summary."""
    metrics = folder / METRICS
    written = metrics.exists() and metrics.stat().st_size > 0
    return written or any((folder / name).exists() for name in (SUMMARY, "best.pt", "last.pt"))


def has_config(folder: Path) -> bool:
    """Whether the folder's config.json is that of a run: other programs have files of that name too."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"options", "resolved"} <= content.keys()


def make_folder(folder: Path) -> None:
    """Create the folder that --out names. Raises TrainError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise TrainError(f"--out {folder}: is a file, expected a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainError(
            f"--out {shortened(str(folder))}: cannot be created: {reason}; choose another place"
        ) from None


def remove_run(folder: Path) -> None:
    """Delete what an earlier run wrote, and nothing else that may lie in the folder."""
    for pattern in (*OURS, "adapters.pt", "checkpoint_epoch_*.pt", "*_run_id"):
        for path in folder.glob(pattern):
            path.unlink()
    for name in OUR_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def check_same_run(config: TrainConfig) -> None:
    """Raise ConfigError when the folder's run was started with other options."""
    path = config.out / CONFIG
    if not path.exists():
        return
    before, now = read_json(path).get("options", {}), config_to_json(config)
    differing = [
        f"{name} {before[name]} → {now[name]}"
        for name in sorted(
            before.keys() & now.keys() - names_where(TrainConfig, "free_on_resume") - {"sources"}
        )
        if before[name] != now[name] and (name != "control" or before[name])  # a control may be added
    ]
    if differing:
        raise ConfigError(
            f"--resume {config.out}: other options than the run was started with: {', '.join(differing)}"
        )


def check_same_store(config: TrainConfig, store: Mapping[str, Any]) -> None:
    """Raise ConfigError when the run learned from other data so far; a store that only moved is the same."""
    before = read_json(config.out / CONFIG).get("store", {})
    if before.get("fingerprint") in (None, store["fingerprint"]):
        return
    compared = ("teacher", "splits", "class_names")  # runs of older versions recorded the first alone
    differing = [
        f"{name} {before[name]} → {store[name]}" for name in compared if differs(name, before, store)
    ]
    raise ConfigError(
        f"--resume {config.out}: {store['path']} is not the data that the run was started with "
        f"({'; '.join(differing) or 'images, targets or preprocessing differ'}; fingerprint {before['fingerprint'][:8]} → "
        f"{store['fingerprint'][:8]}): resume with the store as it was, or start another run with another --out"
    )


def differs(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return name in before and before[name] != now[name]


def check_same_distillation(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Raise ConfigError when `auto` options come to something else than before, as after `cli probe` added logits."""
    before = read_resolved(folder)
    compared = {name: (before.get(name), resolved[name]) for name in ("augment", "distilled")}
    differing = []
    for name, (old, new) in compared.items():
        if isinstance(old, dict) and isinstance(new, dict):
            differing += [
                f"{key} {old[key]} → {new[key]}" for key in old if key in new and old[key] != new[key]
            ]
        elif old != new and old is not None:
            differing.append(f"{name} {old} → {new}")
    if differing:
        raise ConfigError(
            f"--resume {folder}: the store offers other targets than when the run was started ({', '.join(differing)}): "
            "name the earlier ones (--distillation-type, --teacher-logits), or start another run with another --out"
        )


def read_options(folder: Path) -> dict[str, Any] | None:
    """The options that the run in the folder was started with; None where there is no run.

    The store is named by its full path, so that the run can be resumed from another working directory.
    """
    if not has_config(folder):
        return None
    content = read_json(folder / CONFIG)
    options: dict[str, Any] = dict(content["options"])
    if path := content.get("store", {}).get("path"):
        options["store"] = path
    return options


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


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
    resolved: dict[str, Any] = read_json(folder / CONFIG)["resolved"]
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
    write_text(path, json.dumps(redact_values(plain_json(content)), indent=2, ensure_ascii=False) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The content of summary.json; None when the run has not ended."""
    path = folder / SUMMARY
    return read_json(path) if path.exists() else None


def is_complete(summary: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether an earlier summary answers this command: as many epochs, and a control when one is wanted."""
    enough = summary.get("complete", False) and summary.get("epochs", 0) >= config.epochs
    return bool(enough) and (not config.control or "control" in summary)


def warn_of_random_teacher(path: str, store: Store) -> None:
    """Say so where the teacher of the features in `store`, at `path` as the user wrote it, has random weights."""
    if store.manifest.teacher.random_weights:
        log.warning("%s: teacher of %s", path, RANDOM_WEIGHTS_NOTICE)


def store_reference(store: Store) -> dict[str, Any]:
    """What config.json and summary.json say about the store."""
    return {
        "path": store.location,
        "fingerprint": store.fingerprint,
        "teacher": store.manifest.teacher.name,
        "teacher_fingerprint": store.manifest.teacher.fingerprint,
        "random_teacher": store.manifest.teacher.random_weights,
        "splits": {name: len(split) for name, split in store.items()},
        "class_names": list(store.manifest.class_names),
    }


def write_text(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
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
