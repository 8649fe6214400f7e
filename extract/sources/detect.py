"""`open_source`: find the layout of a data set, open it, cut the validation split, check the keys."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any

from extract.sources.base import Source, SourceError
from extract.sources.listing import Progress, check_unique, suffix_of
from extract.sources.splitting import cut_validation, join_splits
from files.names import path_on_disk
from imaging.clips import time_order

# Kind → "module:function"; the function takes the path and the layout's own options as keywords.
KINDS: Mapping[str, str] = {
    "folder": "extract.sources.folder:open_folder",
    "yolo": "extract.sources.yolo:open_yolo",
    "coco": "extract.sources.coco:open_coco",
    "voc": "extract.sources.voc:open_voc",
    "masks": "extract.sources.masks:open_masks",
    "clips": "extract.sources.folder:open_clips",
    "hdf5": "extract.sources.hdf5:open_hdf5",
    "table": "extract.sources.table:open_tables",
    "sql": "extract.sources.sql:open_sql",
}

FILE_KINDS: Mapping[str, str] = {
    ".yaml": "yolo",
    ".yml": "yolo",
    ".json": "coco",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "table",
}

SWITCHES = dict.fromkeys(("true", "yes", "1", "on"), True) | dict.fromkeys(("false", "no", "0", "off"), False)

# Options that only one layout has, and so that they decide between layouts.
MASK_OPTIONS = frozenset(["masks", "ignore", "colors", "mask_suffix"])

# How many files are looked at to tell one layout from another, in all and in one folder: the masks of a large data set
# are in a folder that comes after that of the images.
PEEK_FILES, PEEK_IN_FOLDER = 10_000, 500


def open_source(
    path: Path | str,
    kind: str = "auto",
    *,
    split: Mapping[str, str] | None = None,
    val_fraction: float = 0.1,
    group_duplicates: bool | None = None,
    recorded: Callable[[], Mapping[str, Container[str]] | None] = lambda: None,
    progress: Progress | None = None,
    **options: Any,
) -> Source:
    """Open the data set at `path` (a folder, a file, or a database URL).

    `kind`: one of `KINDS`, or `auto`. `split`: name → path of data sets of the same layout that are the splits; a
    relative path starts from `path`, else from the working folder. `val_fraction`: what share becomes `val` when
    there is only one split (0: none). `group_duplicates`: see `cut_validation`; `recorded` gives its argument of
    that name, and is called for that cut alone. `progress` is called with the number of samples found so far. `options` are the layout's own,
    see its module.
    Raises SourceError with what is wrong and what to do.
    """
    if not 0 <= val_fraction < 1:
        raise SourceError(f"val_fraction {val_fraction}: expected 0 ≤ fraction < 1")
    if split:
        source = open_splits(path, split, kind, progress, options)
    else:
        source = open_one(path, kind, progress, options)
    if len(source.splits) == 1 and val_fraction > 0:
        (samples,) = source.splits.values()
        parts, notes = cut_validation(samples, val_fraction, group_duplicates, recorded())
        notes += [
            f"none of the {len(samples):,} images fell into {name} with --val-fraction {val_fraction:g}"
            for name in {"train", "val"} - parts.keys()
        ]
        source = replace(source, splits=parts, notes=(*source.notes, *notes))
    check_unique([key for part in source.splits.values() for key in part.keys], source.root)
    return source


def open_splits(
    path: Path | str,
    split: Mapping[str, str],
    kind: str,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> Source:
    """One source from several data sets, each of which is a split."""
    root = Path(os.path.abspath(path))
    sources = {}
    for name, text in split.items():
        place = root / text if (root / text).exists() else Path(os.path.abspath(text))
        inside = place.is_dir() and place.is_relative_to(root)
        prefix = f"{place.relative_to(root).as_posix()}/" if inside and place != root else f"{name}/"
        sources[name] = open_one(place, kind, progress, options), prefix
    return join_splits(sources, str(root))


def open_one(path: Path | str, kind: str, progress: Progress | None, options: Mapping[str, Any]) -> Source:
    """One data set as its layout gives it, before any cut."""
    if kind == "auto":
        kind = "masks" if options.keys() & MASK_OPTIONS else detect_kind(path)
    if kind not in KINDS:
        raise SourceError(f"unknown source kind {kind!r}: expected auto, {', '.join(KINDS)}")
    module, function = KINDS[kind].split(":")
    opener = getattr(importlib.import_module(module), function)
    settings = read_options(kind, opener, options)
    target: Path | str = str(path) if kind == "sql" else existing(path)
    source: Source = opener(target, progress=progress, **settings)
    return source


def existing(path: Path | str) -> Path:
    """The absolute path. Raises SourceError when nothing is there."""
    target = path_on_disk(Path(os.path.abspath(path)))
    if not target.exists():
        raise SourceError(f"{target} does not exist")
    return target


def read_options(kind: str, opener: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The layout's options; texts from a command line become what the option is.

    Raises SourceError that names options the layout does not have (and the nearest valid one), and bad values.
    """
    parameters = inspect.signature(opener).parameters
    valid = [name for name in parameters if name not in ("path", "progress")]
    settings = {}
    for name, value in options.items():
        if name not in valid:
            near = get_close_matches(name, valid, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(valid) or 'none'}"
            raise SourceError(f"source {kind!r} has no option {name!r}: {hint}")
        annotation = str(parameters[name].annotation) if isinstance(value, str) else ""
        if annotation.startswith("bool"):
            word = value.strip().lower()
            if word not in SWITCHES:
                raise SourceError(f"source option {name}: got {value!r}, expected true or false")
            value = SWITCHES[word]
        elif annotation.startswith("Sequence"):
            value = [item.strip() for item in value.split(",")]
        settings[name] = value
    return settings


