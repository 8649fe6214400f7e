"""A further teacher for stores of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from store.create import create_store
from store.finalize import finalize_store
from store.format import (
    CONTENT,
    FRAMES,
    GRID,
    POOLED,
    SIZES,
    Manifest,
    Preprocessing,
    TeacherSpec,
    feature_arrays,
    target_arrays,
)
from store.keys import Plan
from store.reader import Split, open_store
from store.teachers import addition_path, publish_teacher
from store.writer import StoreWriter


def add_teacher(
    path: Path, name: str = "second", *, width: int = 20, invalid: tuple[int, ...] = (), **preprocessing: Any
) -> Path:
    """Add a teacher whose features are a fixed function of the first one's; `invalid` rows of `train` have none."""
    store = open_store(path)
    first = store[store.splits[0]]
    grid = first.specs[GRID].row_shape[0] if GRID in first.names else None
    arrays = feature_arrays(width, grid=grid, frames=FRAMES in first.names) + target_arrays()
    manifest = Manifest(
        teacher=TeacherSpec(name="other", fingerprint=f"print of {name}", layer="colors", width=width),
        preprocessing=Preprocessing(image_size=store.manifest.preprocessing.image_size, **preprocessing),
        grid=grid,
        options=store.manifest.options,
    )
    keys = {split: list(store[split].keys) for split in store.splits}
    folder = addition_path(path, name)
    create_store(folder, manifest, Plan(keys, batch_rows=8, shard_rows=store.manifest.shard_rows), arrays)
    for split in store.splits:
        rows = features_of(store[split], width)
        valid = np.ones(len(store[split]), bool)
        valid[list(invalid) if split == "train" else []] = False
        with StoreWriter(folder, split) as writer:
            writer.append(rows, valid=valid)
    finalize_store(folder)
    publish_teacher(path, name)
    return path


def features_of(split: Split, width: int) -> dict[str, Any]:
    """All rows of the arrays that the teacher has."""
    rows = np.arange(len(split))
    own = split.specs[POOLED].row_shape[0]
    mix = np.random.default_rng(width).normal(size=(own, width))

    def seen(values: np.ndarray) -> np.ndarray:
        return np.tanh(values.astype(np.float32) @ mix / 8)

    found: dict[str, Any] = {
        POOLED: seen(split.true_values(rows, POOLED)),
        SIZES: split.read(SIZES),
        CONTENT: split.read(CONTENT),
    }
    if GRID in split.names:
        found[GRID] = seen(split.true_values(rows, GRID))
    if FRAMES in split.names:
        scale = split.scale[FRAMES]
        found[FRAMES] = [seen(values * scale) for values in split.ragged(rows, FRAMES)]
    return found
