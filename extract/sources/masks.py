"""Segmentation: images and masks of class ids (palette or grey PNG; 255 means ignore).

`images/` + `masks/` (or `JPEGImages/` + `SegmentationClass/`, see the tables below), each with or without
`train/`, `val/`, `test/` above or below, or VOC's lists in `ImageSets/Segmentation`; or masks beside their images, told apart by a suffix (`a.jpg`,
`a_mask.png`). A mask has the stem of its image, perhaps with one of `MASK_SUFFIXES`; an image without a mask is an
error. Masks that hold nothing but 0 and 255 are taken as background and foreground (`binary`).
Class names come from `class_names`, from `classes.txt`, else they are the ids that occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extract.sources.annotations import parse_class_names
from extract.sources.base import AnnotationError, Sample, Samples, Source, SourceError, kinds_where_any
from extract.sources.listing import Progress, list_files, make_keys, suffix_of
from extract.sources.splitting import SPLIT_NAMES
from imaging.decode import IMAGE_SUFFIXES, read_file
from imaging.errors import ImageError
from imaging.masks import IGNORE, decode_mask, encode_mask

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
)
NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")


@dataclass(frozen=True, slots=True)
class MaskFile:
    """One mask. `binary`: 255 means class 1."""

    path: Path
    num_classes: int
    binary: bool

    def read(self, size: tuple[int, int] | None) -> bytes:
        try:
            ids = decode_mask(read_file(self.path))
        except ImageError as error:
            raise AnnotationError(f"{self.path}: mask {error.reason}") from None
        if size is not None and ids.shape != (size[1], size[0]):
            raise AnnotationError(
                f"{self.path}: mask of {ids.shape[1]}×{ids.shape[0]} pixels, its image has {size[0]}×{size[1]}"
            )
        if self.binary:
            ids = (ids == IGNORE).astype(np.uint8)
        found = ids[(ids >= self.num_classes) & (ids != IGNORE)]
        if found.size:
            raise AnnotationError(
                f"{self.path}: class id {int(found.max())}, but there are {self.num_classes} classes "
                f"(0 to {self.num_classes - 1}, {IGNORE}: ignore)"
            )
        return encode_mask(ids)


class MaskedFiles(Samples):
    """Images and their masks, both relative to `root`."""

    def __init__(self, root: Path, pairs: Sequence[tuple[str, str]], num_classes: int, binary: bool) -> None:
        self.root, self.pairs, self.num_classes, self.binary = root, pairs, num_classes, binary
        self._keys = make_keys([image for image, _ in pairs])

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return kinds_where_any(frozenset(["mask"]), self, rows)

    def build(self, index: int) -> Sample:
        image, mask = self.pairs[index]
        lazy = MaskFile(self.root / mask, self.num_classes, self.binary)
        return Sample(self._keys[index], self.root / image, mask=lazy)


def open_masks(
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    binary: bool | None = None,
    mask_suffix: str | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open images with masks. `binary`: None finds out from all masks. Raises SourceError."""
    suffixes = MASK_SUFFIXES if mask_suffix is None else (mask_suffix,)
    members = read_lists(path)
    pairs = pair_files(path, list_files(path, IMAGE_SUFFIXES, progress), suffixes, members)
    splits = split_pairs(pairs, members)
    names = read_class_names(path, class_names)
    notes: tuple[str, ...] = ()
    if names is None or binary is None:
        found = scan_ids(path, pairs)
        if binary is None:
            binary = found <= {0, IGNORE} and IGNORE in found
            notes = ("masks hold only 0 and 255: 255 taken as class 1, not as ignore",) if binary else ()
        if names is None:
            count = 2 if binary else max(found - {IGNORE}, default=0) + 1
            names = tuple(str(number) for number in range(count))
    parts = {name: MaskedFiles(path, members, len(names), binary) for name, members in splits.items()}
    return Source(
        kind="masks", root=str(path), task="segmentation", class_names=names, parts=parts, notes=notes
    )


