"""A store for `benchmarks/train.py`: random features of real shapes, and images that compress as photographs do."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.stores import encoded, write_random_store

GRID, SIDE, CLASSES = 7, 112, 10


def make_store(path: Path, rows: int, side: int = SIDE, shard_rows: int | None = None) -> Path:
    """A store with 1280-wide pooled rows and 7×7 grids, random but of real shapes, and noisy JPEG images."""
    generator = np.random.default_rng(0)
    files = [smooth_jpeg(generator, side) for _ in range(64)]

    def rest(generator: np.random.Generator, count: int) -> dict[str, Any]:
        some = [files[index] for index in generator.integers(0, len(files), count)]
        digests = [np.frombuffer(blake2b(data, digest_size=16).digest(), np.uint8) for data in some]
        return {
            "sizes": np.full((count, 2), side, np.int32),
            "content": np.stack(digests),
            "targets/label": generator.integers(0, CLASSES, count).astype(np.int32),
            "images/encoded/values": some,
        }

    names = tuple(f"class{index}" for index in range(CLASSES))
    counts = {"train": rows, "val": 64}
    return write_random_store(
        path,
        counts,
        rest,
        grid=GRID,
        images="jpeg",
        side=side,
        class_names=names,
        shard_rows=shard_rows,
    )


def smooth_jpeg(generator: np.random.Generator, side: int) -> np.ndarray:
    """A smooth random picture: it compresses as photographs do."""
    coarse = Image.fromarray(generator.integers(0, 256, size=(12, 16, 3), dtype=np.uint8))
    return encoded(coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC))
