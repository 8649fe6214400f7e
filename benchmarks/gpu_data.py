"""Data for benchmarks/gpu.py: a store for timing training steps, and small data sets of every kind to train on for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.gpu_tower import make_checkpoint
from benchmarks.stores import write_random_store

if TYPE_CHECKING:
    from benchmarks.gpu import Settings

CLASSES = 10
KINDS = ("classes", "masks", "boxes", "clips")


def make_step_store(path: Path, rows: int, side: int, grid: int) -> Path:
    """Images of `side` pixels and grids in memory-mapped shards, random: for the time of a step, not for its result."""

    def rest(generator: np.random.Generator, count: int) -> dict[str, Any]:
        return {
            "sizes": np.full((count, 2), side, np.int32),
            "content": generator.integers(0, 255, (count, 16)).astype(np.uint8),
            "targets/label": generator.integers(0, CLASSES, count).astype(np.int32),
            "images/raw": generator.integers(0, 255, (count, side, side, 3)).astype(np.uint8),
        }

    names = tuple(f"class{index}" for index in range(CLASSES))
    kind: dict[str, Any] = {"grid": grid, "images": "raw", "side": side, "image_size": side}
    return write_random_store(path, {"train": rows, "val": 32}, rest, class_names=names, **kind)


def extract_small(settings: Settings, kind: str) -> Path:
    """A small data set of a kind, encoded by the tower on the device: pooled, grids, images or frames."""
    from extract.config import load_config
    from extract.run import run_extraction

    folder, store = settings.work / "data" / kind, settings.work / f"{kind}.zarr"
    count = 24 if settings.quick else 64
    {"classes": write_classes, "masks": write_masks, "boxes": write_boxes, "clips": write_clips}[kind](
        folder, count
    )
    options: dict[str, Any] = {
        "data": str(folder),
        "out": store,
        "source": {"classes": "folder", "masks": "masks", "boxes": "yolo", "clips": "clips"}[kind],
        "teacher_path": str(make_checkpoint(settings)),
        "image_size": 56 if settings.quick else 224,
        "device": settings.device,
        "grid": 4 if settings.quick else 8,
        "batch_size": 8,
        "workers": 0,
        "val_fraction": 0.25,
        "compile": False,  # would take longer than the extraction
    }
    if kind == "classes":
        options |= {"images": "jpeg", "logits": "probe"}
    if kind == "clips":
        options |= {"frames": 4}
    result = run_extraction(load_config(options))
    assert result.complete, f"{kind}: the store is incomplete"
    assert result.bad == 0, f"{kind}: {result.bad} bad samples"
    return store


def scene(number: int, side: int = 96) -> tuple[Image.Image, np.ndarray, tuple[int, int, int, int]]:
    """Noise with one colored rectangle: the image, its mask uint8 [side, side] and the rectangle's box (xyxy)."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 120, (side, side, 3)).astype(np.uint8)
    width, height = generator.integers(side // 4, side // 2, 2)
    left, top = generator.integers(0, side - width), generator.integers(0, side - height)
    pixels[top : top + height, left : left + width, number % 2] = 230
    mask = np.zeros((side, side), np.uint8)
    mask[top : top + height, left : left + width] = 1 + number % 2
    return Image.fromarray(pixels), mask, (int(left), int(top), int(left + width), int(top + height))


def write_classes(folder: Path, count: int) -> None:
    for number in range(count):
        path = folder / ("red", "green")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number)[0].save(path, quality=90)


def write_masks(folder: Path, count: int) -> None:
    (folder / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("background\nred\ngreen\n")
    for number in range(count):
        image, mask, _ = scene(number)
        for name, picture in (("images", image), ("masks", Image.fromarray(mask))):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def write_boxes(folder: Path, count: int) -> None:
    for number in range(count):
        image, mask, (left, top, right, bottom) = scene(number)
        side = mask.shape[0]
        split = "val" if number % 4 == 0 else "train"
        for name in ("images", "labels"):
            (folder / name / split).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / split / f"{number}.jpg", quality=90)
        numbers = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        values = " ".join(f"{value / side:.6f}" for value in numbers)
        (folder / "labels" / split / f"{number}.txt").write_text(f"{number % 2} {values}\n")
    names = json.dumps(["red", "green"])
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {names}\n")


def write_clips(folder: Path, count: int) -> None:
    for number in range(max(8, count // 4)):
        clip = folder / ("red", "green")[number % 2] / f"clip{number}"
        clip.mkdir(parents=True)
        for frame in range(4):
            scene(2 * (10 * number + frame) + number % 2)[0].save(clip / f"{frame}.jpg", quality=90)