def pair_files(
    root: Path, files: list[str], suffixes: Sequence[str], members: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """(image, mask) for each image, sorted; only those whose stem is in `members`, if given.

    Raises SourceError for an image without a mask.
    """
    stems = {_stem(file) for file in files}
    masks: dict[str, str] = {}
    others: list[str] = []
    for file in files:
        stem = _stem(file)
        beside = any(end and stem.endswith(end) and stem.removesuffix(end) in stems for end in suffixes)
        if beside or _mask_folder(file) is not None:
            masks[stem] = file
        else:
            others.append(file)
    # With a folder for images, whatever lies elsewhere (object masks, pictures of masks) is no image.
    images = [file for file in others if _image_folder(file) is not None] or others
    if members is not None:
        images = [file for file in images if Path(file).stem in members]
    pairs, missing = [], []
    for image in images:
        mask = next((masks[name] for name in _mask_stems(_stem(image), suffixes) if name in masks), None)
        if mask is None:
            missing.append(image)
        else:
            pairs.append((image, mask))
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(images)} images in {root} have no mask, first {missing[0]!r}: "
            "a mask has its image's stem, in masks/ or with a suffix like _mask (option mask_suffix)"
        )
    if not pairs:
        raise SourceError(
            f"no images with masks in {root}: expected images/ and masks/, or a.jpg and a_mask.png"
        )
    return pairs


def looks_like_masks(images: Sequence[str]) -> bool:
    """Whether some of these files are masks: in a folder for masks, with a mirror in one for images, or `_mask`."""
    stems = {_stem(file) for file in images}
    if any(_mask_folder(file) for file in images) and any(_image_folder(file) for file in images):
        return True
    return any(_stem(f).endswith("_mask") and _stem(f).removesuffix("_mask") in stems for f in images)


def read_lists(root: Path) -> dict[str, str] | None:
    """VOC's `ImageSets/Segmentation`: stem → split; None when there is none."""
    lists = root / "ImageSets" / "Segmentation"
    members: dict[str, str] = {}
    for name in ("trainval", "test", "val", "train"):  # the more particular list has the last word
        file = lists / f"{name}.txt"
        if file.is_file():
            split = SPLIT_NAMES.get(name, "train")
            members |= {line.strip(): split for line in file.read_text("utf-8").splitlines() if line.strip()}
    return members or None


def split_pairs(
    pairs: Sequence[tuple[str, str]], members: Mapping[str, str] | None = None
) -> Mapping[str, list[tuple[str, str]]]:
    """Splits by list, or by a folder called train, val or test on the image's path; else all in `train`."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for image, mask in pairs:
        if members is not None:
            parts.setdefault(members[Path(image).stem], []).append((image, mask))
            continue
        folders = [SPLIT_NAMES[part.lower()] for part in image.split("/")[:-1] if part.lower() in SPLIT_NAMES]
        if not folders:
            return {"train": list(pairs)}
        parts.setdefault(folders[0], []).append((image, mask))
    return parts


def read_class_names(root: Path, given: Sequence[str] | None) -> tuple[str, ...] | None:
    if given is not None:
        return parse_class_names(list(given), "class_names")
    for name in NAME_FILES:
        file = root / name
        if file.is_file():
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            return parse_class_names([line for line in lines if line], str(file))
    return None


def scan_ids(root: Path, pairs: Sequence[tuple[str, str]]) -> set[int]:
    """All ids that occur in the masks. Raises AnnotationError for a mask that cannot be read."""
    found = np.zeros(256, np.bool_)
    for _, mask in pairs:
        try:
            found[np.unique(decode_mask(read_file(root / mask)))] = True
        except ImageError as error:
            raise AnnotationError(f"{root / mask}: mask {error.reason}") from None
    return set(np.flatnonzero(found).tolist())


def _mask_stems(stem: str, suffixes: Sequence[str]) -> list[str]:
    """Where the mask of an image may lie, without its file suffix; with a suffix beside it as well."""
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
