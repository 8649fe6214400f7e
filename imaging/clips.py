"""Clips, for both stages: which frames are taken, in what order, and what identifies the content.

A clip is a video file, whose frames are decoded through PyAV, or a folder of images in the order of time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from files.reading import open_regular
from imaging.decode import DEFAULT_MAX_PIXELS, FULL_DEPTH, IMAGE_SUFFIXES, ImageError, decode_image, read_file


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


VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".ts"]
)
TIME_TOLERANCE_S = 1e-6
USUAL_RATE = Fraction(25)  # frames a second, where a file has no rate


class VideoFrame(NamedTuple):
    """A frame, RGB and upright: its position from 0, its time in seconds, and the video's frames a second."""

    number: int
    time_s: float
    image: Image.Image
    rate: Fraction


def iterate_frames(
    path: Path,
    *,
    every: int = 1,
    frames_per_second: float | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Iterator[VideoFrame]:
    """Every `every`th frame from the first, or about `frames_per_second` of each second; one is held at a time.

    Raises ImageError for what is no video, and after the last frame for a damaged one: some of its frames are missing.
    """
    import av

    _check_file(path)
    number, due = -1, 0.0
    try:
        total = _count_packets(path, av)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or stream.guessed_rate or USUAL_RATE)
            start = 0.0
            for number, frame in enumerate(container.decode(stream)):
                _check_pixels(frame, max_pixels)
                time_s = number / float(rate) if frame.time is None else float(frame.time)
                start = time_s if number == 0 else start  # some files begin later than 0
                if frames_per_second is None:
                    wanted = number % every == 0
                else:
                    wanted = time_s - start >= due - TIME_TOLERANCE_S
                    if wanted:
                        passed = (time_s - start + TIME_TOLERANCE_S) * frames_per_second
                        due = (floor(passed) + 1) / frames_per_second
                if wanted:
                    yield VideoFrame(number, time_s - start, _upright(frame), rate)
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise ImageError(
            f"not a video that can be decoded: {getattr(error, 'strerror', None) or error}"
        ) from None
    if number + 1 < total:
        raise ImageError(f"damaged video: {total} frames in the file, {number + 1} could be decoded")


def decode_frames(
    path: Path,
    choose: Callable[[int], npt.NDArray[np.int64] | Sequence[int]],
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Image.Image]:
    """The RGB frames at `choose(total)` (positions in the order of showing, repeats allowed), upright.

    Headers often miscount frames, so packets are counted first and the frames that really decode are compared with
    that: a video that is damaged or cut off raises ImageError, as does anything else that is not a video.
    """
    import av

    _check_file(path)
    try:
        total = _count_packets(path, av)
        rows = [int(row) for row in choose(total)]
        frames, decoded = _decode_rows(path, frozenset(rows), max_pixels, av)
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise ImageError(
            f"not a video that can be decoded: {getattr(error, 'strerror', None) or error}"
        ) from None
    missing = [row for row in rows if row not in frames]
    if missing:
        raise ImageError(f"damaged video: {total} frames in the file, {decoded} could be decoded")
    return [frames[row] for row in rows]


def _check_file(path: Path) -> None:
    """PyAV opens files by name: refuse what is no regular file before. Raises ImageError."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None


def _count_packets(path: Path, av: Any) -> int:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ImageError("no video stream")
        count = sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    if count == 0:
        raise ImageError("video without frames")
    return count


def _decode_rows(
    path: Path, rows: frozenset[int], max_pixels: int, av: Any
) -> tuple[dict[int, Image.Image], int]:
    """The frames at `rows`, and how many frames were decoded."""
    found: dict[int, Image.Image] = {}
    last, number = max(rows), -1
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            _check_pixels(frame, max_pixels)
            if number in rows:
                found[number] = _upright(frame)
            if number >= last:
                break
    return found, number + 1


def _check_pixels(frame: Any, max_pixels: int) -> None:
    if frame.width * frame.height > max_pixels:
        raise ImageError(f"too many pixels: frames of {frame.width}×{frame.height}, limit {max_pixels:,}")


def _upright(frame: Any) -> Image.Image:
    """The frame as RGB, rotated as the container specifies (phones record sideways)."""
    image: Image.Image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image if turn == 0 else image.rotate(turn, expand=True)
