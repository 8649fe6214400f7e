"""The host's half of preprocessing: a file's bytes → uint8 [3, S, S] as the teacher sees it.

The device does the rest (normalization, patches). Two paths, which differ in the decoder alone:

- exact: decoded at full size; the pixels are bit-equal to what the Hugging Face Qwen2-VL image processor resizes
  to for the same target size.
- fast (default): a JPEG of at least four times the target (each side) is decoded at 1/2, 1/4 or 1/8, always with
  both sides at least twice the target. The decoder averages whole blocks of pixels, and at twice the target that
  changes the pretrained teacher's features by less than the bound of `benchmarks/preprocess.py`; decoding down
  to just above the target does not (1st percentile of the cosine 0.97 instead of 0.995).

The resampling kernel is torch's bicubic with anti-aliasing, about five times as fast as Pillow's and
within a few gray levels of it (0.4 % of pixels differ at all); torch is imported when the first image is resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from imaging.decode import DEFAULT_MAX_PIXELS, FULL_DEPTH, Decoded, decode
from imaging.geometry import PADDING_COLOR, content_rectangle, resize_view

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]

# The least size, as a multiple of the target, down to which a JPEG is decoded on the fast path.
DRAFT_MARGIN = 2


@dataclass(frozen=True)
class HostImage:
    """`pixels` uint8 [3, S, S], raster order; `size` (width, height) of the upright original."""

    pixels: Pixels
    size: tuple[int, int]


def preprocess(
    data: bytes | Path,
    image_size: int,
    resize: str = "squash",
    interpolation: str = "bicubic",
    *,
    exact: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> HostImage:
    """Decode and resize one image for a teacher. Raises ImageError when the image cannot be used."""
    decoded = decode_for(data, image_size, exact=exact, max_pixels=max_pixels)
    return HostImage(resize_pixels(decoded, image_size, resize, interpolation), decoded.size)


def decode_for(
    data: bytes | Path,
    image_size: int,
    *,
    exact: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    bit_depth: int = FULL_DEPTH,
) -> Decoded:
    """Decode as large as a target of `image_size` needs. Raises ImageError."""
    target = None if exact else DRAFT_MARGIN * image_size
    return decode(data, target_size=target, max_pixels=max_pixels, bit_depth=bit_depth)


def resize_pixels(
    decoded: Decoded, image_size: int, resize: str = "squash", interpolation: str = "bicubic"
) -> Pixels:
    """uint8 [3, S, S] of a decoded image, under a resize policy, always anti-aliased.

    Shows exactly the view `resize_view(resize, decoded.size, image_size)`. `interpolation`: bicubic or
    bilinear; any other of Pillow's goes through Pillow. Raises ValueError for an unknown policy.
    """
    if interpolation not in ("bicubic", "bilinear"):
        view = resize_view(resize, decoded.size, image_size)
        image = view.render(decoded.image, image_size, resample=Image.Resampling[interpolation.upper()])
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    left, top, width, height = content_rectangle(resize, decoded.size, image_size)
    content = resize_tensor(as_tensor(decoded.image), width, height, interpolation).numpy()[:3]
    if (left, top, width, height) == (0, 0, image_size, image_size):
        return np.ascontiguousarray(content)
    if left <= 0 and top <= 0 and left + width >= image_size and top + height >= image_size:
        return np.ascontiguousarray(content[:, -top : image_size - top, -left : image_size - left])
    canvas = np.empty((3, image_size, image_size), np.uint8)
    canvas[...] = np.array(PADDING_COLOR, np.uint8)[:, None, None]
    canvas[:, top : top + height, left : left + width] = content
    return canvas


def as_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 [3 or 4, H, W] of an RGB image, channels last in memory; a fourth channel is Pillow's padding.

    Where Pillow holds the image in one block it is shared, not copied.
    """
    import torch

    if hasattr(image, "__arrow_c_array__"):
        import pyarrow as pa

        try:
            shared = torch.from_dlpack(pa.array(image).values)
            return shared.view(image.height, image.width, 4).permute(2, 0, 1)
        except (ValueError, pa.ArrowException):
            pass  # in several blocks: copied below
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_tensor(
    pixels: torch.Tensor, width: int, height: int, interpolation: str = "bicubic"
) -> torch.Tensor:
    """uint8 [C, height, width], anti-aliased, rounded to whole gray levels."""
    from torch.nn.functional import interpolate

    if pixels.shape[1:] == (height, width):
        return pixels
    resized: torch.Tensor = interpolate(
        pixels[None], size=(height, width), mode=interpolation, antialias=True
    )
    return resized[0]
