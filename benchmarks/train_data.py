"""A store for `benchmarks/train.py`: random features of real shapes, and images that compress as photographs do."""

from __future__ import annotations

import io
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from store.create import create_store
from store.finalize import finalize_store
from store.format import Manifest, Preprocessing, TeacherSpec, feature_arrays, image_arrays, target_arrays
from store.keys import Plan
from store.writer import StoreWriter

WIDTH, GRID, SIDE, CLASSES = 1280, 7, 112, 10


def make_store(path: Path, rows: int, side: int = SIDE) -> Path:
    """A store with 1280-wide pooled rows and 7×7 grids, random but of real shapes, and noisy JPEG images."""
    arrays = feature_arrays(WIDTH, grid=GRID) + target_arrays(label=True) + image_arrays("jpeg", side)
    manifest = Manifest(
        teacher=TeacherSpec(name="random", fingerprint="0", layer="none", width=WIDTH, random_weights=True),
        preprocessing=Preprocessing(image_size=224),
        class_names=tuple(f"class{index}" for index in range(CLASSES)),
        grid=GRID,
        images="jpeg",
    )
    keys = {
        "train": [f"train/{row}.jpg" for row in range(rows)],
        "val": [f"val/{row}.jpg" for row in range(64)],
    }
    create_store(path, manifest, Plan(keys, batch_rows=32), arrays)
    rng = np.random.default_rng(0)
    files = [jpeg(rng, side) for _ in range(64)]
    for split in keys:
        with StoreWriter(path, split) as writer:
            for start, stop in writer.batches():
                some = [files[row % len(files)] for row in range(start, stop)]
                grid = rng.normal(size=(stop - start, GRID, GRID, WIDTH)).astype(np.float32)
                writer.append(
                    {
                        "features/pooled": grid.mean(axis=(1, 2)),
                        "features/grid": grid,
                        "sizes": np.full((stop - start, 2), side, np.int32),
                        "content": np.stack(
                            [np.frombuffer(blake2b(data, digest_size=16).digest(), np.uint8) for data in some]
                        ),
                        "targets/label": rng.integers(0, CLASSES, size=stop - start).astype(np.int32),
                        "images/encoded/values": [np.frombuffer(data, np.uint8) for data in some],
                    }
                )
    finalize_store(path)
    return path


def jpeg(rng: np.random.Generator, side: int) -> bytes:
    """A smooth random picture: it compresses as photographs do."""
    coarse = Image.fromarray(rng.integers(0, 256, size=(12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
