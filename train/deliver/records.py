"""What a prediction is, and how a file that cannot be read is named."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from files.names import printable
from imaging.decode import ImageError, decode


class BadFile(NamedTuple):
    """A file that could not be read; it is named and skipped."""

    file: str
    reason: str


class Prediction(NamedTuple):
    """`record` is plain JSON; `image` is the file's picture with the prediction drawn on it.

    `embedding` [D] is what a label-free student gives; there is no picture then.
    `video_rate`: frames a second to show the pictures of a video's frames with. None: the picture of an image or clip.
    """

    record: dict[str, Any]
    image: Image.Image | None
    mask: Image.Image | None = None
    video_rate: Fraction | None = None
    embedding: NDArray[np.float32] | None = None


class VideoSummary(NamedTuple):
    """What is said of a whole video after its frames; `record` is plain JSON."""

    record: dict[str, Any]


def read_image(path: Path, target_size: int | None, bit_depth: int) -> Image.Image | BadFile:
    """The upright RGB image; with `target_size` a JPEG may be decoded at a fraction of its size.

    `bit_depth`: of 16-bit gray images, as the student's training read them.
    """
    try:
        return decode(path, target_size=target_size, bit_depth=bit_depth).image
    except (ImageError, OSError) as error:
        return BadFile(printable(str(path)), printable(str(error)))
