"""Public data sets for benchmarks/learning.py --data DIR, with the labels of some training images hidden.

DIR has the folders `clothing`, `camvid` and `bccd`, as docs/benchmarks.md describes; the digits are scikit-learn's, and `clips` is
made from recorded videos where it does not exist (benchmarks/learning_clips.py). Images are links to DIR.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from benchmarks.learning_clips import FRAMES, write_clips

Item = TypeVar("Item")
SPLITS = ("train", "val", "test")
DIGITS = {"train": 600, "val": 400, "test": 797}  # in their order


@dataclass(frozen=True)
class DataSet:
    """How a folder of DIR is extracted: options of `cli extract` beyond the benchmark's."""

    source: str
    options: dict[str, Any] = field(default_factory=dict)


UNLABELED = {"source_options": {"unlabeled": True}}
DATA_SETS = {
    "clothing": DataSet("table", {"image_size": 160, "grid": 0, "logits": "probe"}),
    "digits": DataSet("table", {"image_size": 160, "grid": 0, "logits": "probe"}),
    "camvid": DataSet(
        "masks",
        {"image_size": 384, "grid": "native", "layers": "3,last", "logits": "probe", **UNLABELED},
    ),
    "clips": DataSet("table", {"image_size": 160, "logits": "probe", "frames": FRAMES}),
    "bccd": DataSet("voc", {"image_size": 384, "grid": "native", "layers": "3,last", **UNLABELED}),
}


def lay_out(name: str, data: Path, folder: Path, labels: int | None, draw: int, *, every: int = 1) -> Path:
    """What `cli extract` reads: all images of DIR/`name`, and the labels of `labels` training images.

    labels: of each class (clothing, clips) or in all; None: all. draw: which selection. every: take each n-th image only.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = np.random.default_rng([4, draw])
    if name == "digits":
        return digits(folder, labels, generator, every)
    source = (data / name).resolve()
    if name == "clips" and not source.exists():
        write_clips(source)
    if not source.is_dir():
        raise SystemExit(
            f"{source} does not exist: --data DIR needs the folder {name}, see docs/benchmarks.md"
        )
    return {"clothing": class_table, "clips": class_table, "camvid": camvid, "bccd": bccd}[name](
        source, folder, labels, generator, every
    )


def pick(files: Sequence[Item], labels: int | None, generator: np.random.Generator) -> set[Item]:
    """`labels` of the files (or their numbers) at random, None: all."""
    return set(files if labels is None else [files[i] for i in generator.permutation(len(files))[:labels]])


def class_table(
    source: Path, folder: Path, labels: int | None, generator: np.random.Generator, every: int
) -> Path:
    """Class folders as a table of images (or clips), in which only some training images have a label."""
    (folder / "images").symlink_to(source, target_is_directory=True)
    rows = []
    for split in SPLITS:
        for kind in sorted(path for path in (source / split).iterdir() if path.is_dir()):
            files = sorted(kind.iterdir())[::every]
            chosen = pick(files, labels if split == "train" else None, generator)
            for file in files:
                image = f"images/{split}/{kind.name}/{file.name}"
                rows.append({"image": image, "label": kind.name if file in chosen else "", "split": split})
    return write_table(folder, rows)


def digits(folder: Path, labels: int | None, generator: np.random.Generator, every: int) -> Path:
    """scikit-learn's 1,797 scanned digits as a table of images, in which only some training images have a label."""
    from sklearn.datasets import load_digits

    found = load_digits()
    (folder / "images").mkdir()
    rows = []
    chosen = pick(range(0, DIGITS["train"], every), labels, generator)
    splits = [split for split, count in DIGITS.items() for _ in range(count)]
    for number in range(0, len(splits), every):
        image, split = f"images/{number:04d}.png", splits[number]
        pixels = np.round(found.images[number] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / image)
        shown = split != "train" or number in chosen
        rows.append({"image": image, "label": str(found.target[number]) if shown else "", "split": split})
    return write_table(folder, rows)


def write_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, ["image", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv"


def camvid(
    source: Path, folder: Path, labels: int | None, generator: np.random.Generator, every: int
) -> Path:
    """`images/SPLIT` and `masks/SPLIT`, of which some training images have no mask."""
    for split in SPLITS:
        images = sorted((source / "images" / split).iterdir())[::every]
        chosen = pick(images, labels if split == "train" else None, generator)
        for image in images:
            link(image, folder / "images" / split / image.name)
            if image in chosen:
                mask = f"{image.stem}.png"
                link(source / "masks" / split / mask, folder / "masks" / split / mask)
    shutil.copyfile(source / "classes.txt", folder / "classes.txt")
    return folder


def bccd(source: Path, folder: Path, labels: int | None, generator: np.random.Generator, every: int) -> Path:
    """Pascal VOC, of which some training images have no XML file."""
    for split in SPLITS:
        stems = (source / f"ImageSets/Main/{split}.txt").read_text(encoding="utf-8").split()[::every]
        files = [source / f"Annotations/{stem}.xml" for stem in stems]
        chosen = pick(files, labels if split == "train" else None, generator)
        for stem, file in zip(stems, files, strict=True):
            image = next(source.glob(f"JPEGImages/{stem}.*"))
            link(image, folder / "JPEGImages" / image.name)
            if file in chosen:
                link(file, folder / "Annotations" / file.name)
        listed = folder / f"ImageSets/Main/{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(stems) + "\n", encoding="utf-8")
    return folder


def link(target: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, name)


def probe_miou(store: Path) -> float | None:
    """What `cli probe` measures of a store's masks on validation rows; None where there are none (boxes)."""
    from extract.logits import probe_store

    measured: float | None = probe_store(store).get("probe_miou")
    return measured
