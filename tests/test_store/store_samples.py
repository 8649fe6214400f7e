"""Rows for small real stores. Also imported by the scripts that the crash tests kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from store.format import ArraySpec, Manifest, Preprocessing, TeacherSpec, feature_arrays, target_arrays
from store.writer import StoreWriter

WIDTH, GRID = 16, 2


def small_manifest(**fields: Any) -> Manifest:
    teacher = TeacherSpec(name="test", fingerprint="0" * 32, layer="last", width=WIDTH)
    return Manifest(teacher=teacher, preprocessing=Preprocessing(image_size=28), **fields)


def small_arrays() -> list[ArraySpec]:
    return feature_arrays(WIDTH, grid=GRID) + target_arrays(label=True, boxes=True)


def small_block(start: int, stop: int, seed: int = 0) -> dict[str, Any]:
    """Rows start:stop of an endless data set; the same rows whatever the block."""
    rows = range(start, stop)
    random = [np.random.default_rng([seed, row]) for row in rows]
    boxes = [
        generator.random((row % 4, 4), dtype=np.float32) for row, generator in zip(rows, random, strict=True)
    ]
    return {
        "features/pooled": np.stack([g.standard_normal(WIDTH, dtype=np.float32) for g in random]),
        "features/grid": np.stack([g.standard_normal((GRID, GRID, WIDTH), dtype=np.float32) for g in random]),
        "sizes": np.array([(640 + row, 480) for row in rows], np.int32),
        "content": np.stack([g.integers(0, 256, 16, dtype=np.uint8) for g in random]),
        "targets/label": np.array(rows, np.int32) % 10,
        "targets/boxes/values": boxes,
        "targets/boxes/classes": [np.arange(len(box), dtype=np.int32) for box in boxes],
    }


def write_rows(path: Path, split: str, **options: Any) -> None:
    with StoreWriter(path, split, **options) as writer:
        for start, stop in writer.batches():
            writer.append(small_block(start, stop))


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
