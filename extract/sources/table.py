"""Tables: CSV, TSV or Parquet with a path or the bytes of an image per row.

Columns (first name that is there): image `path file_name filename file image_path image img` (a path from the table's
folder, or bytes, or Hugging Face's {bytes, path}), `key id`, `label class category target`, `split subset`,
`boxes` (+ `classes`) or `annotation` (JSON, see `parse_annotation`). A CSV with `xmin ymin xmax ymax` columns has one
row per box: rows of one path make one sample, `label` is the box's class. A folder may hold one table, or one per
split (`train.csv`, `val.csv`; `train-00000-of-00002.parquet`).
Keys: the key column, else the path; bytes without a key: file name and row number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.sources.annotations import (
    BoxTable,
    FrozenBoxes,
    Labels,
    check_box,
    check_classes,
    parse_annotation,
)
from extract.sources.base import (
    AnnotationError,
    Payload,
    Sample,
    Samples,
    Source,
    SourceError,
    kinds_of_labels,
    kinds_where_any,
)
from extract.sources.listing import PROGRESS_EVERY, Progress, make_key, resolve_inside
from extract.sources.splitting import SPLIT_NAMES
from extract.sources.table_files import ParquetCell, TableFile, list_tables, open_table

IMAGE_COLUMNS = (
    "path",
    "file_name",
    "filename",
    "file",
    "image_path",
    "image",
    "img",
    "bytes",
    "image_bytes",
)
KEY_COLUMNS = ("key", "id")
LABEL_COLUMNS = ("label", "class", "category", "target", "class_name")
SPLIT_COLUMNS = ("split", "subset")
ANNOTATION_COLUMNS = ("annotation", "annotations")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class Rows:
    """The samples of one split while the table is read: one entry per sample."""

    keys: list[str] = field(default_factory=list)
    images: list[str | ParquetCell] = field(default_factory=list)
    labels: list[str | int | None] = field(default_factory=list)
    boxes: list[list[tuple[float, float, float, float]] | None] = field(default_factory=list)
    classes: list[list[str | int]] = field(default_factory=list)

    def sort(self) -> list[int]:
        """Put the samples in the order of their keys; returns where each was before."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        columns: list[list[Any]] = [self.keys, self.images, self.labels, self.boxes, self.classes]
        for values in columns:
            values[:] = [values[row] for row in order]
        return order


class TableSamples(Samples):
    """Rows of a table; images are paths relative to `root`, or cells."""

    def __init__(self, root: Path, rows: Rows, names: Labels, with_boxes: bool) -> None:
        self.root, self.images = root, rows.images
        self._keys = rows.keys
        numbers = np.array([names.number(value) for value in rows.labels], np.int32)
        self.labels = numbers if (numbers >= 0).any() else None
        self.boxes = freeze_boxes(rows, names) if with_boxes else None

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        boxes = frozenset(["boxes"] if self.boxes is not None else [])
        return kinds_of_labels(self.labels, rows) | kinds_where_any(boxes, self, rows)

    def build(self, index: int) -> Sample:
        image = self.images[index]
        content: Path | Payload = self.root / image if isinstance(image, str) else image
        label = None if self.labels is None or self.labels[index] < 0 else int(self.labels[index])
        boxes = None if self.boxes is None else self.boxes.of(index)
        return Sample(self._keys[index], content, label=label, boxes=boxes)


def freeze_boxes(rows: Rows, names: Labels) -> FrozenBoxes:
    table = BoxTable()
    for boxes, classes in zip(rows.boxes, rows.classes, strict=True):
        table.add(boxes or [], [names.number(name) for name in classes])
    return table.freeze()


