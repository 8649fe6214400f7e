"""Small detection stores for the tests of YOLO students: coloured rectangles on noise, images inside the store."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imaging.geometry import View
from store.create import create_store
from store.finalize import finalize_store
from store.format import (
    EXACT_VIEW,
    FLIP,
    Manifest,
    Preprocessing,
    TeacherSpec,
    feature_arrays,
    image_arrays,
    target_arrays,
)
from store.keys import Plan
from store.writer import StoreWriter

WIDTH = 12
GRID = 8
NAMES = ("red", "green")
COLOURS = ((220, 40, 40), (40, 200, 60))


def scene(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image uint8 [H, W, 3] with one to three rectangles, their boxes float32 [M, 4] (pixels) and classes."""
    height, width = (int(value) for value in generator.integers(70, 130, 2))
    image = generator.integers(90, 140, (height, width, 3)).astype(np.uint8)
    boxes, classes = [], []
    for _ in range(int(generator.integers(1, 4))):
        w, h = generator.integers(20, 45, 2)
        x, y = generator.integers(0, width - w), generator.integers(0, height - h)
        label = int(generator.integers(0, 2))
        image[y : y + h, x : x + w] = COLOURS[label]
        boxes.append([x, y, x + w, y + h])
        classes.append(label)
    return image, np.array(boxes, np.float32), np.array(classes, np.int32)


def grid_of(image: np.ndarray) -> np.ndarray:
    """Features float32 [GRID, GRID, WIDTH] that tell where the colours are: cell means of the picture, repeated."""
    small = np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.Resampling.BOX), np.float32) / 255
    return np.concatenate([small * (n + 1) for n in range(WIDTH // 3)], axis=-1)


def png(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_store(
    path: Path,
    splits: dict[str, list[Row]],
    *,
    names: tuple[str, ...] = NAMES,
    grid: bool = True,
    boxes: bool = True,
    grid_features: Callable[[str, int, np.ndarray], np.ndarray] | None = None,
    resize: str = "squash",
    layers: dict[int, tuple[int, int]] | None = None,
    mirror: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Path:
    """A store of rows (image, boxes, classes) by split; `grid_features(split, row, image)` overrides `grid_of`.

    layers: side and width of further layers, whose features are random. mirror: makes of a grid that of the mirror image.
    """
    features = grid_features or (lambda split, row, image: grid_of(image))
    probe = features(next(iter(splits)), 0, next(iter(splits.values()))[0][0])
    manifest = Manifest(
        teacher=TeacherSpec(
            name="test", fingerprint="0", layer="last", width=probe.shape[-1], random_weights=True
        ),
        preprocessing=Preprocessing(image_size=112, resize=resize),  # type: ignore[arg-type]
        class_names=names,
        task="detection",
        source="yolo",
        grid=probe.shape[0] if grid else None,
        images="jpeg",
        views=1 if mirror else 0,
        options={EXACT_VIEW: FLIP} if mirror else {},
    )
    plan = Plan({name: [f"{name}/{i:03}.png" for i in range(len(rows))] for name, rows in splits.items()})
    arrays = feature_arrays(
        probe.shape[-1], grid=probe.shape[0] if grid else None, layers=layers, views=manifest.views
    )
    create_store(path, manifest, plan, arrays + target_arrays(boxes=boxes) + image_arrays("jpeg", 0))
    for name, rows in splits.items():
        with StoreWriter(path, name) as writer:
            for start, stop in writer.batches():
                arrays_of_block = block(name, start, rows[start:stop], features, grid, boxes)
                if mirror:
                    mirrored = np.stack([mirror(one) for one in arrays_of_block["features/grid"]])
                    arrays_of_block["views/grid"] = mirrored[:, None]
                    arrays_of_block["views/pooled"] = mirrored.mean((1, 2))[:, None]
                    arrays_of_block["views/geometry"] = np.tile(View.flip().matrix, (stop - start, 1, 1, 1))
                for number, (side, width) in (layers or {}).items():
                    noise = np.random.default_rng(start + number)
                    shape = (stop - start, side, side, width)
                    arrays_of_block[f"features/grid@{number}"] = noise.normal(size=shape).astype(np.float32)
                writer.append(arrays_of_block, valid=[True] * (stop - start))
    finalize_store(path)
    return path


def block(split: str, start: int, rows: list[Row], features: Any, grid: bool, boxes: bool) -> dict[str, Any]:
    grids = np.stack([features(split, start + n, image) for n, (image, _, _) in enumerate(rows)])
    arrays: dict[str, Any] = {
        "features/pooled": grids.mean((1, 2)),
        "sizes": np.array([(image.shape[1], image.shape[0]) for image, _, _ in rows], np.int32),
        "content": np.zeros((len(rows), 16), np.uint8),
        "images/encoded/values": [png(image) for image, _, _ in rows],
    }
    if grid:
        arrays["features/grid"] = grids
    if boxes:
        arrays["targets/boxes/values"] = [box for _, box, _ in rows]
        arrays["targets/boxes/classes"] = [label for _, _, label in rows]
    return arrays


def scenes(count: int, seed: int) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [scene(generator) for _ in range(count)]
