"""Tables: CSV, TSV or Parquet with a path or the bytes of an image per row.

Columns (first name that is there): image `path file_name filename file image_path image img` (a path from the table's
folder, or bytes, or Hugging Face's {bytes, path}), `key id`, `label class category target`, `split subset`,
`boxes` (+ `classes`) or `annotation` (JSON, see `parse_annotation`). A CSV with `xmin ymin xmax ymax` columns has one
row per box: rows of one path make one sample, `label` is the box's class. A folder may hold one table, or one per
split (`train.csv`, `val.csv`; `train-00000-of-00002.parquet`).
Clips: the paths are those of video files, or of folders of frames (column `clip` or `video` too).
Keys: the key column, else the path; bytes without a key: file name and row number.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from extract.sources.annotations import (
    BoxTable,
    Labels,
    Names,
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
    label_of,
)
from extract.sources.folder import Clip
from extract.sources.listing import PROGRESS_EVERY, Progress, make_key, resolve_inside, suffix_of
from extract.sources.splitting import SPLIT_NAMES
from files.reading import open_regular
from imaging.clips import VIDEO_SUFFIXES
from imaging.decode import IMAGE_SUFFIXES, ImageError

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
    "clip",
    "video",
    "clip_path",
    "video_path",
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

    def add(
        self,
        key: str,
        image: str | ParquetCell,
        label: str | int | None,
        boxes: list[tuple[float, float, float, float]] | None,
        classes: list[str | int],
    ) -> None:
        for column, value in zip(vars(self).values(), (key, image, label, boxes, classes), strict=True):
            column.append(value)

    def sort(self) -> list[int]:
        """Put the samples in the order of their keys; returns where each was before."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        for column in vars(self).values():
            column[:] = [column[row] for row in order]
        return order


class TableSamples(Samples):
    """Rows of a table; images (or clips) are paths relative to `root`, or cells."""

    def __init__(
        self, root: Path, rows: Rows, names: Labels, with_boxes: bool, *, clips: bool = False
    ) -> None:
        super().__init__(rows.keys)
        self.root, self.images, self.clips = root, rows.images, clips
        numbers = np.array([names.number(value) for value in rows.labels], np.int32)
        self.labels = numbers if (numbers >= 0).any() else None
        self.boxes: BoxTable | None = None
        if with_boxes:
            self.boxes = BoxTable()
            for boxes, classes in zip(rows.boxes, rows.classes, strict=True):
                self.boxes.add(boxes or [], [names.number(name) for name in classes])

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        some = len(self) if rows is None else len(rows)
        boxes = frozenset(["boxes"] if self.boxes is not None and some else [])
        return kinds_of_labels(self.labels, rows) | boxes

    def build(self, index: int) -> Sample:
        image, label = self.images[index], label_of(self.labels, index)
        if self.clips:
            return Sample(self._keys[index], label=label, frames=Clip(self.root / str(image)))
        content: Path | Payload = self.root / image if isinstance(image, str) else image
        boxes = None if self.boxes is None else self.boxes.of(index)
        return Sample(self._keys[index], content, label=label, boxes=boxes)


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
        table: TableFile = ParquetTable(file) if file.suffix.lower() == ".parquet" else CsvTable(file)
        columns = find_columns(table, image, label)
        if set(CORNERS) <= set(table.columns):
            read_box_rows(table, columns, root, split, names, splits)
        else:
            read_rows(table, columns, root, split, names, splits, progress)
    if not any(rows.keys for rows in splits.values()):
        raise SourceError(f"{path}: the table has no rows")
    return table_source("table", str(root), names.finish(str(path)), root, splits, names)


def table_source(
    kind: str, origin: str, classes: Names, root: Path, splits: Mapping[str, Rows], names: Labels
) -> Source:
    """The source of rows that are complete; images are relative to `root`, `classes` is what `names` finished with."""
    with_boxes = any(boxes is not None for rows in splits.values() for boxes in rows.boxes)
    clips = holds_clips(root, splits, origin)
    if clips and with_boxes:
        raise SourceError(f"{origin}: the rows are clips, which have no boxes: give a label, or none")
    parts = {name: TableSamples(root, rows, names, with_boxes, clips=clips) for name, rows in splits.items()}
    task = "sequence" if clips else "detection" if with_boxes else "classification" if classes else "features"
    return Source(kind=kind, root=origin, task=task, class_names=classes, splits=parts)


def holds_clips(root: Path, splits: Mapping[str, Rows], origin: str) -> bool:
    """Whether the rows are clips: video files, or folders of frames. Raises SourceError where some are and others are images.

    Without an image among them, names without a known suffix are folders of frames where one of them is a folder.
    """
    paths = [path for rows in splits.values() for path in rows.images if isinstance(path, str) and path]
    video = next((path for path in paths if suffix_of(path) in VIDEO_SUFFIXES), None)
    image = next((path for path in paths if suffix_of(path) in IMAGE_SUFFIXES), None)
    others = (path for path in paths if suffix_of(path) not in VIDEO_SUFFIXES | IMAGE_SUFFIXES)
    folder = next((path for path in others if os.path.isdir(root / path)), None)
    for kind, clip in (("video files", video), ("folders of frames", folder)):
        if clip is not None and image is not None:
            raise SourceError(f"{origin} lists both {kind} ({clip}) and images ({image}): split the table")
    return video is not None or folder is not None


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
        key = make_key(str(key)) if key not in (None, "") else name
        rows.add(key, content, *read_targets(values, columns, names, where))
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
            rows.add(name, content, None, [], [])
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


