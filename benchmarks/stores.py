"""Stores for the benchmarks: random features of real shapes, whose time counts, and real ones of the pretrained teacher."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

WIDTH = 1280
#: The other arrays of a split's next rows: `rest(generator, count)`.
Rest = Callable[[np.random.Generator, int], dict[str, Any]]


def write_random_store(
    path: Path,
    rows: Mapping[str, int],
    rest: Rest,
    *,
    grid: int,
    images: Literal["jpeg", "raw"],
    side: int,
    class_names: tuple[str, ...],
    image_size: int = 224,
    boxes: bool = False,
    shard_rows: int | None = None,
) -> Path:
    """1280-wide grids and their means, drawn from a normal distribution, and what `rest` gives: images and targets.

    Args:
        rows: of each split.
        grid: cells a side.
        side: of the stored images, pixels.
        image_size: of the teacher.
        boxes: detection instead of classification.
        shard_rows: rows of a shard; None lets the store choose.
    """
    from store.create import create_store
    from store.finalize import finalize_store
    from store.format import Manifest, Preprocessing, TeacherSpec, feature_arrays, image_arrays, target_arrays
    from store.keys import Plan
    from store.writer import StoreWriter

    manifest = Manifest(
        teacher=TeacherSpec(name="random", fingerprint="0", layer="none", width=WIDTH, random_weights=True),
        preprocessing=Preprocessing(image_size=image_size),
        class_names=class_names,
        task="detection" if boxes else "classification",
        grid=grid,
        images=images,
    )
    keys = {split: [f"{split}/{row}.jpg" for row in range(count)] for split, count in rows.items()}
    targets = target_arrays(boxes=True) if boxes else target_arrays(label=True)
    arrays = feature_arrays(WIDTH, grid=grid) + targets + image_arrays(images, side)
    create_store(path, manifest, Plan(keys, batch_rows=32, shard_rows=shard_rows), arrays)
    generator = np.random.default_rng(0)
    for split in keys:
        with StoreWriter(path, split) as writer:
            for start, stop in writer.batches():
                grids = generator.standard_normal((stop - start, grid, grid, WIDTH), np.float32)
                features = {"features/pooled": grids.mean(axis=(1, 2)), "features/grid": grids}
                writer.append(features | rest(generator, stop - start))
    finalize_store(path)
    return path


def encoded(image: Image.Image, quality: int = 90) -> np.ndarray:
    """The image as the bytes of a JPEG file, uint8 [N]."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def extract_features(data: Path, store: Path, **options: Any) -> Path:
    """The features of a data set; `options` are those of `cli extract`, by default EfficientNet-Lite2 of ImageNet."""
    from commands.assets import PRETRAINED_TEACHER, pretrained_teacher_weights
    from extract.config import ExtractConfig
    from extract.run import run_extraction

    if "teacher" not in options:
        options |= {"teacher": PRETRAINED_TEACHER, "teacher_path": str(pretrained_teacher_weights())}
    run_extraction(ExtractConfig(data=str(data), out=store, **options))
    return store
