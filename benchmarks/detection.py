"""What distillation is worth to a detector: YOLOv8n on tiles of aerial photos, with and without the teacher.

Trees in deepforest's four annotated photos (about 950 boxes), cut into tiles; training and validation tiles come from
separate parts of each photo. The teacher is EfficientNet-Lite2 with its ImageNet weights; its features are extracted
once. For every seed the distilled student and its control train with the same initial weights, images and order;
printed are the means and a 95 % interval of the paired differences (Student's t).

    python benchmarks/detection.py [--quick] [--json] [--seeds 0,1,2,3,4] [--work DIR]

What is finished in --work is not repeated, also after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stores import extract_features
from tests.assets import asset
from train.report.runs import mean_with_interval

TILE = 128  # pixels of the photo
TEACHER_SIZE = 256
VALIDATION_SHARE = 0.3
VISIBLE_SHARE = 0.4  # of a box's area, or the tile does not count it


class Photo(NamedTuple):
    """An annotated photo: `boxes` float [M, 4], xyxy in pixels."""

    path: Path
    boxes: np.ndarray


def annotated_photos(folder: Path) -> list[Photo]:
    """The photos that have boxes, from VOC XML files and, for one of them, a CSV."""
    photos = {}
    for file in sorted(folder.glob("*.xml")):
        root = ElementTree.parse(file).getroot()
        boxes = [
            [float(box.findtext(side) or 0) for side in ("xmin", "ymin", "xmax", "ymax")]
            for box in root.iter("bndbox")
        ]
        path = folder / f"{file.stem}.png"
        if path.exists() and boxes:
            photos[path] = np.array(boxes)
    listed: dict[Path, list[list[float]]] = {}
    with (folder / "example.csv").open() as file:
        for row in csv.DictReader(file):
            corners = [float(row[side]) for side in ("xmin", "ymin", "xmax", "ymax")]
            listed.setdefault(folder / row["image_path"], []).append(corners)
    photos = {path: np.array(boxes) for path, boxes in listed.items()} | photos
    return [Photo(path, boxes) for path, boxes in photos.items()]


def parts(width: int) -> dict[str, tuple[int, int]]:
    """The columns of a photo that belong to each split: no pixel to both."""
    border = round(width * (1 - VALIDATION_SHARE))
    return {"train": (0, border), "val": (border, width)}


def tiles(photo: Photo, span: tuple[int, int], step: int) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Tiles with at least one box inside the columns `span`, and their boxes in tile pixels."""
    image = Image.open(photo.path).convert("RGB")
    low, high = span
    width, height = min(TILE, high - low), min(TILE, image.height)
    for y in range(0, image.height - height + 1, step):
        for x in range(low, high - width + 1, step):
            boxes = boxes_in(photo.boxes, x, y, width, height)
            if len(boxes):
                yield image.crop((x, y, x + width, y + height)), boxes


def boxes_in(boxes: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    moved = boxes - (x, y, x, y)
    clipped = moved.clip(0, (width, height, width, height))
    area = np.prod(moved[:, 2:] - moved[:, :2], axis=1)
    shown = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    return clipped[shown > VISIBLE_SHARE * area]


def write_data_set(folder: Path, photos: Sequence[Photo], step: int) -> dict[str, int]:
    """A YOLO data set of tiles; returns the number of tiles by split."""
    counts = {"train": 0, "val": 0}
    for photo in photos:
        with Image.open(photo.path) as image:
            spans = parts(image.width)
        for split, span in spans.items():
            for name in ("images", "labels"):
                (folder / name / split).mkdir(parents=True, exist_ok=True)
            for tile, boxes in tiles(photo, span, step if split == "train" else TILE):
                name = f"{photo.path.stem}_{counts[split]:04}"
                tile.save(folder / "images" / split / f"{name}.png")
                scale = np.array([*tile.size, *tile.size])
                lines = [
                    f"0 {(a + c) / 2:.6f} {(b + d) / 2:.6f} {c - a:.6f} {d - b:.6f}"
                    for a, b, c, d in boxes / scale
                ]
                (folder / "labels" / split / f"{name}.txt").write_text("\n".join(lines) + "\n")
                counts[split] += 1
    (folder / "data.yaml").write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [tree]\n"
    )
    return counts


def extract(data: Path, store: Path) -> None:
    """The teacher's pooled features and 8×8 grids of every tile."""
    options: dict[str, Any] = {"source": "yolo", "image_size": TEACHER_SIZE, "grid": "8", "images": "jpeg"}
    extract_features(data, store, device="cpu", workers=1, **options)


