"""The stores of teacher features below the output root: a list that is cheap to make, and what takes longer on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.server.tools import run_command
from console.output import redact
from store.errors import StoreError
from store.format import MEASURED_FILE
from store.metadata import ZARR_JSON, parse_manifest, read_json
from store.summary import bytes_on_disk

SUFFIX = ".zarr"
#: Folders below the output root that are looked through: the cache's stores are in `feature_cache`, others in runs.
DEPTH = 3
PICTURES = 12
INSPECT_TIMEOUT_S, VERIFY_TIMEOUT_S, PROBE_TIMEOUT_S = 180.0, 3600.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class StoreSummary:
    """A store as the list shows it.

    Attributes:
        name: its path below the output root.
        image_size: of the teacher's input, pixels.
        accuracies: what `cli probe` measured: name of the metric → share of 1.
        problem: why it cannot be opened; then the rest is empty.
    """

    name: str
    path: Path
    complete: bool = False
    teacher: str = ""
    random_weights: bool = False
    source: str = ""
    data: str = ""
    rows: Mapping[str, int]
    classes: int = 0
    grid: int | None = None
    image_size: int = 0
    bytes: int = 0
    accuracies: Mapping[str, float]
    problem: str = ""


def list_stores(output_root: Path) -> list[StoreSummary]:
    """All stores, the latest first. Reads metadata and file sizes only."""
    found = sorted(find_stores(output_root, DEPTH), key=lambda path: -path.stat().st_mtime)
    return [summarize(path, output_root) for path in found]


def find_stores(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for path in entries:
        if path.name.endswith(SUFFIX):
            if (path / ZARR_JSON).is_file():
                yield path
        elif depth > 1 and not path.name.startswith("."):
            yield from find_stores(path, depth - 1)


def summarize(path: Path, output_root: Path) -> StoreSummary:
    name = path.relative_to(output_root).as_posix()
    try:
        manifest = parse_manifest(read_json(path / ZARR_JSON), str(path))
    except (StoreError, OSError, ValueError) as error:
        return StoreSummary(name=name, path=path, rows={}, accuracies={}, problem=str(error))
    return StoreSummary(
        name=name,
        path=path,
        complete=manifest.complete,
        teacher=manifest.teacher.name,
        random_weights=manifest.teacher.random_weights,
        source=manifest.source or "",
        data=redact(manifest.data_root or ""),
        rows=dict(manifest.splits),
        classes=len(manifest.class_names),
        grid=manifest.grid,
        image_size=manifest.preprocessing.image_size,
        bytes=bytes_on_disk(path),
        accuracies=read_accuracies(path),
    )


def read_accuracies(path: Path) -> dict[str, float]:
    """The shares that a probe measured; empty where none has."""
    file = path / MEASURED_FILE
    measured = read_json(file) if file.exists() else {}
    return {
        name: float(value)
        for name, value in measured.items()
        if isinstance(value, float) and 0 <= value <= 1 and name not in ("extraction_s", "encoded")
    }


async def describe_store(path: Path) -> dict[str, Any]:
    """What `cli inspect --json` says of a store. Raises ToolError."""
    return dict(json.loads(await run_command(["inspect", str(path), "--json"], INSPECT_TIMEOUT_S)))


async def draw_pictures(path: Path, folder: Path) -> list[Path]:
    """PNG files of samples next to their grids in colors (principal components); an overview is the last. Raises ToolError."""
    words = ["inspect", str(path), "--pictures", str(folder), "--samples", str(PICTURES), "--json"]
    return [Path(name) for name in json.loads(await run_command(words, INSPECT_TIMEOUT_S))["pictures"]]


async def verify_store(path: Path) -> dict[str, Any]:
    """What `cli verify --json` finds: `ok`, `findings` [{path, problem}], `data`. Raises ToolError."""
    return dict(
        json.loads(await run_command(["verify", str(path), "--json"], VERIFY_TIMEOUT_S, accept=(0, 1)))
    )


async def measure_store(path: Path) -> dict[str, Any]:
    """What `cli probe --json` measures; it also writes the probe's logits. Raises ToolError."""
    return dict(json.loads(await run_command(["probe", str(path), "--json"], PROBE_TIMEOUT_S)))
