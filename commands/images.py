"""Real images that package registries ship, for the demo and the examples."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from commands.assets import emoji_packages

DIGIT_SIDE = 64
VAL_FRACTION = 0.3
# The emoji's categories; left out: flags, which are shapes without a common look, and parts of other emoji.
EMOJI_CATEGORIES = (
    *("Activities", "Animals & Nature", "Food & Drink", "Objects"),
    *("People & Body", "Smileys & Emotion", "Symbols", "Travel & Places"),
)


class EmojiTable(NamedTuple):
    """A table of images as `cli extract` reads it, and how many training images have a label."""

    path: Path
    labeled: int
    unlabeled: int
    validation: int


def write_digits(folder: Path, count: int) -> Path:
    """The first `count` of scikit-learn's scanned digits as PNG files in a folder per class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    print(f"Writing {count} real scans of handwritten digits to {folder}", flush=True)
    for index, (scan, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(scan * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).save(path)
    return folder


def write_emoji(folder: Path, labels_per_class: int, every: int = 1) -> EmojiTable:
    """Twitter's emoji as PNG files of 72 pixels, and `emoji.csv`: labels of few training images, all for validation.

    Which images validate and which have a label is the same in every call. `every` takes each n-th emoji only.

    Raises:
        AssetError: a package cannot be fetched.
    """
    import numpy as np

    pictures, names = emoji_packages()
    listed = emoji_with_category(pictures, names)[::every]
    order = np.random.default_rng(0).permutation(len(listed))
    validation = round(VAL_FRACTION * len(listed))
    labels_left = dict.fromkeys(EMOJI_CATEGORIES, labels_per_class)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, index in enumerate(order):
        file, category = listed[index]
        validates = number < validation
        labeled = validates or labels_left[category] > 0
        if not validates:
            labels_left[category] -= 1
        target = folder / "images" / file.name
        if not target.exists():
            shutil.copy2(file, target)
        label = category if labeled else ""
        rows.append((f"images/{file.name}", label, "val" if validates else "train"))
    with (folder / "emoji.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("image", "label", "split"), *rows])
    training = [label for _, label, split in rows if split == "train"]
    labeled_count = sum(bool(label) for label in training)
    return EmojiTable(folder, labeled_count, len(training) - labeled_count, validation)


def write_pictures(folder: Path, count: int) -> Path:
    """`count` emoji as PNG files without labels, of all categories."""
    listed = emoji_with_category(*emoji_packages())
    folder.mkdir(parents=True, exist_ok=True)
    for file, _ in listed[:: len(listed) // count][:count]:
        if not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)
    return folder


def emoji_with_category(pictures: Path, names: Path) -> list[tuple[Path, str]]:
    """The pictures of the base emoji (no skin tones) in EMOJI_CATEGORIES, sorted by file name.

    The two packages differ in whether a name contains the variation selector FE0F.
    """
    found = []
    for emoji in json.loads(names.read_text(encoding="utf-8")):
        image = emoji["image"]
        paths = (pictures / image, pictures / image.replace("-fe0f", ""))
        file = next((path for path in paths if path.is_file()), None)
        if file is not None and emoji["category"] in EMOJI_CATEGORIES:
            found.append((file, emoji["category"]))
    return sorted(found)
