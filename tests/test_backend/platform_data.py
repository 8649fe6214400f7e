"""Small data sets in the platform's layouts, each learnable: the class is the colour of a square."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"红 red": (220, 40, 40), "blue": (40, 60, 220)}
SIDE = 64


def draw(
    rng: np.random.Generator, colour: tuple[int, int, int]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A noisy picture with one square, and the square's box (xyxy, pixels)."""
    pixels = rng.integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8)
    size = int(rng.integers(20, 36))
    x, y = (int(value) for value in rng.integers(0, SIDE - size, 2))
    pixels[y : y + size, x : x + size] = colour
    return Image.fromarray(pixels), (x, y, x + size, y + size)


def pictures(seed: int, count: int) -> Iterator[tuple[int, Image.Image, tuple[int, int, int, int]]]:
    """(class, picture, box), classes in turn."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        label = index % len(COLOURS)
        yield label, *draw(rng, list(COLOURS.values())[label])


def make_class_folders(root: Path, train: int = 16, val: int = 8) -> Path:
    """`train/<class>/*.png` and `val/<class>/*.png`; with `val` 0 there is one split only."""
    for split, count, seed in (("train", train, 1), ("val", val, 2)):
        for index, (label, picture, _) in enumerate(pictures(seed, count)):
            folder = root / split / list(COLOURS)[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{index:03d}.png")
    return root


def make_yolo(root: Path, train: int = 8, val: int = 4) -> Path:
    """ultralytics' layout: images/, labels/, data.yaml."""
    for split, count, seed in (("train", train, 1), ("val", val, 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index, (label, picture, (x0, y0, x1, y1)) in enumerate(pictures(seed, count)):
            picture.save(root / "images" / split / f"{index:03d}.png")
            centre = f"{(x0 + x1) / 2 / SIDE} {(y0 + y1) / 2 / SIDE} {(x1 - x0) / SIDE} {(y1 - y0) / SIDE}"
            (root / "labels" / split / f"{index:03d}.txt").write_text(f"{label} {centre}\n")
    names = "\n".join(f"  {index}: {name}" for index, name in enumerate(COLOURS))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}\n", "utf-8")
    return root


def make_masks(root: Path, train: int = 8, val: int = 4) -> Path:
    """`<split>/images/*.png` and `<split>/masks/*.png`: 0 is background, then the classes."""
    for split, count, seed in (("train", train, 1), ("val", val, 2)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for index, (label, picture, (x0, y0, x1, y1)) in enumerate(pictures(seed, count)):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[y0:y1, x0:x1] = label + 1
            picture.save(root / split / "images" / f"{index:03d}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index:03d}.png")
    return root


def make_clips(root: Path, train: int = 8, val: int = 4, frames: int = 4) -> Path:
    """`<split>/<class>/<clip>/<frame>.png`."""
    for split, count, seed in (("train", train, 1), ("val", val, 2)):
        rng = np.random.default_rng(seed)
        for index in range(count):
            name = list(COLOURS)[index % len(COLOURS)]
            folder = root / split / name / f"clip{index:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            for frame in range(frames):
                draw(rng, COLOURS[name])[0].save(folder / f"{frame:03d}.png")
    return root
