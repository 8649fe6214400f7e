"""YOLO: `data.yaml` with `names` and `train`/`val`/`test`; one text file of normalized boxes per image.

- `path` in the yaml is the data set's root, absolute or relative to the yaml; without it, the yaml's folder.
- A split is a folder, a text file with one image per line, or a list of those. Nothing may leave the root, except
  for Roboflow's `../train/images`, which means `train/images` (ultralytics reads it so, too).
- The label of `…/images/…/a.jpg` is `…/labels/…/a.txt` (the last `images` counts), else `a.txt` beside the image.
  No label file, or an empty one: an image without objects.
- A line is `class x_center y_center width height`, or `class x1 y1 x2 y2 x3 y3 …` (a polygon: its bounds count),
  in fractions of the upright image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.sources.annotations import parse_class_names
from extract.sources.base import (
    AnnotationError,
    Boxes,
    Sample,
    Samples,
    Source,
    SourceError,
)
from extract.sources.listing import Progress, list_files, make_keys, resolve_inside, suffix_of
from extract.sources.splitting import SPLIT_NAMES
from files.reading import load_yaml, read_regular_text
from imaging.decode import IMAGE_SUFFIXES

# A coordinate beyond this is not a fraction slightly outside the image: the file has pixels.
_NO_FRACTION = 4.0


@dataclass(frozen=True, slots=True)
class YoloBoxes:
    """The boxes in one label file."""

    path: str
    num_classes: int
    unlabeled: bool = False  # what a missing file means: not labeled, instead of no objects

    def read(self, size: tuple[int, int]) -> Boxes:
        """Pixels of an image of `size` (width, height). Raises AnnotationError with file and line."""
        try:
            lines = read_regular_text(self.path).splitlines()
        except FileNotFoundError:
            return Boxes.unlabeled() if self.unlabeled else Boxes.of([], [])
        except (OSError, UnicodeDecodeError) as error:
            raise AnnotationError(f"{self.path}: label file cannot be read: {error}") from None
        rows = [
            parse_line(line, self.num_classes, f"{self.path}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
        unique = np.array(list(dict.fromkeys(rows)), np.float64).reshape(-1, 5)
        scale = np.array([size[0], size[1], size[0], size[1]], np.float64)
        return Boxes.of(unique[:, 1:] * scale, unique[:, 0])


def parse_line(line: str, num_classes: int, where: str) -> tuple[float, float, float, float, float]:
    """(class, x1, y1, x2, y2) in fractions of the image, which the box may leave. Raises AnnotationError."""
    fields = line.split()
    try:
        number, *values = (float(field) for field in fields)
    except ValueError:
        raise AnnotationError(
            f"{where}: {line.strip()!r}: expected numbers: class x y width height"
        ) from None
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise AnnotationError(
            f"{where}: {len(fields)} numbers: expected 5 (class x y width height) or a class and 3 or more points"
        )
    if not number.is_integer() or not 0 <= number < num_classes:
        raise AnnotationError(
            f"{where}: class {fields[0]}, but there are {num_classes} names (0 to {num_classes - 1})"
        )
    if not all(math.isfinite(value) for value in values):
        raise AnnotationError(f"{where}: {line.strip()!r}: numbers must be finite")
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    if max(abs(value) for value in box) > _NO_FRACTION:
        raise AnnotationError(
            f"{where}: box {line.strip()!r}: coordinates are fractions of the image's sides, not pixels"
        )
    return number, *box


class YoloSamples(Samples):
    """Images below `root`; `paths` are relative to it."""

    every_has = frozenset(["boxes"])

    def __init__(self, root: Path, paths: list[str], num_classes: int, unlabeled: bool = False) -> None:
        super().__init__(make_keys(paths))
        self.root, self.paths, self.num_classes, self.unlabeled = root, paths, num_classes, unlabeled

    def build(self, index: int) -> Sample:
        path = self.paths[index]
        label = os.path.join(self.root, label_path(path))
        return Sample(
            self._keys[index], self.root / path, boxes=YoloBoxes(label, self.num_classes, self.unlabeled)
        )


def label_path(path: str) -> str:
    """The label file of an image, both relative to the root."""
    stem = path[: len(path) - len(suffix_of(path))]
    head, images, tail = ("/" + stem).rpartition("/images/")
    return f"{head}/labels/{tail}.txt".lstrip("/") if images else f"{stem}.txt"


def open_yolo(path: Path, *, unlabeled: bool = False, progress: Progress | None = None) -> Source:
    """Open the data set of a `data.yaml`, given as the file or its folder.

    `unlabeled`: images without a label file are not labeled, instead of without objects. Raises SourceError.
    """
    file = find_yaml(path) if path.is_dir() else path
    if file is None:
        raise SourceError(f"no data.yaml with `names` and `train` in {path}")
    settings = read_yaml(file)
    root = find_root(settings, file)
    names = read_names(settings, file)
    parts: dict[str, Samples] = {}
    for key, entry in settings.items():
        split = SPLIT_NAMES.get(str(key).lower())
        if split is None or not entry:
            continue
        if split in parts:
            raise SourceError(f"{file}: split {split!r} is given twice (as {key!r} again)")
        entries = entry if isinstance(entry, list) else [entry]
        if not all(isinstance(item, str) for item in entries):
            raise SourceError(f"{file}: {key}: {entry!r}: expected a folder, a text file, or a list of those")
        paths = [path for item in entries for path in list_entry(item, root, file, progress)]
        parts[split] = YoloSamples(root, sorted(dict.fromkeys(paths)), len(names), unlabeled)
    parts = {name: samples for name, samples in parts.items() if len(samples)}
    if not parts:
        raise SourceError(f"{file}: no images in any split: check `path`, `train` and `val`")
    return Source(kind="yolo", root=str(root), task="detection", class_names=names, splits=parts)


def find_yaml(folder: Path) -> Path | None:
    """The data set's yaml in a folder. Raises SourceError when there are several."""
    found = [
        file
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
        if isinstance(settings := _try_yaml(file), Mapping) and ("names" in settings or "nc" in settings)
    ]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SourceError(f"{folder} has several data-set yaml files ({names}): give the path of one")
    if found:
        return found[0]
    # The usual names: a file that cannot be read is reported, not passed over.
    for name in ("data.yaml", "data.yml"):
        if (folder / name).exists():
            read_yaml(folder / name)
    return None


