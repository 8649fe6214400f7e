"""What a task can be made of on this machine: the teachers below the models root, the data sets below theirs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.server.tools import ToolError, run_module
from backend.task.errors import OptionError
from backend.task.safety import check_id, inside

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
#: More samples than this are not looked at one by one for the labeled share of a split.
LOOKED_AT = 50_000
DETECTION_TIMEOUT_S = 120.0
KEPT_S = 60.0


# -- teachers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A checkpoint below the models root: a folder with config.json, or a file of weights (a timm encoder's)."""

    name: str
    kind: str
    bytes: int

    @property
    def is_file(self) -> bool:
        return self.kind == "weights"


def list_teachers(models_root: Path) -> list[Teacher]:
    """The checkpoints in the models root, by name; empty where there is no such folder."""
    return sorted(find_teachers(models_root), key=lambda teacher: teacher.name.lower())


def find_teachers(models_root: Path) -> Iterator[Teacher]:
    for path in visible_entries(models_root):
        if path.is_dir():
            kind = model_type(path / "config.json")
            if kind:
                weights = [file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES]
                yield Teacher(name=path.name, kind=kind, bytes=sum(file.stat().st_size for file in weights))
        elif path.suffix in WEIGHT_SUFFIXES:
            yield Teacher(name=path.name, kind="weights", bytes=path.stat().st_size)


def model_type(config: Path) -> str:
    """`model_type` of a checkpoint's config.json; empty for a file that has none."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(content.get("model_type", "")) if isinstance(content, dict) else ""


def visible_entries(folder: Path) -> list[Path]:
    """What a folder holds, without hidden files; empty where it cannot be listed."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


# -- data sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """A split: its samples, and how many of `looked_at` have a label, boxes or a mask."""

    samples: int
    labeled: int
    looked_at: int


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What was detected in a data set; `problem` says why it cannot be opened."""

    id: str
    kind: str = ""
    task: str = ""
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, SplitFacts] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    problem: str = ""

    @property
    def samples(self) -> int:
        return sum(split.samples for split in self.splits.values())

    @property
    def labeled_share(self) -> float | None:
        """None for a data set without samples."""
        looked_at = sum(split.looked_at for split in self.splits.values())
        return sum(split.labeled for split in self.splits.values()) / looked_at if looked_at else None


def list_data_sets(datasets_root: Path) -> list[str]:
    """The ids below the data sets' root; empty where there is no such folder."""
    return sorted(path.name for path in visible_entries(datasets_root) if path.is_dir() and is_id(path.name))


def is_id(name: str) -> bool:
    try:
        check_id("dataset_id", name)
    except OptionError:
        return False
    return True


_detected: dict[Path, tuple[float, DataSet]] = {}  # when, what


async def detect_data_set(datasets_root: Path, dataset_id: str) -> DataSet:
    """What the sources of stage one find in a data set, by a process of its own: a large one takes a while.

    The answer is kept for KEPT_S seconds. An id that leads out of the root is a `problem`, as a folder that cannot be
    opened is.
    """
    try:
        path = inside("dataset_id", datasets_root, check_id("dataset_id", dataset_id))
    except OptionError as error:
        return DataSet(id=dataset_id, problem=str(error))
    when, found = _detected.get(path, (-KEPT_S, None))
    if found is not None and time.monotonic() - when < KEPT_S:
        return found
    try:
        output = await run_module("backend.server.catalog", [str(path)], DETECTION_TIMEOUT_S)
    except ToolError as error:
        return DataSet(id=dataset_id, problem=str(error))
    _detected[path] = time.monotonic(), data_set_of(dataset_id, json.loads(output))
    return _detected[path][1]


def data_set_of(dataset_id: str, content: Mapping[str, Any]) -> DataSet:
    return DataSet(
        id=dataset_id,
        kind=content["kind"],
        task=content["task"],
        class_names=tuple(content["class_names"]),
        splits={name: SplitFacts(**facts) for name, facts in content["splits"].items()},
        warnings=tuple(content["warnings"]),
    )


def describe_source(path: Path) -> dict[str, Any]:
    """The content of a DataSet as plain JSON types. Raises SourceError when it cannot be opened."""
    from extract.sources.detect import open_source

    source = open_source(path, val_fraction=0.0)
    splits = {}
    for name, samples in source.splits.items():
        step = max(1, len(samples) // LOOKED_AT)
        rows = range(0, len(samples), step)
        labeled = sum(
            sample.label is not None or sample.boxes is not None or sample.mask is not None
            for sample in (samples[row] for row in rows)
        )
        splits[name] = {"samples": len(samples), "labeled": labeled, "looked_at": len(rows)}
    return {
        "kind": source.kind,
        "task": source.task,
        "class_names": list(source.class_names),
        "splits": splits,
        "warnings": list(source.warnings),
    }


def main() -> int:
    """The process that `detect_data_set` starts: one JSON object on stdout, or one line on stderr and exit code 1."""
    from store.errors import DistillError

    try:
        print(json.dumps(describe_source(Path(sys.argv[1]))))
    except (DistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
