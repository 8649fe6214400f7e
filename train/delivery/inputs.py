"""Real inputs for checks, calibration and timing: from the run's store, or from a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.decode import IMAGE_SUFFIXES, decode
from store import open_store
from train.config import TrainConfig
from train.delivery.model import ModelCard
from train.errors import DeliveryError
from train.images import ImageReader
from train.rundir import CONFIG


def sample_inputs(run: Path, card: ModelCard, count: int, images: Path | None = None) -> NDArray[np.float32]:
    """`count` normalised inputs float32 [B, 3, S, S], spread evenly over the run's validation split.

    Raises DeliveryError when the run's store is gone and no folder was named instead.
    """
    if images is not None:
        pixels = [
            card.render(decode(path, target_size=card.image_size).image)
            for path in image_files(images)[:count]
        ]
    else:
        pixels = split_pixels(run, card, count)
    return card.normalize(np.stack(pixels))


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted; DeliveryError when there are none."""
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not files:
        raise DeliveryError(f"{folder}: no image files in it")
    return files


def split_pixels(run: Path, card: ModelCard, count: int) -> list[NDArray[np.uint8]]:
    """Rendered images of the split that the run was validated on."""
    config = run_options(run)
    store = open_store(config.store)
    reader = image_reader(config, store, config.val_split)
    rows = spread(np.flatnonzero(store[config.val_split].valid), count)
    return [card.render(reader.read(int(row), card.image_size).image) for row in rows]


def image_reader(config: TrainConfig, store: Any, split: str) -> ImageReader:
    """Reads the images of a split: from the store, or from the data set's root."""
    root = config.data_root or store.manifest.data_root
    return ImageReader(store[split], Path(root) if root else None)


def run_options(run: Path) -> TrainConfig:
    """The options that a run was trained with, from config.json in its folder (or beside its checkpoint)."""
    path = (run if run.is_dir() else run.parent) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["options"]
        return TrainConfig(**values)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DeliveryError(f"{path}: the run's configuration cannot be read: {reason}") from None


def spread(rows: Sequence[int] | NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of `rows`, evenly spread."""
    rows = np.asarray(rows)
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
