"""Which files the inputs of a command name (files, folders, globs), and how an image of them is read."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from files.names import printable
from imaging.clips import VIDEO_SUFFIXES, frame_files
from imaging.decode import IMAGE_SUFFIXES, ImageError, decode
from train.errors import DeliveryError

CLIP_SUFFIXES = VIDEO_SUFFIXES | {".gif"}


FRAMES = 16  # of a clip, where the checkpoint does not say


class BadFile(NamedTuple):
    """A file that could not be read; it is named and skipped."""

    file: str
    reason: str


def expand_inputs(
    inputs: Sequence[str], inside: Callable[[Path], list[Path]], missing: str, what: str
) -> list[Path]:
    """What `inputs` name, each once, in their order. `inside` lists what an existing file or folder stands for.

    Raises DeliveryError for an input that names nothing: "no `missing` in it", or no such `what`.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.exists():
            named = inside(path)
            if not named:
                raise DeliveryError(f"{path}: no {missing} in it")
        else:
            matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
            named = [item for match in matches for item in inside(Path(match))]
            if not named:
                raise DeliveryError(
                    f"{text}: no such file or folder, and no match; name {what}, folders or a quoted glob"
                )
        found |= dict.fromkeys(named)
    return list(found)


def find_images(inputs: Sequence[str], *, videos: bool = False) -> list[Path]:
    """The image files that `inputs` name, with `videos` video files too; folders are searched through and sorted.

    Raises DeliveryError for an input that names nothing.
    """
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES

    def inside(path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]  # whatever it is called
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())

    if videos:
        return expand_inputs(inputs, inside, "image or video files", "images or videos")
    return expand_inputs(inputs, inside, "image files", "images")


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_clips(inputs: Sequence[str]) -> list[Path]:
    """Video files and frame folders that `inputs` name; a folder of both is searched through.

    Raises DeliveryError for an input that names nothing.
    """
    return expand_inputs(inputs, clips_below, "video files and no folders of frames", "clips")


def clips_below(folder: Path) -> list[Path]:
    """The folder itself when it holds frames, else the videos and frame folders below it; a file is a clip.

    Raises DeliveryError for a still image, which would be shown as a clip without motion.
    """
    if not folder.is_dir():
        if folder.suffix.lower() in IMAGE_SUFFIXES - CLIP_SUFFIXES:
            raise DeliveryError(
                f"{folder}: a still image, and this student takes clips: name video files or folders of frames"
            )
        return [folder]
    if frame_files(folder):
        return [folder]
    videos = [path for path in folder.rglob("*") if path.suffix.lower() in CLIP_SUFFIXES and path.is_file()]
    images = {path.parent for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    return sorted({*videos, *images})


def read_image(path: Path, target_size: int | None, bit_depth: int) -> Image.Image | BadFile:
    """The upright RGB image; with `target_size` a JPEG may be decoded at a fraction of its size.

    `bit_depth`: of 16-bit gray images, as the student's training read them.
    """
    try:
        return decode(path, target_size=target_size, bit_depth=bit_depth).image
    except (ImageError, OSError) as error:
        return BadFile(printable(str(path)), printable(str(error)))
