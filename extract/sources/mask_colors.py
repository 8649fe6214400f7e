"""Color tables: which color of an RGB mask is which class.

Lines of `R G B name` (CamVid's `label_colors.txt`), a CSV file with the columns name, r, g, b, or JSON: an object name →
[r, g, b], or a list of {"name": …, "color": [r, g, b]}. The order of the file is the order of the classes.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from extract.sources.annotations import Names, parse_class_names
from extract.sources.base import AnnotationError, SourceError
from files.reading import read_regular_text

Color = tuple[int, int, int]

MOST_CLASSES = 255  # 255 itself means ignore
COLUMNS = {"red": "r", "green": "g", "blue": "b", "class": "name", "label": "name"}


def read_colors(file: Path) -> tuple[Names, tuple[Color, ...]]:
    """Class names and their colors. Raises SourceError for a file that is missing, AnnotationError for its content."""
    try:
        text = read_regular_text(file, "utf-8-sig")
    except OSError as error:
        raise SourceError(f"colors={file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AnnotationError(
            f"{file}: not a text file: expected lines of `R G B name`, CSV or JSON"
        ) from None
    entries = list(parse_entries(file, text))
    if not 1 <= len(entries) <= MOST_CLASSES:
        raise AnnotationError(f"{file}: {len(entries)} colors, expected 1 to {MOST_CLASSES}")
    names = parse_class_names([name for name, _ in entries], str(file))
    colors = tuple(color for _, color in entries)
    twice = next((color for color in colors if colors.count(color) > 1), None)
    if twice is not None:
        both = ", ".join(name for name, color in entries if color == twice)
        raise AnnotationError(f"{file}: color {twice} stands for several classes: {both}")
    return names, colors


def parse_entries(file: Path, text: str) -> Iterator[tuple[str, Color]]:
    """(name, color) in the order of the file. Raises AnnotationError naming file and place."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        yield from parse_json(file, text)
    elif suffix == ".csv":
        yield from parse_csv(file, text)
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split(maxsplit=3)
            if not words or words[0].startswith("#"):
                continue
            if len(words) < 4:
                raise AnnotationError(f"{file}:{number}: {line.strip()!r}: expected `R G B name`")
            yield words[3].strip(), check_color(words[:3], f"{file}:{number}")


def parse_csv(file: Path, text: str) -> Iterator[tuple[str, Color]]:
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    for number, row in enumerate(rows, start=2):
        named = {
            COLUMNS.get(name, name): value
            for key, value in row.items()
            if key
            for name in [key.strip().lower()]
        }
        if not {"name", "r", "g", "b"} <= named.keys():
            raise AnnotationError(f"{file}: columns {', '.join(map(str, row))}: expected name, r, g, b")
        yield (
            str(named["name"]).strip(),
            check_color([named[channel] for channel in "rgb"], f"{file}:{number}"),
        )


def parse_json(file: Path, text: str) -> Iterator[tuple[str, Color]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: not JSON: {error}") from None
    if isinstance(content, Mapping):
        content = [{"name": name, "color": color} for name, color in content.items()]
    if not isinstance(content, list):
        raise AnnotationError(
            f"{file}: expected an object name → [r, g, b], or a list of objects with name and color"
        )
    for number, entry in enumerate(content):
        where = f"{file}: entry {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise AnnotationError(f'{where}: expected {{"name": …, "color": [r, g, b]}}')
        yield entry["name"], check_color(entry.get("color"), where)


def check_color(values: Any, where: str) -> Color:
    """Three whole numbers of 0 to 255. Raises AnnotationError."""
    texts = [str(value).strip() for value in values] if isinstance(values, list | tuple) else []
    if len(texts) != 3 or not all(re.fullmatch(r"\d{1,3}", text) and int(text) < 256 for text in texts):
        raise AnnotationError(f"{where}: color {values!r}: expected three whole numbers of 0 to 255")
    red, green, blue = map(int, texts)
    return red, green, blue
