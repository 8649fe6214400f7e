"""Chosen frames of a video file, through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imaging.decode import DEFAULT_MAX_PIXELS
from imaging.errors import ImageError


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

    if not path.is_file():
        raise ImageError("cannot be read: no such file" if not path.exists() else "not a regular file")
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
            if frame.width * frame.height > max_pixels:
                raise ImageError(
                    f"too many pixels: frames of {frame.width}×{frame.height}, limit {max_pixels:,}"
                )
            if number in rows:
                found[number] = _upright(frame)
            if number >= last:
                break
    return found, number + 1


def _upright(frame: Any) -> Image.Image:
    """The frame as RGB, turned as the container says (telephones record sideways)."""
    image: Image.Image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image if turn == 0 else image.rotate(turn, expand=True)
