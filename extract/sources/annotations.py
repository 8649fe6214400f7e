"""What the layouts with boxes share: checks of boxes, class names, and files with boxes kept in flat arrays.

Shapes: `N` samples, `M` boxes of all of them.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from extract.sources.base import AnnotationError, Boxes, Sample, Samples
from files.reading import read_regular_text
from store.format import NO_LABEL

Names = tuple[str, ...]

# A number in a text table: `3`, `-1`, `3.0` (a column with gaps, written by pandas); `007` is a name.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")


class BoxTable:
    """Boxes of many samples, added one sample after the other, in flat arrays (4 bytes a number)."""

    def __init__(self) -> None:
        self.values, self.classes, self.ends = array("f"), array("i"), array("q", [0])

    def add(self, boxes: Iterable[tuple[float, float, float, float]], classes: Iterable[int]) -> None:
        """The boxes of the next sample."""
        for box in boxes:
            self.values.extend(box)
        self.classes.extend(classes)
        self.ends.append(len(self.classes))

    def add_unlabeled(self) -> None:
        """The next sample is not labeled."""
        self.add([(0.0, 0.0, 0.0, 0.0)], [NO_LABEL])

    def of(self, index: int) -> Boxes:
        first, end = self.ends[index], self.ends[index + 1]
        return Boxes.of(self.values[4 * first : 4 * end], self.classes[first:end])


class BoxedFiles(Samples):
    """Image files below `root` with boxes."""

    every_has = frozenset(["boxes"])

    def __init__(self, root: Path, paths: Sequence[str], keys: Sequence[str], boxes: BoxTable) -> None:
        super().__init__(keys)
        self.root, self.paths, self.boxes = root, paths, boxes

    def build(self, index: int) -> Sample:
        return Sample(key=self._keys[index], image=self.root / self.paths[index], boxes=self.boxes.of(index))


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, stripped. Raises AnnotationError for what is no UTF-8 text file."""
    try:
        lines = read_regular_text(file).splitlines()
    except OSError as error:
        raise AnnotationError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AnnotationError(f"{file}: not UTF-8 text") from None
    return [line.strip() for line in lines]


def check_box(box: Any, where: str) -> tuple[float, float, float, float]:
    """Four finite numbers x1, y1, x2, y2 with x1 ≤ x2 and y1 ≤ y2. Raises AnnotationError."""
    try:
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError):
        raise AnnotationError(f"{where}: box {box!r} is not four numbers") from None
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        raise AnnotationError(f"{where}: box {box!r} has numbers that are not finite")
    if x2 < x1 or y2 < y1:
        raise AnnotationError(f"{where}: box {box!r} ends before it begins: expected x1 ≤ x2 and y1 ≤ y2")
    return x1, y1, x2, y2


def clip_box(
    box: tuple[float, float, float, float], size: tuple[float, float]
) -> tuple[float, float, float, float] | None:
    """The part of the box inside an image of `size` (width, height); None when nothing is left."""
    x1, y1 = max(0.0, box[0]), max(0.0, box[1])
    x2, y2 = min(float(size[0]), box[2]), min(float(size[1]), box[3])
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def clip_boxes(boxes: Boxes, size: tuple[int, int]) -> tuple[Boxes, int]:
    """The boxes' parts inside an image of `size` (width, height), and how many had none and were dropped."""
    low, high = boxes.values[:, :2], boxes.values[:, 2:]
    values = np.concatenate([np.maximum(low, 0), np.minimum(high, np.array(size, np.float32))], axis=1)
    kept = np.all(values[:, 2:] > values[:, :2], axis=1, keepdims=True)[:, 0]
    kept |= boxes.classes == NO_LABEL  # the mark of an unlabeled image
    return Boxes(values[kept], boxes.classes[kept]), int((~kept).sum())


def parse_class_names(value: Any, where: str) -> Names:
    """Names from a list, or from a dictionary number → name whose numbers are 0 … C − 1. Raises AnnotationError."""
    if isinstance(value, Mapping):
        try:
            numbered = {int(number): str(name) for number, name in value.items()}
        except (TypeError, ValueError):
            raise AnnotationError(f"{where}: class names {value!r} need whole numbers as keys") from None
        if sorted(numbered) != list(range(len(numbered))):
            raise AnnotationError(
                f"{where}: class numbers are {sorted(numbered)}, expected 0 to {len(numbered) - 1}"
            )
        value = [numbered[number] for number in range(len(numbered))]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise AnnotationError(f"{where}: class names {reprlib.repr(value)}: expected a list of names")
    for name in value:
        if not isinstance(name, str | int | float):
            raise AnnotationError(f"{where}: class name {reprlib.repr(name)}: expected a text")
    names = tuple(str(name) for name in value)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AnnotationError(f"{where}: class names occur twice: {', '.join(twice)}")
    return names


