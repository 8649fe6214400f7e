"""Class folders of images or clips: `[train|val|test/]class/…/image.jpg`, and folders without labels.

The first folder below the root (or below the split) is the class; deeper folders are just part of the key.
Class names are sorted by code point (`10` before `9`), exactly as torchvision's `ImageFolder` and ultralytics do,
so that class numbers agree with theirs. A folder that holds images directly, or has a single sub-folder with
images, is unlabeled. With `unlabeled=true` images or clips beside the class folders are samples without a label.

Clips are video files, or folders of frames, in the same folders: `[train|val|test/][class/]clip.mp4`, or
`[train|val|test/][class/]clip/000001.jpg`; the two are not mixed. A folder of frames is one clip, its frames sorted by
name (numbers by value: frame 10 follows 9), its key the folder's path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extract.sources.base import Sample, Samples, Source, SourceError, kinds_of_labels, label_of
from extract.sources.listing import Progress, list_files, make_key, make_keys
from extract.sources.splitting import SPLIT_NAMES
from imaging.clips import VIDEO_SUFFIXES, ClipFrame, clip_content, read_clip
from imaging.decode import IMAGE_SUFFIXES
from store.format import NO_LABEL

SHOWN = 6
# A folder of masks or labels, alone or after the name of what it belongs to: `annotations`, `trainannot`, `val_masks`.
MASK_FOLDER = re.compile(
    r"(train|val|valid|test|images?)?[-_. ]?(annot|annots|annotations?|masks?|labels?|gt)"
)


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip: a video file, or a folder of frames."""

    path: Path

    def read(self) -> bytes:
        return clip_content(self.path)

    def stored_bytes(self) -> int:
        if not self.path.is_dir():
            return self.path.stat().st_size
        with os.scandir(self.path) as entries:
            return sum(entry.stat().st_size for entry in entries)

    def read_clip(self, count: int, *, pairs: bool, max_pixels: int, bit_depth: int) -> list[ClipFrame]:
        return read_clip(self.path, count, pairs=pairs, max_pixels=max_pixels, bit_depth=bit_depth)


class FileSamples(Samples):
    """Images, or clips, below `root`, with a label each (int32 [N], -1: none) or none at all."""

    def __init__(
        self, root: Path, paths: list[str], labels: npt.NDArray[np.int32] | None, *, clips: bool = False
    ) -> None:
        super().__init__(make_keys(paths))
        self.root, self.paths, self.labels, self.clips = root, paths, labels, clips

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return kinds_of_labels(self.labels, rows)

    def build(self, index: int) -> Sample:
        key, path, label = self._keys[index], self.root / self.paths[index], label_of(self.labels, index)
        return Sample(key, label=label, frames=Clip(path)) if self.clips else Sample(key, path, label)