def open_tables(
    path: Path,
    *,
    image: str | None = None,
    label: str | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open a table or a folder of tables. `image`, `label`: column names. Raises SourceError, AnnotationError."""
    root = path if path.is_dir() else path.parent
    names = Labels(class_names)
    splits: dict[str, Rows] = {}
    for file, split in list_tables(path):
        table = open_table(file)
        columns = find_columns(table, image, label)
        if set(CORNERS) <= set(table.columns):
            read_box_rows(table, columns, root, split, names, splits)
        else:
            read_rows(table, columns, root, split, names, splits, progress)
    if not any(rows.keys for rows in splits.values()):
        raise SourceError(f"{path}: the table has no rows")
    classes = names.finish(str(path))
    with_boxes = any(boxes is not None for rows in splits.values() for boxes in rows.boxes)
    parts = {name: TableSamples(root, rows, names, with_boxes) for name, rows in splits.items()}
    task = "detection" if with_boxes else "classification" if classes else "features"
    return Source(kind="table", root=str(root), task=task, class_names=classes, parts=parts)


def find_columns(table: TableFile, image: str | None, label: str | None) -> dict[str, str]:
    """Role → column name. Raises SourceError when there is no image column."""
    wanted = {
        "image": (image,) if image else IMAGE_COLUMNS,
        "label": (label,) if label else LABEL_COLUMNS,
        "key": KEY_COLUMNS,
        "split": SPLIT_COLUMNS,
        "boxes": ("boxes",),
        "classes": ("classes",),
        "annotation": ANNOTATION_COLUMNS,
    }
    found = {
        role: next((name for name in candidates if name in table.columns), "")
        for role, candidates in wanted.items()
    }
    for role, given in (("image", image), ("label", label)):
        if given and not found[role]:
            raise SourceError(f"{table.path}: no column {given!r}; it has {', '.join(table.columns)}")
    if not found["image"]:
        raise SourceError(
            f"{table.path}: no image column among {', '.join(table.columns)}: "
            f"expected one of {', '.join(IMAGE_COLUMNS)}, or pass image=COLUMN"
        )
    return {role: name for role, name in found.items() if name}


def read_rows(
    table: TableFile,
    columns: Mapping[str, str],
    root: Path,
    split: str | None,
    names: Labels,
    splits: dict[str, Rows],
    progress: Progress | None,
) -> None:
    """Add the rows of a table with one row per sample."""
    total = 0
    for place, values, cell in table.rows(columns["image"]):
        where = f"{table.path}:{place}"
        rows = splits.setdefault(split or split_of(values.get(columns.get("split", "")), where), Rows())
        content, name = locate(values.get(columns["image"]), cell, table, root, where)
        key = values.get(columns.get("key", ""))
        rows.keys.append(make_key(str(key)) if key not in (None, "") else name)
        rows.images.append(content)
        label, boxes, classes = read_targets(values, columns, names, where)
        rows.labels.append(label)
        rows.boxes.append(boxes)
        rows.classes.append(classes)
        total += 1
        if progress is not None and total % PROGRESS_EVERY == 0:
            progress(total)
    if progress is not None:
        progress(total)


def read_targets(
    values: Mapping[str, Any], columns: Mapping[str, str], names: Labels, where: str
) -> tuple[str | int | None, list[tuple[float, float, float, float]] | None, list[str | int]]:
    """Label, boxes and classes of a row. Raises AnnotationError."""
    label, boxes, classes = parse_annotation(values.get(columns.get("annotation", "")) or None, names, where)
    own = values.get(columns.get("label", ""))
    if own is not None and own != "":
        label = names.add(own, where)
    if "boxes" in columns:
        record = {
            "boxes": decode_json(values.get("boxes"), where) or [],
            "classes": decode_json(values.get("classes"), where) or [],
        }
        _, boxes, classes = parse_annotation(record, names, where)
    return label, boxes, classes


def decode_json(value: Any, where: str) -> Any:
    """A list as it is, or from JSON text."""
    import json

    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{where}: {value[:60]!r} is not JSON: {error}") from None


def read_box_rows(
    table: TableFile,
    columns: Mapping[str, str],
    root: Path,
    split: str | None,
    names: Labels,
    splits: dict[str, Rows],
) -> None:
    """Add the rows of a table with one row per box; empty corners: an image without objects."""
    index: dict[tuple[str, str], int] = {}
    for place, values, cell in table.rows(columns["image"]):
        where = f"{table.path}:{place}"
        part = split or split_of(values.get(columns.get("split", "")), where)
        content, name = locate(values.get(columns["image"]), cell, table, root, where)
        rows = splits.setdefault(part, Rows())
        row = index.setdefault((part, name), len(rows.keys))
        if row == len(rows.keys):
            rows.keys.append(name)
            rows.images.append(content)
            rows.labels.append(None)
            rows.boxes.append([])
            rows.classes.append([])
        corners = [values.get(name) for name in CORNERS]
        if all(value in (None, "") for value in corners):
            continue
        boxes = rows.boxes[row]
        assert boxes is not None
        boxes.append(check_box(corners, where))
        rows.classes[row] += check_classes([values.get(columns.get("label", ""))], 1, names, where)


def locate(
    value: Any, cell: ParquetCell | None, table: TableFile, root: Path, where: str
) -> tuple[str | ParquetCell, str]:
    """Where a row's image is, and the key that follows from it. Raises AnnotationError."""
    if cell is not None:
        return cell, f"{table.path.relative_to(root).as_posix()}#{cell.number:09d}"
    if not isinstance(value, str) or not value.strip():
        raise AnnotationError(f"{where}: the image is {value!r}, expected a path or bytes")
    relative = (
        resolve_inside(root, str(table.path.parent / value.strip()), where).relative_to(root).as_posix()
    )
    return relative, make_key(relative)


def split_of(value: Any, where: str) -> str:
    """The split that a row names; `train` when it names none. Raises AnnotationError for an odd name."""
    if value is None or str(value).strip() == "":
        return "train"
    name = str(value).strip().lower()
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise AnnotationError(f"{where}: split {value!r}: expected a name like train or val")
    return SPLIT_NAMES.get(name, name)
