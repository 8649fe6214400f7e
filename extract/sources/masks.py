"""Segmentation: images and masks of class ids (palette or gray PNG; 255 means ignore).

- `images/` + `masks/` (or `JPEGImages/` + `SegmentationClass/`, see the tables below), each with or without `train/`,
  `val/`, `test/` above or below, or VOC's lists in `ImageSets/Segmentation`;
- a folder and its masks side by side: `train` + `trainannot` (CamVid), `X` + `X_labels`, `X` + `X_masks`, …;
- masks beside their images, distinguished by a suffix (`a.jpg`, `a_mask.png`);
- masks in a folder of any name: `masks=DIR`.

A mask has the stem of its image, perhaps with one of `MASK_SUFFIXES`; an image without a mask is an error, or with
`unlabeled=true` a sample without a mask. Masks that hold nothing but 0 and 255 are taken as background and foreground (`binary`). `ignore`: class ids, or names of a color
table, that become 255. `colors`: a file that says which color is which class, see below. Class names come from
`class_names`, from the color table, from `classes.txt`, else they are the ids that occur; ignored classes at their end
are left out.

A color table has lines of `R G B name` (CamVid's `label_colors.txt`), a CSV file with the columns name, r, g, b, or JSON: an object name →
[r, g, b], or a list of {"name": …, "color": [r, g, b]}. The order of the file is the order of the classes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from extract.sources.annotations import Names, parse_class_names, read_lines
from extract.sources.base import AnnotationError, Sample, Samples, Source, SourceError
from extract.sources.listing import Progress, list_files, make_keys, suffix_of
from extract.sources.splitting import SPLIT_NAMES
from files.reading import read_regular_text
from imaging.decode import IMAGE_SUFFIXES, ImageError, read_file
from imaging.masks import IGNORE, Mask, decode_mask, encode_mask

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "gt", "SegmentationClass", "SegmentationClassPNG")
MASK_SUFFIXES = (
    "",
    "_mask",
    "-mask",
    ".mask",
    "_label",
    "_labels",
    "_gt",
    "_seg",
    "_segmentation",
    "_gtFine_labelIds",
    "_L",
)
# `X` + one of these, beside a folder `X`, holds the masks of X's images.
FOLDER_ENDINGS = (
    "annot",
    "annots",
    "annotations",
    "labels",
    "label",
    "masks",
    "mask",
    "gt",
    "seg",
    "segmentation",
)
LOSSLESS = frozenset([".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm"])  # what masks come in
Pair = tuple[str, str | None]  # image and mask; None: the image is not labeled
NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How masks are read. `binary`: 255 means class 1; `ignore`: ids that become 255; `colors`: of each class."""

    num_classes: int
    binary: bool = False
    ignore: tuple[int, ...] = ()
    colors: tuple[Color, ...] | None = None

    def decode(self, path: Path) -> Mask:
        """Ids uint8 [H, W] with ignored ones as 255, not checked against the classes. Raises AnnotationError."""
        try:
            ids = decode_mask(read_file(path), colors=self.colors)
        except ImageError as error:
            raise AnnotationError(f"{path}: mask {error.reason}") from None
        if self.ignore:
            ids[np.isin(ids, self.ignore)] = IGNORE
        return (ids == IGNORE).astype(np.uint8) if self.binary else ids


@dataclass(frozen=True, slots=True)
class MaskFile:
    """One mask."""

    path: Path
    rule: MaskRule

    def read(self, size: tuple[int, int] | None) -> bytes:
        ids, classes = self.rule.decode(self.path), self.rule.num_classes
        if size is not None and ids.shape != (size[1], size[0]):
            raise AnnotationError(
                f"{self.path}: mask of {ids.shape[1]}×{ids.shape[0]} pixels, its image has {size[0]}×{size[1]}"
            )
        found = ids[(ids >= classes) & (ids != IGNORE)]
        if found.size:
            raise AnnotationError(
                f"{self.path}: class id {int(found.max())}, but there are {classes} classes (0 to {classes - 1}, "
                f"{IGNORE}: ignore): correct class_names, or pass ignore={int(found.max())}"
            )
        return encode_mask(ids)


