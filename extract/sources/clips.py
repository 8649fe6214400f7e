"""Clips: video files, or folders of frames, in class folders or without labels.

`[train|val|test/][class/]clip.mp4`, or `[train|val|test/][class/]clip/000001.jpg`; the two are not mixed. A folder of
frames is one clip, its frames sorted by name (numbers by value: frame 10 follows 9), its key the folder's path. Class
names are sorted by code point.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extract.sources.base import Sample, Samples, Source, SourceError, kinds_of_labels
from extract.sources.folder import class_names_of, label_paths, split_like_classes, split_paths
from extract.sources.listing import Progress, list_files, make_keys
from imaging.clips import ClipFrame, clip_content, read_clip
from imaging.decode import IMAGE_SUFFIXES
from imaging.video import VIDEO_SUFFIXES


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


class ClipSamples(Samples):
    """Clips below `root`, with a label each (int32 [N]) or none at all."""

    def __init__(self, root: Path, paths: list[str], labels: npt.NDArray[np.int32] | None) -> None:
        self.root, self.paths, self.labels = root, paths, labels
        self._keys = make_keys(paths)

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return kinds_of_labels(self.labels, rows)

    def build(self, index: int) -> Sample:
        label = None if self.labels is None else int(self.labels[index])
        return Sample(self._keys[index], label=label, frames=Clip(self.root / self.paths[index]))


def open_clips(path: Path, *, labelled: bool | None = None, progress: Progress | None = None) -> Source:
    """Open clips. `labelled`: None decides by the layout, as for images. Raises SourceError."""
    videos = list_files(path, VIDEO_SUFFIXES, progress)
    folders = folders_of(list_files(path, IMAGE_SUFFIXES, progress))
    if videos and folders:
        raise SourceError(
            f"{path} holds both video files ({videos[0]}) and frames ({folders[0]}/): split them"
        )
    clips = videos or folders
    if not clips:
        raise SourceError(f"no clips in {path}: expected video files or a folder of frames for each clip")
    by_split = split_paths(clips)
    names, notes = class_names_of(by_split, path, labelled)
    index = {name: number for number, name in enumerate(names)}
    parts = {
        split: ClipSamples(path, members, label_paths(members, depth, index))
        for split, (depth, members) in by_split.items()
    }
    return Source(
        kind="clips",
        root=str(path),
        task="sequence",
        class_names=names,
        parts=parts,
        notes=notes,
        warnings=split_like_classes(names),
    )


def folders_of(files: list[str]) -> list[str]:
    """The folders that hold frames, sorted. Images in the root itself belong to no clip: SourceError."""
    folders = set()
    for file in files:
        folder, slash, _ = file.rpartition("/")
        if not slash:
            raise SourceError(f"image {file!r} lies in no clip: frames belong in a folder for each clip")
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
