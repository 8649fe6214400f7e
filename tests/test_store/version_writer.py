"""Makes one store and a new version of it, taking up whatever an earlier, killed run left.

The crash tests run this in processes that they kill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from store_samples import small_block, small_manifest, write_rows

from store.create import create_store
from store.finalize import finalize_store
from store.format import ArraySpec, feature_arrays, image_arrays, target_arrays
from store.keys import KeyTable, Plan
from store.reader import open_store
from store.version import RaggedChange, VersionSplit, publish_version, write_version
from store.writer import StoreWriter

GRID_WIDTH, GRID = 16, 2
FIRST = 200
RELABELED, BROKEN, REPLACED = 3, 70, 10


def arrays_with_images() -> list[ArraySpec]:
    return [
        *feature_arrays(GRID_WIDTH, grid=GRID),
        *target_arrays(label=True, boxes=True),
        *image_arrays("jpeg", 28),
    ]


def block_with_images(start: int, stop: int, seed: int = 0) -> dict[str, Any]:
    images = [bytes([row % 256]) * (row % 7 + 1) for row in range(start, stop)]
    return {**small_block(start, stop, seed), "images/encoded/values": images}


def write_split(path: Path, split: str, seed: int = 0) -> None:
    with StoreWriter(path, split) as writer:
        for start, stop in writer.batches():
            writer.append(block_with_images(start, stop, seed))


def first_version(path: Path) -> None:
    if not path.exists():
        keys = {"train": [f"{row}.jpg" for row in range(FIRST)], "val": ["a.jpg", "b.jpg"]}
        create_store(path, small_manifest(), Plan(keys, batch_rows=8, shard_rows=64), arrays_with_images())
    if not open_store(path, allow_incomplete=True).manifest.complete:
        for split in ("train", "val"):
            write_split(path, split)
    finalize_store(path)


def new_rows(path: Path) -> None:
    """Two rows that the new version takes from elsewhere."""
    if not path.exists():
        keys = {"train": ["new0.jpg", "new1.jpg"]}
        create_store(path, small_manifest(), Plan(keys, batch_rows=8, shard_rows=64), arrays_with_images())
        write_split(path, "train", seed=5)
        finalize_store(path)


def second_version(path: Path, encoded: Path) -> dict[str, VersionSplit]:
    """Row 3 has another label and other boxes, row 10 other features, row 70 none; row 130 is gone and the last
    takes its place; one row is new; `val` is gone and `test` is there."""
    store, fresh = open_store(path), open_store(encoded)
    train = store["train"]
    count = FIRST
    row = np.arange(count)
    row[130] = FIRST - 1
    source = np.zeros(count, np.int64)
    source[REPLACED], row[REPLACED] = 1, 0
    source[count - 1], row[count - 1] = 1, 1
    keys = [train.keys[int(r)] if s == 0 else f"new{r}.jpg" for s, r in zip(source, row, strict=True)]
    labels = np.concatenate([train.read("targets/label")[:130], np.zeros(70, np.int32)]).astype(np.int32)
    labels[RELABELED] = 9
    changed = np.zeros(count, bool)
    changed[RELABELED] = True

    def read_boxes(row: int) -> dict[str, np.ndarray]:
        values = np.full((2, 4), row, np.float32)
        return {"targets/boxes/values": values, "targets/boxes/classes": np.array([1, 2], np.int32)}

    return {
        "train": VersionSplit(
            keys=KeyTable.build(keys),
            sources=[train, fresh["train"]],
            source=source,
            row=row,
            fixed={"targets/label": labels},
            ragged={"targets/boxes/offsets": RaggedChange(changed, read_boxes)},
            invalid={BROKEN: "annotation: broken"},
        ),
        "test": VersionSplit(
            keys=KeyTable.build(["b.jpg"]),
            sources=[store["val"]],
            source=np.zeros(1, np.int64),
            row=np.ones(1, np.int64),
            fixed={},
            ragged={},
            invalid={},
        ),
    }


def build(path: Path, encoded: Path) -> None:
    """The first version, then the second in its place."""
    new_rows(encoded)
    if path.exists() and (path / ".work" / "next").exists():
        publish_version(path)
    if path.exists() and open_store(path, allow_incomplete=True).manifest.class_names:
        publish_version(path)
        return
    first_version(path)
    store = open_store(path)
    manifest = store.manifest.model_copy(update={"class_names": ("new",)})
    write_version(store, manifest, arrays_with_images(), second_version(path, encoded))
    publish_version(path)


__all__ = ["build", "write_rows"]