class Labels:
    """Class labels of a table as they come, numbers or names, and the class names that follow from them.

    Without given names: names are sorted by code point; numbers 0 … max are named by their digits.
    """

    def __init__(self, names: Sequence[str] | None) -> None:
        self.given = None if names is None else parse_class_names(list(names), "class_names")
        self.index = {name: number for number, name in enumerate(self.given or ())}
        self.texts: dict[str, None] = {}
        self.largest = -1

    def add(self, value: Any, where: str) -> str | int | None:
        """Check one label; None, NaN and an empty text mean unlabeled. Raises AnnotationError."""
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, float | np.floating) and float(value).is_integer():
            value = int(value)
        if isinstance(value, bool):
            value = int(value)
        if isinstance(value, str) and value not in self.index and _WHOLE_NUMBER.fullmatch(value):
            value = int(float(value))
        if isinstance(value, int | np.integer):
            return self._add_number(int(value), where)
        if not isinstance(value, str):
            raise AnnotationError(f"{where}: label {value!r} is neither a class name nor a number")
        if self.given is not None and value not in self.index:
            raise AnnotationError(
                f"{where}: unknown class {value!r}: class_names has {', '.join(self.given)}"
            )
        self.texts[value] = None
        return value

    def _add_number(self, value: int, where: str) -> int:
        if value < 0:
            raise AnnotationError(
                f"{where}: label {value} is negative: leave it empty for an unlabeled sample"
            )
        if self.given is not None and value >= len(self.given):
            raise AnnotationError(f"{where}: label {value}, but there are {len(self.given)} class names")
        if value > 1_000_000:
            raise AnnotationError(f"{where}: label {value} is no class number")
        self.largest = max(self.largest, value)
        return value

    def finish(self, where: str) -> Names:
        """The class names. Raises AnnotationError when names and numbers are mixed."""
        if self.given is not None:
            return self.given
        if self.texts and self.largest >= 0:
            raise AnnotationError(
                f"{where}: labels are partly names ({next(iter(self.texts))!r}) and partly numbers: pass class_names"
            )
        if self.texts:
            names = tuple(sorted(self.texts))
            self.index = {name: number for number, name in enumerate(names)}
            return names
        return tuple(str(number) for number in range(self.largest + 1))

    def number(self, value: str | int | None) -> int:
        """The class number of a label that `add` returned, after `finish`; -1 for none."""
        if value is None:
            return -1
        return self.index[value] if isinstance(value, str) else value


def parse_annotation(
    value: Any, labels: Labels, where: str
) -> tuple[str | int | None, list[tuple[float, float, float, float]] | None, list[str | int]]:
    """Label, boxes and their classes from an annotation: JSON text, or what it stands for.

    Forms: `{"label": L}`, `{"boxes": [[x1, y1, x2, y2], …], "classes": [C, …]}`, a list
    `[{"box": [x1, y1, x2, y2], "class": C}, …]` (`bbox` and `label` work too). Pixels; classes are names or
    numbers. Boxes are None when the annotation has none. Raises AnnotationError.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{where}: annotation is not JSON: {error}") from None
    if value is None:
        return None, None, []
    if isinstance(value, list):
        return None, *_boxes_of_records(value, labels, where)
    if not isinstance(value, Mapping):
        raise AnnotationError(f"{where}: annotation {value!r}: expected an object or a list of objects")
    label = labels.add(value.get("label"), where)
    if value.get("boxes") is None:
        return label, None, []
    boxes = [check_box(box, where) for box in _as_list(value["boxes"], "boxes", where)]
    classes = _as_list(value.get("classes", []), "classes", where)
    return label, boxes, check_classes(classes, len(boxes), labels, where)


def check_classes(classes: Iterable[Any], count: int, labels: Labels, where: str) -> list[str | int]:
    """One class for each of `count` boxes. Raises AnnotationError."""
    checked = [labels.add(name, where) for name in classes]
    if len(checked) != count or None in checked:
        raise AnnotationError(f"{where}: {count} boxes, but {len(checked) - checked.count(None)} classes")
    return [name for name in checked if name is not None]


def _boxes_of_records(
    records: list[Any], labels: Labels, where: str
) -> tuple[list[tuple[float, float, float, float]], list[str | int]]:
    boxes, names = [], []
    for record in records:
        if not isinstance(record, Mapping):
            raise AnnotationError(f'{where}: {record!r}: expected {{"box": [x1, y1, x2, y2], "class": …}}')
        boxes.append(check_box(record.get("box", record.get("bbox")), where))
        names.append(record.get("class", record.get("label")))
    return boxes, check_classes(names, len(boxes), labels, where)


def _as_list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise AnnotationError(f"{where}: {name} is {type(value).__name__}, expected a list")
    return list(value)