def detect_kind(path: Path | str) -> str:
    """The layout of the data at `path`. Raises SourceError for a file type that no layout reads."""
    if "://" in str(path):
        return "sql"
    target = existing(path)
    if target.is_file():
        kind = FILE_KINDS.get(target.suffix.lower())
        if kind is None:
            raise SourceError(
                f"{target}: no data set is read from a {target.suffix or 'nameless'} file: see --source"
            )
        return kind
    return detect_folder(target)


def detect_folder(root: Path) -> str:
    """The layout of a folder, the more particular ones first."""
    from extract.sources import coco, folder, masks, yolo

    if yolo.find_yaml(root) is not None:
        return "yolo"
    if coco.find_json(root):
        return "coco"
    files = list(islice(peek_files(root), PEEK_FILES))
    suffixes = {suffix_of(file) for file in files}
    images = [file for file in files if suffix_of(file) in masks.IMAGE_SUFFIXES]
    if ".xml" in suffixes and images:
        return "voc"
    if images and any(file.endswith(".txt") and "labels" in file.split("/")[:-1] for file in files):
        raise SourceError(
            f"{root} has text files in labels/ but no data.yaml: write one with `names`, `train` and `val`, "
            "or pass --source folder to use the images alone"
        )
    if masks.looks_like_masks(images):
        return "masks"
    if suffixes & folder.VIDEO_SUFFIXES or folder.looks_like_frames(images):
        return "clips"
    tops = [file for file in files if "/" not in file or file.startswith("data/")]
    if any(suffix_of(file) in (".csv", ".tsv", ".parquet") for file in tops):
        return "table"
    if not images and any(suffix_of(file) in (".h5", ".hdf5") for file in tops):
        raise SourceError(f"{root} holds HDF5 files: give the path of one")
    return "folder"


def peek_files(folder: Path) -> Iterator[str]:
    """Some relative paths, folder by folder, in a fixed order; linked folders are followed one level deep.

    Of a large folder the first names count, numbers by value, so that frames are seen without a gap.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = os.path.relpath(parent, folder)
        prefix = "" if base == "." else base.replace(os.sep, "/") + "/"
        shown = [name for name in names if not name.startswith(".")]
        if len(shown) > PEEK_IN_FOLDER:
            shown = nsmallest(PEEK_IN_FOLDER, shown, key=time_order)
        yield from (prefix + name for name in sorted(shown))
        for name in folders:
            linked = os.path.join(parent, name)
            if os.path.islink(linked):
                yield from (f"{prefix}{name}/{inner}" for inner in sorted(os.listdir(linked)))
