"""Which files the inputs of a command name: files, folders, globs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from imaging.clips import VIDEO_SUFFIXES
from imaging.decode import IMAGE_SUFFIXES
from train.errors import DeliveryError


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


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The image files that `inputs` name; folders are searched through and sorted.

    Raises DeliveryError for an input that names nothing.
    """
    return expand_inputs(inputs, images_below, "image files", "images")


def find_pictures(inputs: Sequence[str]) -> list[Path]:
    """The image and video files that `inputs` name, as `find_images`. Raises DeliveryError."""
    return expand_inputs(inputs, pictures_below, "image or video files", "images or videos")


def pictures_below(path: Path) -> list[Path]:
    """Image and video files below a folder, sorted; a file stands for itself."""
    if not path.is_dir():
        return [path]
    return sorted(
        p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and p.is_file()
    )


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def images_below(path: Path) -> list[Path]:
    """Image files below a folder, sorted; a file stands for itself, whatever it is called."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
