"""COCO: JSON files with `images`, `annotations` (bbox as x, y, width, height in pixels) and `categories`.

A JSON file is a split, named by its file's or folder's name (`instances_train2017.json`,
`valid/_annotations.coco.json`); images are looked for beside it, in `images/`, and in a folder of the split's
name. Categories are numbered by increasing id. Crowd regions (`iscrowd`) are left out, as everywhere in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from extract.sources.annotations import BoxedFiles, BoxTable, check_box, clip_box
from extract.sources.base import AnnotationError, Samples, Source, SourceError
from extract.sources.listing import Progress, make_key, resolve_inside
from extract.sources.splitting import SPLIT_NAMES
from files.reading import open_regular, read_regular


def open_coco(
    path: Path, *, images: str | None = None, unlabeled: bool = False, progress: Progress | None = None
) -> Source:
    """Open a COCO JSON file, or a folder with some. `images`: the folder that `file_name` starts from.

    `unlabeled`: images without an annotation are not labeled, instead of without objects.

    Raises SourceError and AnnotationError; the latter name the file and the annotation's id.
    """
    beside = path.parent.name in ("annotations", "labels")  # a JSON file in a folder of its own
    root = path if path.is_dir() else path.parent.parent if beside else path.parent
    files = find_json(path) if path.is_dir() else {split_of(path) or "train": path}
    if not files:
        raise SourceError(f"no COCO file in {path}: looked for *.json with images, annotations, categories")
    contents = {split: read_json(file) for split, file in files.items()}
    categories = merge_categories(contents, files)
    parts: dict[str, Samples] = {}
    notes: list[str] = []
    for split, content in contents.items():
        folder = (
            resolve_inside(root, images, "images") if images else find_images(content, files[split], root)
        )
        parts[split], dropped = read_split(content, files[split], folder, root, categories, unlabeled)
        if dropped:
            notes.append(f"{files[split].name}: {dropped} boxes without area inside their image left out")
        if progress is not None:
            progress(sum(len(samples) for samples in parts.values()))
    names = tuple(categories.values())
    return Source(
        kind="coco", root=str(root), task="detection", class_names=names, splits=parts, notes=tuple(notes)
    )


def find_json(folder: Path) -> dict[str, Path]:
    """Split → its JSON file, in the folder, its `annotations/`, or one folder per split."""
    found: dict[str, list[Path]] = {}
    for file in sorted(
        [*folder.glob("*.json"), *folder.glob("annotations/*.json"), *folder.glob("*/*.json")]
    ):
        if looks_like_coco(file):
            found.setdefault(split_of(file) or "train", []).append(file)
    chosen = {}
    for split, files in found.items():
        unique = list(dict.fromkeys(files))
        instances = [file for file in unique if file.name.startswith("instances")]
        candidates = instances if len(unique) > 1 and instances else unique
        if len(candidates) > 1:
            names = ", ".join(str(file.relative_to(folder)) for file in candidates)
            raise SourceError(f"several COCO files for split {split!r} ({names}): give the path of one")
        chosen[split] = candidates[0]
    return chosen


def looks_like_coco(file: Path) -> bool:
    """Whether the three lists are named anywhere in the file; cheap enough for files of gigabytes.

    Raises SourceError for a file that must be one by its name, and cannot be read.
    """
    wanted = {b'"images"', b'"annotations"', b'"categories"'}
    try:
        with open_regular(file) as stream:
            tail = b""
            while wanted and (block := stream.read(1 << 22)):
                window = tail + block
                wanted = {word for word in wanted if word not in window}
                tail = window[-16:]
    except OSError as error:
        if file.parent.name == "annotations" or file.name.startswith("instances"):
            raise SourceError(f"{file}: cannot be read: {error.strerror}") from None
        return False
    return not wanted


def split_of(file: Path) -> str | None:
    """The split that the file's name or its folder's name contains."""
    for text in (file.stem, file.parent.name):
        for word in re.split(r"[^a-z]+", text.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_regular(file))
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # its text has line and column
        raise AnnotationError(f"{file}: not JSON: {error}") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(name), list):
            raise AnnotationError(
                f"{file}: no list {name!r}: expected COCO's images, annotations, categories"
            )
    return content


def merge_categories(contents: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> dict[int, str]:
    """Category id → name over all splits, by increasing id. Raises AnnotationError when splits disagree."""
    merged: dict[int, str] = {}
    for split, content in contents.items():
        for category in content["categories"]:
            number, name = (
                field(category, "id", int, files[split]),
                field(category, "name", str, files[split]),
            )
            if merged.setdefault(number, name) != name:
                raise AnnotationError(
                    f"{files[split]}: category {number} is {name!r}, elsewhere {merged[number]!r}"
                )
    if not merged:
        raise AnnotationError(f"{next(iter(files.values()))}: no categories")
    return dict(sorted(merged.items()))


def read_split(
    content: Mapping[str, Any],
    file: Path,
    folder: Path,
    root: Path,
    categories: Mapping[int, str],
    unlabeled: bool,
) -> tuple[BoxedFiles, int]:
    """The samples of one JSON file, by key, and how many boxes had no area.

    `unlabeled`: images without an annotation are not labeled, instead of without objects.
    """
    index = {number: position for position, number in enumerate(categories)}
    images: dict[int, tuple[str, tuple[float, float] | None]] = {}
    for image in content["images"]:
        number, name = field(image, "id", int, file), field(image, "file_name", str, file)
        if number in images:
            raise AnnotationError(f"{file}: image id {number} occurs twice")
        path = resolve_inside(root, str(folder / name), f"{file}: image {number}")
        size = (image["width"], image["height"]) if image.get("width") and image.get("height") else None
        images[number] = (path.relative_to(root).as_posix(), size)
    boxes: dict[int, list[tuple[tuple[float, float, float, float], int]]] = {number: [] for number in images}
    dropped = 0
    for number, box, category in read_annotations(content["annotations"], images, index, file):
        size = images[number][1]
        clipped = clip_box(box, size or (float("inf"), float("inf")))
        if clipped is None:
            dropped += 1
        else:
            boxes[number].append((clipped, category))
    table = BoxTable()
    order = sorted(images, key=lambda number: images[number][0])
    annotated = {record["image_id"] for record in content["annotations"]}
    for number in order:
        if unlabeled and number not in annotated:
            table.add_unlabeled()
            continue
        table.add([box for box, _ in boxes[number]], [category for _, category in boxes[number]])
    paths = [images[number][0] for number in order]
    return BoxedFiles(root, paths, [make_key(path) for path in paths], table), dropped


def read_annotations(
    records: Iterable[Any], images: Mapping[int, Any], index: Mapping[int, int], file: Path
) -> Iterable[tuple[int, tuple[float, float, float, float], int]]:
    """(image id, box xyxy, class) of each annotation with a box. Raises AnnotationError."""
    for record in records:
        where = f"{file}: annotation {record.get('id') if isinstance(record, Mapping) else record!r}"
        image, category = field(record, "image_id", int, where), field(record, "category_id", int, where)
        if image not in images:
            raise AnnotationError(f"{where}: image_id {image} is not among the images")
        if category not in index:
            raise AnnotationError(f"{where}: category_id {category} is not among the categories")
        if record.get("iscrowd") or not record.get("bbox"):
            continue
        box = record["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise AnnotationError(f"{where}: bbox {box!r}: expected [x, y, width, height]")
        x, y, width, height = box
        yield image, check_box((x, y, x + width, y + height), where), index[category]


def field(record: Any, name: str, kind: type, where: Path | str) -> Any:
    """`record[name]`, checked. Raises AnnotationError."""
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise AnnotationError(
            f"{where}: {name} is {value!r}, expected {'a number' if kind is int else 'a text'}"
        )
    return value


def find_images(content: Mapping[str, Any], file: Path, root: Path) -> Path:
    """The folder in which the first image is found. Raises SourceError that lists where was looked."""
    if not content["images"]:
        raise SourceError(f"{file}: lists no images")
    first = field(content["images"][0], "file_name", str, file)
    words = [word for word in file.stem.split("_") if word]
    folders = [file.parent, file.parent / "images", root, root / "images"]
    folders += [base / word for base in (root, root / "images") for word in reversed(words)]
    for folder in folders:
        if (folder / first).exists():
            return folder
    looked = ", ".join(str(folder) for folder in folders if folder.is_dir())
    raise SourceError(f"{file}: image {first!r} not found in {looked}: pass images=FOLDER (from {root})")
