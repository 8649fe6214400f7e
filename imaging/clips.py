"""Clips, as both stages see them: which frames are taken, in what order, and what identifies the content.

A clip is a video file, or a folder of images in the order of time.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from imaging.decode import DEFAULT_MAX_PIXELS, FULL_DEPTH, IMAGE_SUFFIXES, decode_image, read_file
from imaging.errors import ImageError
from imaging.video import decode_frames


def sample_frame_indices(total: int, count: int, *, pairs: bool = False) -> npt.NDArray[np.int64]:
    """Which of `total` frames are taken: the middle frame of each of `count` equal segments, int64 [count].

    Frames repeat when the clip is shorter than `count`. With `pairs`, int64 [count, 2]: a frame and its
    successor; a clip of one frame is paired with itself, as Qwen does with a still.
    Raises ValueError unless both numbers are positive.
    """
    if total < 1 or count < 1:
        raise ValueError(f"cannot take {count} frames of {total}")
    starts = max(1, total - 1) if pairs else total
    first = ((2 * np.arange(count, dtype=np.int64) + 1) * starts) // (2 * count)
    return np.stack([first, np.minimum(first + 1, total - 1)], axis=1) if pairs else first


def time_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which numbers count by their value."""
    return tuple(
        (0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    )


def frame_files(folder: Path) -> list[Path]:
    """The frames of a clip that is a folder, in the order of time; hidden files are none.

    Raises ImageError when the folder cannot be listed.
    """
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None
    return sorted(
        (path for path in files if not path.name.startswith(".")), key=lambda path: time_order(path.name)
    )


def clip_content(path: Path) -> bytes:
    """What the store's content digest of a clip is made of: the file's bytes, or the digests of its frames.

    Raises ImageError when something cannot be read.
    """
    if not path.is_dir():
        return read_file(path)
    return b"".join(hashlib.blake2b(read_file(file)).digest() for file in frame_files(path))


class ClipFrame(NamedTuple):
    """A frame of a clip, RGB and upright, and the bytes of its file; None for a frame of a video."""

    image: Image.Image
    file: bytes | None


def read_clip(
    path: Path,
    count: int,
    *,
    pairs: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    bit_depth: int = FULL_DEPTH,
) -> list[ClipFrame]:
    """`count` frames (with `pairs` 2 · count) of a clip, chosen by `sample_frame_indices`.

    A frame that is taken more than once is the same object each time. `bit_depth`: of frames that are 16-bit gray
    images, see `imaging.decode.decode`. Raises ImageError naming the frame that cannot be decoded.
    """
    if not path.is_dir():
        images = decode_frames(
            path,
            lambda total: sample_frame_indices(total, count, pairs=pairs).reshape(-1),
            max_pixels=max_pixels,
        )
        return [ClipFrame(image, None) for image in images]
    files = frame_files(path)
    if not files:
        raise ImageError("no frames in the folder")
    rows = sample_frame_indices(len(files), count, pairs=pairs).reshape(-1).tolist()
    frames = {row: read_frame(files[row], max_pixels, bit_depth) for row in dict.fromkeys(rows)}
    return [frames[row] for row in rows]


def read_clip_frames(
    path: Path,
    count: int,
    *,
    pairs: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    bit_depth: int = FULL_DEPTH,
) -> list[Image.Image]:
    """The images of `read_clip`."""
    frames = read_clip(path, count, pairs=pairs, max_pixels=max_pixels, bit_depth=bit_depth)
    return [frame.image for frame in frames]


def read_frame(file: Path, max_pixels: int, bit_depth: int) -> ClipFrame:
    try:
        data = read_file(file)
        return ClipFrame(decode_image(data, max_pixels=max_pixels, bit_depth=bit_depth), data)
    except ImageError as error:
        raise ImageError(f"frame {file.name}: {error.reason}") from None
