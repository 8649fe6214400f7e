"""Clips: video files, or folders of frames, in class folders or without labels.

`[train|val|test/][class/]clip.mp4`, or `[train|val|test/][class/]clip/000001.jpg`; the two are not mixed. A folder of
frames is one clip, its frames sorted by name (numbers by value: frame 10 follows 9), its key the folder's path. Class
names are sorted by code point.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from extract.sources.base import Frames, Sample, Samples, Source, SourceError
from extract.sources.folder import class_names_of, label_paths, split_paths
from extract.sources.listing import Progress, list_files, make_keys
from imaging.clips import sample_frame_indices, time_order
from imaging.decode import IMAGE_SUFFIXES, decode_image, read_file
from imaging.errors import ImageError
from imaging.video import decode_frames

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".ts"]
)


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A clip in one file."""

    path: Path

    def read(self) -> bytes:
        return read_file(self.path)

    def read_frames(self, count: int, *, pairs: bool, max_pixels: int) -> list[Image.Image]:
        return decode_frames(
            self.path,
            lambda total: sample_frame_indices(total, count, pairs=pairs).reshape(-1),
            max_pixels=max_pixels,
        )


@dataclass(frozen=True, slots=True)
class FrameFolder:
    """A clip as a folder of images; `names` in the order of time."""

    folder: Path
    names: tuple[str, ...]

    def read(self) -> bytes:
        """The digests of all frames: what identifies the clip's content."""
        return b"".join(hashlib.blake2b(read_file(self.folder / name)).digest() for name in self.names)

    def read_frames(self, count: int, *, pairs: bool, max_pixels: int) -> list[Image.Image]:
        rows = sample_frame_indices(len(self.names), count, pairs=pairs).reshape(-1).tolist()
        images = {row: self._read(row, max_pixels) for row in dict.fromkeys(rows)}
        return [images[row] for row in rows]

    def _read(self, row: int, max_pixels: int) -> Image.Image:
        try:
            return decode_image(self.folder / self.names[row], max_pixels=max_pixels)
        except ImageError as error:
            raise ImageError(f"frame {self.names[row]}: {error.reason}") from None


class ClipSamples(Samples):
    """Clips below `root`; frame names are given for folders of frames."""

    def __init__(
        self,
        root: Path,
        paths: list[str],
        labels: npt.NDArray[np.int32] | None,
        frames: dict[str, tuple[str, ...]] | None,
    ) -> None:
        self.root, self.paths, self.labels, self.frames = root, paths, labels, frames
        self._keys = make_keys(paths)

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def build(self, index: int) -> Sample:
        path = self.paths[index]
        clip: Frames = (
            VideoFile(self.root / path)
            if self.frames is None
            else FrameFolder(self.root / path, self.frames[path])
        )
        label = None if self.labels is None else int(self.labels[index])
        return Sample(self._keys[index], label=label, frames=clip)


def open_clips(path: Path, *, labelled: bool | None = None, progress: Progress | None = None) -> Source:
    """Open clips. `labelled`: None decides by the layout, as for images. Raises SourceError."""
    videos = list_files(path, VIDEO_SUFFIXES, progress)
    folders = group_frames(list_files(path, IMAGE_SUFFIXES, progress))
    if videos and folders:
        raise SourceError(
            f"{path} holds both video files ({videos[0]}) and frames ({next(iter(folders))}/): split them"
        )
    clips = videos or sorted(folders)
    if not clips:
        raise SourceError(f"no clips in {path}: expected video files or a folder of frames for each clip")
    by_split = split_paths(clips)
    names, notes = class_names_of(by_split, path, labelled)
    index = {name: number for number, name in enumerate(names)}
    parts = {
        split: ClipSamples(path, members, label_paths(members, depth, index), None if videos else folders)
        for split, (depth, members) in by_split.items()
    }
    return Source(kind="clips", root=str(path), task="sequence", class_names=names, parts=parts, notes=notes)


def group_frames(files: list[str]) -> dict[str, tuple[str, ...]]:
    """Folder → its frames in the order of time. Images in the root itself belong to no clip: SourceError."""
    groups: dict[str, list[str]] = {}
    for file in files:
        folder, slash, name = file.rpartition("/")
        if not slash:
            raise SourceError(f"image {file!r} lies in no clip: frames belong in a folder for each clip")
        groups.setdefault(folder, []).append(name)
    return {folder: tuple(sorted(names, key=time_order)) for folder, names in groups.items()}


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