def open_folder(
    path: Path,
    *,
    labelled: bool | None = None,
    unlabeled: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Open class folders or an unlabeled folder. `labelled`: None decides by the layout, see above.

    `unlabeled`: images beside the class folders have no label.
    Raises SourceError: no images, or images beside class folders.
    """
    files = list_files(path, IMAGE_SUFFIXES, progress)
    if not files:
        raise SourceError(f"no images in {path}: looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    return class_folders(path, files, labelled, unlabeled, clips=False)


def open_clips(
    path: Path,
    *,
    labelled: bool | None = None,
    unlabeled: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Open clips. `labelled`, `unlabeled`: as for images. Raises SourceError."""
    videos = list_files(path, VIDEO_SUFFIXES, progress)
    folders = folders_of(list_files(path, IMAGE_SUFFIXES, progress))
    if videos and folders:
        raise SourceError(
            f"{path} holds both video files ({videos[0]}) and frames ({folders[0]}/): split them"
        )
    if not videos and not folders:
        raise SourceError(f"no clips in {path}: expected video files or a folder of frames for each clip")
    return class_folders(path, videos or folders, labelled, unlabeled, clips=True)


def class_folders(
    root: Path, paths: list[str], labelled: bool | None, unlabeled: bool, *, clips: bool
) -> Source:
    """The images or clips at `paths`, with the classes and splits that their folders are named for."""
    by_split = split_paths(paths)
    names, notes = class_names_of(by_split, root, labelled, unlabeled)
    index = {name: number for number, name in enumerate(names)}
    splits = {}
    for split, (depth, members) in by_split.items():
        labels = None
        if names:
            folders = (class_folder(path, depth) for path in members)
            labels = np.fromiter((index.get(folder, NO_LABEL) for folder in folders), np.int32, len(members))
        splits[split] = FileSamples(root, members, labels, clips=clips)
    return Source(
        kind="clips" if clips else "folder",
        root=str(root),
        task="sequence" if clips else "classification" if names else "features",
        class_names=names,
        splits=splits,
        notes=notes,
        warnings=split_like_classes(names),
    )


def split_like_classes(names: Sequence[str]) -> tuple[str, ...]:
    """A warning when class folders are named like splits or like folders of masks, and what to do then."""
    splits = [name for name in names if name.lower() in SPLIT_NAMES]
    masks = [name for name in names if MASK_FOLDER.fullmatch(name.lower())]
    if not splits and len(masks) < 2:
        return ()
    odd = [*splits, *masks]
    shown = ", ".join(odd[:SHOWN]) + (" …" if len(odd) > SHOWN else "")
    text = f"{len(odd)} of {len(names)} class folders are named like splits or masks ({shown}): "
    if not splits:
        return (text + "for masks give --source masks --source-option masks=DIR",)
    options = " ".join(f"--split {SPLIT_NAMES[name.lower()]}={name}" for name in splits)
    advice = f"if they are splits, give {options}"
    return (text + advice + ("; for masks, --source masks --source-option masks=DIR" if masks else ""),)


def split_paths(files: list[str]) -> dict[str, tuple[int, list[str]]]:
    """Split name → (how many leading folders are not classes, its paths).

    The top folders are splits when all of them have a split's name and there is no file beside them.
    Raises SourceError when two folders mean the same split.
    """
    tops: dict[str, None] = dict.fromkeys(path.partition("/")[0] if "/" in path else "" for path in files)
    meanings = [SPLIT_NAMES.get(top.lower()) for top in tops]
    if None in meanings:
        return {"train": (0, files)}
    if len(set(meanings)) < len(meanings):
        raise SourceError(f"folders {', '.join(sorted(tops))} name the same split twice: rename one")
    parts: dict[str, list[str]] = {str(meaning): [] for meaning in meanings}
    for file in files:
        parts[SPLIT_NAMES[file.partition("/")[0].lower()]].append(file)
    return {split: (1, paths) for split, paths in parts.items()}


def class_names_of(
    by_split: dict[str, tuple[int, list[str]]], root: Path, labelled: bool | None, unlabeled: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of all splits together, sorted, and notes; () when the folder is unlabeled."""
    classes: set[str] = set()
    loose: list[str] = []
    for depth, paths in by_split.values():
        for path in paths:
            if folder := class_folder(path, depth):
                classes.add(folder)
            else:
                loose.append(path)
    if labelled is False or (labelled is None and not classes):
        return (), ()
    if loose and not unlabeled:
        raise SourceError(
            f"{len(loose)} images are beside the class folders of {root}, first {loose[0]!r}: "
            "move them into a class, or pass unlabeled=true to use them without a label (labelled=false: all images)"
        )
    if len(classes) == 1 and labelled is None:
        return (), (f"one folder of images ({next(iter(classes))!r}) is no class: images taken as unlabeled",)
    return tuple(sorted(classes)), ()


def class_folder(path: str, depth: int) -> str:
    """The class folder of an image or clip below `depth` other folders; "" beside the class folders."""
    parts = path.split("/", depth + 1)
    return make_key(parts[depth]) if len(parts) == depth + 2 else ""


def folders_of(files: list[str]) -> list[str]:
    """The folders that hold frames, sorted. Images in the root itself belong to no clip: SourceError."""
    folders = set()
    for file in files:
        folder, slash, _ = file.rpartition("/")
        if not slash:
            raise SourceError(
                f"image {file!r} is not part of a clip: put the frames of each clip into a folder"
            )
        folders.add(folder)
    return sorted(folders)


def looks_like_frames(files: Sequence[str]) -> bool:
    """Whether images are frames: every folder with images holds two or more, numbered without a gap."""
    groups: dict[str, list[int]] = {}
    for file in files:
        folder, slash, name = file.rpartition("/")
        match = re.fullmatch(r"(?:frame|img|image|f)?[-_ ]?(\d+)", name.rpartition(".")[0].lower())
        if not slash or match is None:
            return False
        groups.setdefault(folder, []).append(int(match[1]))
    # A class folder of numbered photos looks the same, but then the folders are the classes themselves.
    deep = all("/" in folder for folder in groups)
    return (
        deep
        and bool(groups)
        and all(len(n) > 1 and max(n) - min(n) + 1 == len(set(n)) for n in groups.values())
    )
