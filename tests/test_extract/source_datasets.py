"""One small data set per layout, written by hand-made code, together with what reading it must give."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from extract.sources.base import Boxes, Sample, Source

CLASSES = ("bird", "cat", "dog")
COUNTS = {"train": 7, "val": 4}


@dataclass
class Truth:
    """What one sample must give: pixels uint8 [H, W, 3], and its targets by class *name*."""

    pixels: np.ndarray
    label: str | None = None
    boxes: list[tuple[tuple[float, float, float, float], str]] | None = None
    mask: np.ndarray | None = None


@dataclass
class Dataset:
    """Where a data set lies, how it is opened, and what it holds: split → key → truth."""

    kind: str
    path: Path | str
    truth: dict[str, dict[str, Truth]]
    class_names: tuple[str, ...] = CLASSES
    options: dict[str, Any] = field(default_factory=dict)


def picture(seed: int, width: int = 24, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def numbered() -> list[tuple[str, int, np.ndarray, str]]:
    """(split, number, pixels, class) of every sample."""
    rows, number = [], 0
    for split, count in COUNTS.items():
        for _ in range(count):
            rows.append((split, number, picture(number), CLASSES[number % 3]))
            number += 1
    return rows


def boxes_of(number: int) -> list[tuple[tuple[float, float, float, float], str]]:
    """Zero to two boxes, on whole pixels inside a 24×16 image."""
    boxes = [
        ((2.0, 3.0, 12.0, 9.0), CLASSES[number % 3]),
        ((6.0, 4.0, 24.0, 16.0), CLASSES[(number + 1) % 3]),
    ]
    return boxes[: number % 3]


def mask_of(number: int) -> np.ndarray:
    mask = np.random.default_rng(100 + number).integers(0, 3, (16, 24), dtype=np.uint8)
    mask[0] = 255
    return mask


def empty_truth() -> dict[str, dict[str, Truth]]:
    return {split: {} for split in COUNTS}


def write_folder(root: Path) -> Dataset:
    truth = empty_truth()
    for split, number, pixels, name in numbered():
        key = f"{split}/{name}/{number}.png"
        save(root / key, pixels)
        truth[split][key] = Truth(pixels, label=name)
    return Dataset("folder", root, truth)


def write_yolo(root: Path) -> Dataset:
    truth = empty_truth()
    for split, number, pixels, _ in numbered():
        key = f"images/{split}/{number}.png"
        save(root / key, pixels)
        lines = []
        for (x1, y1, x2, y2), name in boxes_of(number):
            values = (x1 + x2) / 2 / 24, (y1 + y2) / 2 / 16, (x2 - x1) / 24, (y2 - y1) / 16
            lines.append(" ".join(map(repr, (CLASSES.index(name), *values))))
        if lines:
            label = root / f"labels/{split}/{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\n".join(lines) + "\n")
        truth[split][key] = Truth(pixels, boxes=boxes_of(number))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}")
    return Dataset("yolo", root, truth)


def write_coco(root: Path) -> Dataset:
    truth = empty_truth()
    content: dict[str, dict[str, list[Any]]] = {}
    for split, number, pixels, _ in numbered():
        part = content.setdefault(split, {"images": [], "annotations": [], "categories": []})
        save(root / f"{split}2017/{number}.png", pixels)
        part["images"].append({"id": 10 + number, "file_name": f"{number}.png", "width": 24, "height": 16})
        for (x1, y1, x2, y2), name in boxes_of(number):
            part["annotations"].append(
                {
                    "id": 1000 + len(part["annotations"]),
                    "image_id": 10 + number,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "category_id": 7 * (1 + CLASSES.index(name)),
                    "iscrowd": 0,
                }
            )
        truth[split][f"{split}2017/{number}.png"] = Truth(pixels, boxes=boxes_of(number))
    (root / "annotations").mkdir()
    for split, part in content.items():
        part["categories"] = [{"id": 7 * (1 + i), "name": name} for i, name in enumerate(CLASSES)]
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(part))
    return Dataset("coco", root, truth)


def write_voc(root: Path) -> Dataset:
    truth = empty_truth()
    lists: dict[str, list[str]] = {}
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    for split, number, pixels, _ in numbered():
        key = f"JPEGImages/{number:06d}.png"
        save(root / key, pixels)
        (root / f"Annotations/{number:06d}.xml").write_text(voc_xml(boxes_of(number)))
        lists.setdefault(split, []).append(f"{number:06d}")
        truth[split][key] = Truth(pixels, boxes=boxes_of(number))
    for split, stems in lists.items():
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems) + "\n")
    return Dataset("voc", root, truth)


def voc_xml(boxes: list[tuple[tuple[float, float, float, float], str]]) -> str:
    """VOC counts pixels from 1, the last one included."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1:.0f}</xmin>"
        f"<ymin>{y1 + 1:.0f}</ymin><xmax>{x2:.0f}</xmax><ymax>{y2:.0f}</ymax></bndbox></object>"
        for (x1, y1, x2, y2), name in boxes
    )
    return f"<annotation><filename>x.png</filename>{objects}</annotation>"