def read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        settings = load_yaml(read_regular_text(file))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read as yaml: {' '.join(str(error).split())}") from None
    if not isinstance(settings, Mapping):
        raise SourceError(f"{file}: expected `names:`, `train:`, `val:` …, got {type(settings).__name__}")
    return settings


def find_root(settings: Mapping[str, Any], file: Path) -> Path:
    """The data set's root: `path`, seen from the yaml's folder. Raises SourceError when there is none."""
    text = settings.get("path")
    root = Path(os.path.normpath(file.parent / str(text))) if text else file.parent
    if not root.is_dir():
        raise SourceError(
            f"{file}: `path: {text}` means {root}, which is not a folder: correct it or remove the line"
        )
    return root


def read_names(settings: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    count = settings.get("nc")
    if "names" not in settings and isinstance(count, int) and count > 0:
        return tuple(str(number) for number in range(count))
    names = parse_class_names(settings.get("names"), f"{file}: names")
    if count is not None and count != len(names):
        raise SourceError(f"{file}: nc is {count}, but there are {len(names)} names")
    return names


def list_entry(text: str, root: Path, file: Path, progress: Progress | None) -> list[str]:
    """Image paths, relative to the root, of a folder or a list file. Raises SourceError."""
    path = resolve_entry(text, root, file)
    if path.is_dir():
        base = "" if path == root else path.relative_to(root).as_posix() + "/"
        return [base + name for name in list_files(path, IMAGE_SUFFIXES, progress)]
    if path.suffix.lower() == ".txt" and path.is_file():
        return read_list(path, root)
    raise SourceError(f"{file}: {text!r} means {path}, which is neither a folder nor a list of images (.txt)")


def resolve_entry(text: str, root: Path, file: Path) -> Path:
    try:
        return resolve_inside(root, text, str(file))
    except SourceError:
        shortened = text.strip()
        while shortened.startswith("../"):
            shortened = shortened[3:]
        if shortened == text.strip() or not (root / shortened).exists():
            raise
        return resolve_inside(root, shortened, str(file))


def read_list(path: Path, root: Path) -> list[str]:
    """The images that a text file names, one a line: from the root, or with `./` from the file's folder."""
    try:
        lines = read_regular_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        base = path.parent if text.startswith("./") or not (root / text).exists() else root
        image = resolve_inside(root, os.path.join(base, text), f"{path}:{number}")
        found.append(image.relative_to(root).as_posix())
    return found


def _try_yaml(file: Path) -> Any:
    try:
        return read_yaml(file)
    except SourceError:
        return None