def train(
    store: Path, out: Path, seed: int, learning_rate: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One distilled run with its control; the content of summary.json."""
    from train.config import TrainConfig
    from train.run import run_training

    options: dict[str, Any] = {
        "store": store,
        "student": "yolov8/n",
        "out": out,
        "seed": seed,
        "epochs": arguments.epochs,
        "batch_size": 8,
        "image_size": arguments.image_size,
        "optimizer": "adamw",
        "learning_rate": learning_rate,
        "weight_decay": 0.0005,
        "warmup_epochs": 1,
        "distill_layers": arguments.levels,
        "foreground_weight": arguments.foreground,
        "soft_label_weight": arguments.soft,
        "hard_label_weight": 1.0,
        "device": "cpu",
        "workers": 0,
        "control": True,
        "resume": True,  # finished runs in --work are not repeated
        "yolo_settings": f"plots=false,nbs=8,close_mosaic={max(1, arguments.epochs // 3)}",
    }
    return run_training(TrainConfig(**options))


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each side takes the learning rate that gives it the best mean over the seeds; seeds are paired."""
    rates = sorted({row["learning_rate"] for row in rows})
    result: dict[str, Any] = {}
    for metric in ("map50", "map50_95"):
        sides = {}
        for side in ("distilled", "control"):
            by_rate = {
                rate: {r["seed"]: r[side][metric] for r in rows if r["learning_rate"] == rate}
                for rate in rates
            }
            best = max(rates, key=lambda rate: float(np.mean(list(by_rate[rate].values()))))
            sides[side] = (best, by_rate[best])
        seeds = sorted(sides["distilled"][1])
        gain = mean_with_interval(metric, [sides["distilled"][1][s] - sides["control"][1][s] for s in seeds])
        result[metric] = {
            "distilled": float(np.mean([sides["distilled"][1][s] for s in seeds])),
            "control": float(np.mean([sides["control"][1][s] for s in seeds])),
            "difference": gain.mean,
            "interval_95": None if gain.high is None else gain.high - gain.mean,
            "learning_rates": {side: rate for side, (rate, _) in sides.items()},
            "seeds": len(seeds),
        }
    return result


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, few epochs")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--learning-rates", default="0.002", help="the grid that each side chooses from")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=96, help="pixels, a multiple of 32")
    parser.add_argument("--levels", default="P3,P4,P5", help="distilled levels")
    parser.add_argument("--foreground", type=float, default=1.0, help="weight of cells inside boxes")
    parser.add_argument(
        "--soft", type=float, default=1.0, help="weight of the distillation term; the task's is 1"
    )
    parser.add_argument("--step", type=int, default=96, help="pixels between training tiles")
    parser.add_argument("--work", type=Path, default=None, help="keep data, store and runs here")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.seeds, arguments.learning_rates, arguments.epochs, arguments.step = "0", "0.002", 5, 128
    return arguments


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        result = benchmark(arguments, work)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_report(result)
    return result


def benchmark(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    photos = annotated_photos(asset("deepforest") / "deepforest" / "data")
    data, store = work / f"tiles-{arguments.step}", work / f"tiles-{arguments.step}.zarr"
    started = time.perf_counter()
    counts = write_data_set(data, photos, arguments.step)
    extract(data, store)
    extraction = time.perf_counter() - started
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        for rate in map(float, arguments.learning_rates.split(",")):
            summary = train(store, work / run_name(arguments, seed, rate), seed, rate, arguments)
            rows.append(
                {
                    "seed": seed,
                    "learning_rate": rate,
                    "distilled": summary["metrics"],
                    "control": summary["control"]["metrics"],
                    "wall_time_s": summary["wall_time_s"],
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("json", "work")}
    return {
        "photos": len(photos),
        "boxes": int(sum(len(photo.boxes) for photo in photos)),
        "tiles": counts,
        "extraction_s": round(extraction, 1),
        "settings": settings,
        "runs": rows,
        "comparison": compare(rows),
    }


def run_name(arguments: argparse.Namespace, seed: int, learning_rate: float) -> str:
    """The folder of one training in --work: all that it depends on, so that other settings never find it."""
    return (
        f"step{arguments.step}-size{arguments.image_size}-epochs{arguments.epochs}-{arguments.levels}"
        f"-soft{arguments.soft:g}-foreground{arguments.foreground:g}-seed{seed}-lr{learning_rate:g}"
    )


def print_report(result: dict[str, Any]) -> None:
    print(
        f"{result['boxes']} boxes in {result['photos']} photos; tiles {result['tiles']}; settings {result['settings']}"
    )
    for row in result["runs"]:
        print(
            f"seed {row['seed']} learning rate {row['learning_rate']}: mAP50 distilled {row['distilled']['map50']:.3f}, "
            f"control {row['control']['map50']:.3f} ({row['wall_time_s']:.0f} s distilled)"
        )
    for metric, found in result["comparison"].items():
        half = (
            f" ± {found['interval_95']:.3f}"
            if found["interval_95"] is not None
            else " (one seed: no interval)"
        )
        print(
            f"{metric}: distilled {found['distilled']:.3f}, control {found['control']:.3f}, difference "
            f"{found['difference']:+.3f}{half} (95 %, {found['seeds']} seeds)"
        )


if __name__ == "__main__":
    main()