def write_masks(root: Path) -> Dataset:
    truth = empty_truth()
    for split, number, pixels, _ in numbered():
        key = f"{split}/images/{number}.png"
        save(root / key, pixels)
        # Palette colours that are nothing like the ids: whoever converts to grey gets it wrong.
        mask = Image.fromarray(mask_of(number))
        mask.putpalette([(37 * i + 11) % 256 for i in range(768)])
        (root / f"{split}/masks").mkdir(parents=True, exist_ok=True)
        mask.save(root / f"{split}/masks/{number}.png")
        truth[split][key] = Truth(pixels, mask=mask_of(number))
    return Dataset("masks", root, truth, class_names=("0", "1", "2"))


def write_clips(root: Path) -> Dataset:
    truth = empty_truth()
    for split, number, pixels, name in numbered():
        key = f"{split}/{name}/clip{number}"
        for frame in range(3):
            save(root / key / f"{frame + 1:04d}.png", pixels if frame == 1 else 255 - pixels)
        truth[split][key] = Truth(pixels, label=name)
    return Dataset("clips", root, truth)


def write_clip_table(root: Path) -> Dataset:
    """Folders of frames, listed in a table; every third clip has no label."""
    truth = write_clips(root).truth
    listed: dict[str, dict[str, Truth]] = empty_truth()
    with (root / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "label", "split"])
        for split, clips in truth.items():
            for number, (key, clip) in enumerate(clips.items()):
                label = clip.label if number % 3 else None
                writer.writerow([key, label or "", split])
                listed[split][key] = Truth(clip.pixels, label=label)
    return Dataset("table", root / "clips.csv", listed)


def write_hdf5(root: Path) -> Dataset:
    import h5py

    truth = empty_truth()
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "data.h5", "w") as file:
        file.attrs["class_names"] = list(CLASSES)
        for split in COUNTS:
            rows = [row for row in numbered() if row[0] == split]
            file[f"{split}/images"] = np.stack([pixels for _, _, pixels, _ in rows])
            file[f"{split}/labels"] = np.array([CLASSES.index(name) for *_, name in rows])
            for index, (_, _, pixels, name) in enumerate(rows):
                truth[split][f"{split}/{index:09d}"] = Truth(pixels, label=name)
    return Dataset("hdf5", root / "data.h5", truth)


def write_csv(root: Path) -> Dataset:
    truth = empty_truth()
    root.mkdir(parents=True, exist_ok=True)
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "boxes", "classes"])
        for split, number, pixels, name in numbered():
            key = f"pictures/{number}.png"
            save(root / key, pixels)
            boxes = json.dumps([list(box) for box, _ in boxes_of(number)])
            names = json.dumps([name for _, name in boxes_of(number)])
            writer.writerow([key, name, split, boxes, names])
            truth[split][key] = Truth(pixels, label=name, boxes=boxes_of(number))
    return Dataset("table", root / "table.csv", truth)


def write_parquet(root: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    truth = empty_truth()
    for split in COUNTS:
        rows = [row for row in numbered() if row[0] == split]
        images = [{"bytes": png(pixels), "path": f"{number}.png"} for _, number, pixels, _ in rows]
        table = pa.table({"image": images, "label": [name for *_, name in rows]})
        file = root / f"data/{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file, row_group_size=3)
        for index, (_, _, pixels, name) in enumerate(rows):
            truth[split][f"data/{file.name}#{index:09d}"] = Truth(pixels, label=name)
    return Dataset("table", root, truth)


def sql_rows() -> list[tuple[str, bytes, str, str, str]]:
    """key, image, label, annotation, split."""
    rows = []
    for split, number, pixels, name in numbered():
        boxes = [{"box": list(box), "class": box_name} for box, box_name in boxes_of(number)]
        rows.append((f"img-{number:03d}", png(pixels), name, json.dumps(boxes), split))
    return rows


def sql_truth() -> dict[str, dict[str, Truth]]:
    truth = empty_truth()
    for split, number, pixels, name in numbered():
        truth[split][f"img-{number:03d}"] = Truth(pixels, label=name, boxes=boxes_of(number))
    return truth


def write_sqlite(root: Path) -> Dataset:
    root.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(root / "data.sqlite") as connection:
        connection.execute(
            "CREATE TABLE photos (name TEXT PRIMARY KEY, image BLOB, label TEXT, a TEXT, part TEXT)"
        )
        connection.executemany("INSERT INTO photos VALUES (?, ?, ?, ?, ?)", sql_rows()[::-1])
    connection.close()
    query = "SELECT name AS key, image, label, a AS annotation, part AS split FROM photos;"
    return Dataset("sql", f"sqlite:///{root / 'data.sqlite'}", sql_truth(), options={"query": query})


WRITERS: dict[str, Callable[[Path], Dataset]] = {
    "folder": write_folder,
    "yolo": write_yolo,
    "coco": write_coco,
    "voc": write_voc,
    "masks": write_masks,
    "clips": write_clips,
    "hdf5": write_hdf5,
    "csv": write_csv,
    "clip table": write_clip_table,
    "parquet": write_parquet,
    "sqlite": write_sqlite,
}


def only(source: Source, index: int = 0) -> Sample:
    (samples,) = source.splits.values()
    return samples[index]


def boxes(sample: Sample, size: tuple[int, int] = (24, 16)) -> Boxes:
    found = sample.read_boxes(size)
    assert found is not None
    return found