class MaskedFiles(Samples):
    """Images and their masks, both relative to `root`."""

    every_has = frozenset(["mask"])

    def __init__(self, root: Path, pairs: Sequence[Pair], rule: MaskRule) -> None:
        super().__init__(make_keys([image for image, _ in pairs]))
        self.root, self.pairs, self.rule = root, pairs, rule

    def build(self, index: int) -> Sample:
        image, mask = self.pairs[index]
        file = None if mask is None else MaskFile(self.root / mask, self.rule)
        return Sample(self._keys[index], self.root / image, mask=file)


def open_masks(
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    binary: bool | None = None,
    mask_suffix: str | None = None,
    masks: str | None = None,
    ignore: Sequence[str] = (),
    colors: str | None = None,
    unlabeled: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Open images with masks. `binary`: None finds out from all masks. `unlabeled`: some images have none.

    Raises SourceError.
    """
    suffixes = MASK_SUFFIXES if mask_suffix is None else (mask_suffix,)
    members = read_lists(path)
    files = list_files(path, IMAGE_SUFFIXES, progress)
    if masks is None:
        pairs = pair_files(path, files, suffixes, members, unlabeled)
    else:
        folder = Path(os.path.normpath(path / masks))  # from the data set's root, or as it is written
        if not folder.is_dir():
            raise SourceError(f"source option masks={masks}: {folder} is not a folder")
        pairs = pair_with_folder(path, files, folder, suffixes, members, unlabeled)
    splits = split_pairs(pairs, members)
    table = None
    if colors is not None:
        places = [file for file in (path / colors, Path(colors)) if file.is_file()]
        if not places:
            raise SourceError(
                f"source option colors={colors}: no such file in {path} or in the working folder"
            )
        table = read_colors(places[0])
    names = read_class_names(path, class_names) if table is None or class_names is not None else table[0]
    rule = MaskRule(0, False, ignored_ids(ignore, names), None if table is None else table[1])
    names, binary, notes = complete_rule(path, pairs, names, binary, rule)
    rule = replace(rule, num_classes=len(names), binary=binary)
    parts = {name: MaskedFiles(path, members, rule) for name, members in splits.items()}
    return Source(
        kind="masks", root=str(path), task="segmentation", class_names=names, splits=parts, notes=notes
    )


def complete_rule(
    root: Path, pairs: Sequence[Pair], names: Names | None, binary: bool | None, rule: MaskRule
) -> tuple[Names, bool, tuple[str, ...]]:
    """Class names without the ignored ones at their end, whether 255 is class 1, and notes.

    Reads all masks where one of the two is open.
    """
    notes: tuple[str, ...] = ()
    if binary is None and rule.colors is not None:
        binary = False
    if names is None or binary is None:
        occurs = np.zeros(256, np.bool_)
        for _, mask in pairs:
            if mask is not None:
                occurs[np.unique(rule.decode(root / mask))] = True
        found = set(np.flatnonzero(occurs).tolist())
        if binary is None:
            binary = found <= {0, IGNORE} and IGNORE in found and not rule.ignore
            notes = ("masks hold only 0 and 255: 255 taken as class 1, not as ignore",) if binary else ()
        if names is None:
            count = 2 if binary else max(found - {IGNORE}, default=0) + 1
            names = tuple(str(number) for number in range(count))
    while len(names) > 1 and len(names) - 1 in rule.ignore:
        names = names[:-1]
    return names, binary, notes


def ignored_ids(values: Sequence[str], names: Names | None) -> tuple[int, ...]:
    """The ids that `ignore` names, by number or by class name. Raises SourceError for anything else."""
    known = {name.lower(): number for number, name in enumerate(names or ())}
    ids = []
    for value in map(str, values):
        number = int(value) if value.isascii() and value.isdigit() else known.get(value.lower())
        if number is None or number > IGNORE:
            raise SourceError(
                f"source option ignore: got {value!r}, expected class ids of 0 to 255 or class names, like ignore=11,255"
            )
        ids.append(number)
    return tuple(ids)


def pair_with_folder(
    root: Path,
    files: Sequence[str],
    folder: Path,
    suffixes: Sequence[str],
    members: Mapping[str, str] | None,
    unlabeled: bool,
) -> list[Pair]:
    """(image, mask) for each image below `root` but outside `folder`, which holds the masks.

    A mask has its image's path, perhaps without the leading folders: `images/train/a.png` → `train/a.png`, `a.png`.
    """
    inside = (
        f"{folder.relative_to(root).as_posix()}/" if folder.is_relative_to(root) and folder != root else None
    )
    masks = {_stem(file): os.path.relpath(folder / file, root) for file in list_files(folder, IMAGE_SUFFIXES)}
    images = [file for file in files if inside is None or not file.startswith(inside)]

    def find(image: str) -> str | None:
        parts = _stem(image).split("/")
        ends = ("/".join(parts[depth:]) for depth in range(len(parts)))
        return next(
            (masks[end + suffix] for end in ends for suffix in suffixes if end + suffix in masks), None
        )

    return match(root, images, find, members, unlabeled)


def pair_files(
    root: Path,
    files: list[str],
    suffixes: Sequence[str],
    members: Mapping[str, str] | None = None,
    unlabeled: bool = False,
) -> list[Pair]:
    """(image, mask) for each image, sorted; only those whose stem is in `members`, if given.

    Raises SourceError for an image without a mask.
    """
    stems, beside = {_stem(file) for file in files}, paired_folders(files)
    masks: dict[str, str] = {}
    others: list[str] = []
    for file in files:
        stem = _stem(file)
        suffixed = any(end and stem.endswith(end) and stem.removesuffix(end) in stems for end in suffixes)
        paired = _inside(file, beside)
        if paired is not None:
            masks[beside[paired] + stem[len(paired) :]] = file
        elif suffixed or _mask_folder(file) is not None:
            masks[stem] = file
        else:
            others.append(file)
    # With a folder for images, images elsewhere (object masks, pictures of masks) are not samples.
    images = [file for file in others if _image_folder(file) is not None] or others

    def find(image: str) -> str | None:
        stem = _stem(image)
        own = [stem + suffix for suffix in suffixes] if beside else []
        return next((masks[name] for name in [*_mask_stems(stem, suffixes), *own] if name in masks), None)

    return match(root, images, find, members, unlabeled)


def match(
    root: Path,
    images: Sequence[str],
    find: Callable[[str], str | None],
    members: Mapping[str, str] | None,
    unlabeled: bool,
) -> list[Pair]:
    """(image, mask) of each image, or of those in `members`.

    Raises SourceError for an image without a mask, with `unlabeled` only where none has one.
    """
    if members is not None:
        images = [file for file in images if Path(file).stem in members]
    found = [(image, find(image)) for image in images]
    missing = [image for image, mask in found if mask is None]
    if missing and not unlabeled:
        raise SourceError(
            f"{len(missing)} of {len(images)} images in {root} have no mask, first {missing[0]!r}: a mask has its "
            "image's stem, in masks/, in a folder of its own (option masks=DIR) or with a suffix like _mask (option "
            "mask_suffix); option unlabeled=true takes them as not labeled"
        )
    if len(missing) == len(found):
        raise SourceError(
            f"no images with masks in {root}: expected images/ and masks/, train/ and trainannot/, or a.jpg and a_mask.png"
        )
    return found


def paired_folders(files: Sequence[str]) -> dict[str, str]:
    """Folder of masks → folder of their images, both ending with `/`: `trainannot/` → `train/`, `a_labels/` → `a/`.

    Masks are lossless, and each has an image of the same stem: class folders `face` and `face_mask` are no pair.
    """
    folders = {file[: place + 1] for file in files for place, letter in enumerate(file) if letter == "/"}
    twins = {
        folder: twin for folder in folders for twin in [_image_twin(folder, folders)] if twin is not None
    }
    members: dict[str, set[str]] = {folder: set() for pair in twins.items() for folder in pair}
    lossy: set[str] = set()
    for file in files if twins else ():
        for place in [index + 1 for index, letter in enumerate(file) if letter == "/"]:
            if file[:place] in members:
                members[file[:place]].add(_stem(file)[place:])
                if suffix_of(file) not in LOSSLESS:
                    lossy.add(file[:place])
    return {
        folder: twin
        for folder, twin in sorted(twins.items())
        if folder not in lossy and _mirrors(members[folder], members[twin])
    }


def _image_twin(folder: str, folders: Container[str]) -> str | None:
    """`x/trainannot/` → `x/train/`, when that is there."""
    name = folder.rstrip("/")
    bases = [name[: -len(end)].rstrip("_-. ") for end in FOLDER_ENDINGS if name.lower().endswith(end)]
    found = [f"{base}/" for base in bases if base and not base.endswith("/") and f"{base}/" in folders]
    return min(found, key=len, default=None)


def _mirrors(masks: set[str], images: set[str]) -> bool:
    """Whether nearly every mask has an image: the stem is the same, or the mask's has one of the suffixes."""
    hits = sum(
        any(stem.endswith(end) and stem.removesuffix(end) in images for end in MASK_SUFFIXES)
        for stem in masks
    )
    return hits >= 0.9 * len(masks)


def _inside(file: str, folders: Container[str]) -> str | None:
    """The folder of `folders` that holds the file."""
    places = (index + 1 for index, letter in enumerate(file) if letter == "/")
    return next((file[:place] for place in places if file[:place] in folders), None)


def looks_like_masks(images: Sequence[str]) -> bool:
    """Whether some of these files are masks: in a folder for masks, beside one for images, or with `_mask`."""
    stems = {_stem(file) for file in images}
    if any(_mask_folder(file) for file in images) and any(_image_folder(file) for file in images):
        return True
    if paired_folders(images):
        return True
    return any(_stem(f).endswith("_mask") and _stem(f).removesuffix("_mask") in stems for f in images)


def read_lists(root: Path) -> dict[str, str] | None:
    """VOC's `ImageSets/Segmentation`: stem → split; None when there is none."""
    lists = root / "ImageSets" / "Segmentation"
    members: dict[str, str] = {}
    for name in ("trainval", "test", "val", "train"):  # the more particular list has the last word
        file = lists / f"{name}.txt"
        if file.exists():
            split = SPLIT_NAMES.get(name, "train")
            members |= dict.fromkeys(filter(None, read_lines(file)), split)
    return members or None


def split_pairs(pairs: Sequence[Pair], members: Mapping[str, str] | None = None) -> Mapping[str, list[Pair]]:
    """Splits by list, or by a folder called train, val or test on the image's path; else all in `train`."""
    parts: dict[str, list[Pair]] = {}
    for image, mask in pairs:
        if members is not None:
            parts.setdefault(members[Path(image).stem], []).append((image, mask))
            continue
        folders = [SPLIT_NAMES[part.lower()] for part in image.split("/")[:-1] if part.lower() in SPLIT_NAMES]
        if not folders:
            return {"train": list(pairs)}
        parts.setdefault(folders[0], []).append((image, mask))
    return parts


def read_class_names(root: Path, given: Sequence[str] | None) -> Names | None:
    if given is not None:
        return parse_class_names(list(given), "class_names")
    for name in NAME_FILES:
        file = root / name
        if file.exists():
            return parse_class_names(list(filter(None, read_lines(file))), str(file))
    return None


def _mask_stems(stem: str, suffixes: Sequence[str]) -> list[str]:
    """Where the mask of an image may be, without its file suffix; with a suffix beside it as well."""
    bases = [stem] if _image_folder(stem) is None else []
    parts = stem.split("/")
    for depth, part in enumerate(parts[:-1]):
        if part in IMAGE_FOLDERS:
            bases += ["/".join([*parts[:depth], folder, *parts[depth + 1 :]]) for folder in MASK_FOLDERS]
    return [base + suffix for base in [*bases, stem] for suffix in suffixes if base != stem or suffix]


def _stem(path: str) -> str:
    return path[: len(path) - len(suffix_of(path))]


def _mask_folder(path: str) -> str | None:
    return next((part for part in path.split("/")[:-1] if part in MASK_FOLDERS), None)


def _image_folder(path: str) -> str | None:
    return next((part for part in path.split("/")[:-1] if part in IMAGE_FOLDERS), None)


# -- color tables ------------------------------------------------------------------------------------------------

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