# -- the files behind a table ------------------------------------------------------------------------------------

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
BATCH_ROWS = 4096
MAX_FIELD = 1 << 24


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The bytes in one cell: row `row` of row group `group`; `number` counts from the file's start."""

    file: str
    column: str
    group: int
    row: int
    number: int

    def read(self) -> bytes:
        try:
            changed_ns = os.stat(self.file).st_mtime_ns
            value = _read_group(self.file, self.column, self.group, os.getpid(), changed_ns)[self.row].as_py()
        except (OSError, ValueError, IndexError) as error:
            raise ImageError(f"row {self.number} cannot be read: {error}") from None
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ImageError("no image bytes in this row")
        return value


Row = tuple[str, Mapping[str, Any], ParquetCell | None]  # place for messages, values, image bytes


class TableFile(Protocol):
    """A table's `path` and `columns`; `rows(image)` yields every row, image bytes only as a cell."""

    path: Path
    columns: list[str]

    def rows(self, image: str) -> Iterator[Row]: ...


class CsvTable:
    """CSV (`,` or `;`) or TSV with a header line. A row's place is its line number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            header = file.readline()
        self.delimiter = (
            "\t"
            if path.suffix.lower() == ".tsv" or "\t" in header
            else ";"
            if ";" in header and "," not in header
            else ","
        )
        self.columns = next(csv.reader([header], delimiter=self.delimiter), [])
        if not any(self.columns):
            raise SourceError(f"{path}: no header line with column names")

    def rows(self, image: str) -> Iterator[Row]:
        csv.field_size_limit(MAX_FIELD)  # the boxes of a crowded image are longer than the default allows
        with self._open() as file:
            reader = csv.DictReader(file, delimiter=self.delimiter, strict=True)
            try:
                for values in reader:
                    if None in values or None in values.values():
                        raise AnnotationError(
                            f"{self.path}:{reader.line_num}: expected {len(self.columns)} columns, "
                            f"found {'more' if None in values else 'fewer'}"
                        )
                    yield str(reader.line_num), values, None
            except (csv.Error, UnicodeDecodeError) as error:
                raise AnnotationError(f"{self.path}:{reader.line_num}: {error}") from None

    def _open(self) -> Any:
        try:
            return io.TextIOWrapper(open_regular(self.path), encoding="utf-8-sig", newline="")
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}") from None


class ParquetTable:
    """Parquet. A row's place is its number from 0. Image bytes stay in the file while rows are listed."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            open_regular(path).close()
            self.file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
        self.columns = list(self.file.schema_arrow.names)

    def rows(self, image: str) -> Iterator[Row]:
        import pyarrow.types as types

        kind = self.file.schema_arrow.field(image).type
        stored = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        columns = [name for name in self.columns if name != image or not stored]
        number = 0
        for group in range(self.file.num_row_groups):
            records: Iterator[Mapping[str, Any]]
            if columns:
                batches = self.file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                records = (record for batch in batches for record in batch.to_pylist())
            else:
                records = ({} for _ in range(self.file.metadata.row_group(group).num_rows))
            for row, record in enumerate(records):
                cell = ParquetCell(str(self.path), image, group, row, number) if stored else None
                yield f"row {number}", record, cell
                number += 1


def list_tables(path: Path) -> list[tuple[Path, str | None]]:
    """The table files and the split in their names; None: a column has it.

    Raises SourceError when a folder holds several tables that are not splits.
    """
    if not path.is_dir():
        return [(path, split_of_name(path) if path.suffix.lower() == ".parquet" else None)]
    files = sorted(
        f for folder in (path, path / "data") for f in folder.glob("*") if f.suffix.lower() in TABLE_SUFFIXES
    )
    if not files:
        raise SourceError(f"no table in {path}: looked for {', '.join(TABLE_SUFFIXES)}")
    if len(files) == 1:
        return [(files[0], split_of_name(files[0]))]
    splits = {file: split_of_name(file) for file in files}
    odd = [file.name for file, split in splits.items() if split is None]
    if odd:
        raise SourceError(
            f"{path} holds several tables, and {', '.join(odd)} name no split: give the path of one"
        )
    return list(splits.items())


def split_of_name(file: Path) -> str | None:
    """`train-00000-of-00002.parquet` and `train.csv` → `train`."""
    first = re.split(r"[^a-z]+", file.stem.lower(), maxsplit=1)[0]
    return SPLIT_NAMES.get(first)


@lru_cache(maxsize=2)
def _read_group(file: str, column: str, group: int, process: int, changed_ns: int) -> Any:
    """One column of a row group: neighboring rows are read one after the other."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column]).column(column)
