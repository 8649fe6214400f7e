"""Real images for benchmarks/learning.py, laid out as users have them: tables of images, folders of masks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.assets import asset

VAL_SHARE = 0.15
SEGMENTED = ("animals", "food", "plants", "vehicles")
SCENE = 64  # pixels
OPAQUE = 128  # alpha above it belongs to the stamp


def emoji() -> list[dict[str, Any]]:
    """The emoji that both vendors draw: `image` (file name), `category`."""
    listed = json.loads((asset("emoji-twitter") / "package/emoji.json").read_text(encoding="utf-8"))
    return [
        {"image": entry["image"], "category": entry["category"]}
        for entry in listed
        if entry["category"] != "Component" and entry["has_img_twitter"] and entry["has_img_google"]
    ]


def write_emoji_table(
    folder: Path, labels_per_class: int | None, unlabeled: bool, draw: int, every: int, repeat: int = 1
) -> Path:
    """Twitter's emoji to learn from, Google's drawings of the same to be judged on: a folder with `emoji.csv`.

    Splits: `train`, Twitter's, with `labels_per_class` labeled ones of each of the 9 categories (None: all), another
    selection for each `draw`, and the rest left out or, with `unlabeled`, kept without a label; `val` and `test`,
    Google's, cut by emoji (`test` only where all are labeled: it is always the same). `every` takes each n-th one.
    `repeat` lists every training image so often, each time under another key: longer epochs, fewer validations.
    """
    entries = emoji()[::every]
    chosen = choose(entries, labels_per_class, draw)
    validates = np.random.default_rng(0).random(len(entries)) < VAL_SHARE
    lines = []
    names = ["twitter", *(f"twitter-{number}" for number in range(1, repeat))]
    for number, (entry, validating) in enumerate(zip(entries, validates, strict=True)):
        if number in chosen or unlabeled:
            lines += [table_line("train", name, entry, number in chosen) for name in names]
        if validating or labels_per_class is None:
            lines.append(table_line("val" if validating else "test", "google", entry, True))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*names, "google"):
        link, vendor = folder / name, name.split("-")[0]
        if not link.exists():
            link.symlink_to(asset(f"emoji-{vendor}") / f"package/img/{vendor}/64", target_is_directory=True)
    with (folder / "emoji.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "label", "split"])
        writer.writeheader()
        writer.writerows(lines)
    return folder


def choose(entries: list[dict[str, Any]], labels_per_class: int | None, draw: int) -> set[int]:
    """Numbers of the labeled entries: `labels_per_class` of each category at random, None: all."""
    if labels_per_class is None:
        return set(range(len(entries)))
    generator = np.random.default_rng([1, draw])
    categories = sorted({entry["category"] for entry in entries})
    members = [[i for i, entry in enumerate(entries) if entry["category"] == name] for name in categories]
    return {int(i) for group in members for i in generator.permutation(group)[:labels_per_class]}


def table_line(split: str, vendor: str, entry: dict[str, Any], labeled: bool) -> dict[str, str]:
    label = entry["category"] if labeled else ""
    return {"image": f"{vendor}/{entry['image']}", "label": label, "split": split}


def write_scenes(folder: Path, counts: dict[str, int]) -> Path:
    """Photographed objects pasted into photographs, with exact masks: `images/SPLIT`, `masks/SPLIT`, `classes.txt`.

    Classes: background and SEGMENTED. Objects and photographs of one split occur in no other.
    """
    stamps, photos = stamps_by_class(), sorted((asset("foolbox") / "foolbox/data").glob("imagenet_*.jpg"))
    shares = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}
    for number, (split, (low, high)) in enumerate(shares.items()):
        generator = np.random.default_rng([2, number])
        objects = [part(files, low, high) for files in stamps]
        backgrounds = part(photos, low, high)
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(counts[split]):
            image, mask = compose(generator, objects, backgrounds)
            image.save(folder / f"images/{split}/{index:04d}.png")
            mask.save(folder / f"masks/{split}/{index:04d}.png")
    (folder / "classes.txt").write_text("\n".join(("background", *SEGMENTED)) + "\n", encoding="utf-8")
    return folder


def stamps_by_class() -> list[list[Path]]:
    """Stamps with an alpha channel, a list a class, in a fixed random order."""
    root = next(asset("tuxpaint-stamps").glob("**/stamps"))
    generator = np.random.default_rng(3)
    classes = [sorted((root / name).glob("**/*.png")) for name in SEGMENTED]
    return [[files[i] for i in generator.permutation(len(files))] for files in classes]


def part(files: list[Path], low: float, high: float) -> list[Path]:
    return files[round(low * len(files)) : round(high * len(files))]


def compose(
    generator: np.random.Generator, objects: list[list[Path]], backgrounds: list[Path]
) -> tuple[Image.Image, Image.Image]:
    """A random crop of a photograph with one or two stamps on it, and the mask of their classes."""
    with Image.open(backgrounds[generator.integers(len(backgrounds))]) as photo:
        side = int(generator.integers(min(photo.size) // 2, min(photo.size)))
        left, top = (int(generator.integers(0, extent - side + 1)) for extent in photo.size)
        scene = photo.convert("RGB").resize((SCENE, SCENE), box=(left, top, left + side, top + side))
    mask = Image.new("L", scene.size)
    for _ in range(int(generator.integers(1, 3))):
        number = int(generator.integers(len(objects)))
        with Image.open(objects[number][generator.integers(len(objects[number]))]) as stamp:
            paste(generator, scene, mask, stamp.convert("RGBA"), number + 1)
    return scene, mask


def paste(
    generator: np.random.Generator, scene: Image.Image, mask: Image.Image, stamp: Image.Image, label: int
) -> None:
    """Put `stamp` at a random place and size onto `scene`, and `label` where it is opaque into `mask`."""
    longest = generator.uniform(0.45, 0.8) * SCENE
    scale = longest / max(stamp.size)
    small = stamp.resize((max(round(stamp.width * scale), 4), max(round(stamp.height * scale), 4)))
    left, top = (int(generator.integers(0, SCENE - extent + 1)) for extent in small.size)
    corner = (left, top)
    alpha = small.getchannel("A")
    scene.paste(small, corner, alpha)
    mask.paste(label, corner, alpha.point([255 if value > OPAQUE else 0 for value in range(256)]))
