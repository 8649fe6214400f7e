"""Masks of class ids: palette and grey images → uint8 [H, W] and back to a grey PNG.

A palette image is read by its indices, never by its colours: converting one to grey would mix up the classes.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from imaging.decode import DEFAULT_MAX_PIXELS, open_image, reason_of, upright
from imaging.errors import ImageError

IGNORE = 255

Mask = npt.NDArray[np.uint8]


def decode_mask(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Mask:
    """Class ids uint8 [H, W], upright. Raises ImageError, also for colours that are no class ids."""
    try:
        with open_image(data, max_pixels) as image:
            image.load()
            return _to_ids(upright(image))
    except ImageError:
        raise
    except Exception as error:  # see imaging.decode.decode
        raise ImageError(reason_of(error)) from None


def encode_mask(ids: Mask) -> bytes:
    """The ids [H, W] as an 8-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _to_ids(image: Image.Image) -> Mask:
    if image.mode in ("L", "P"):
        return np.array(image, np.uint8)
    if image.mode == "1":
        return np.array(image, np.uint8)  # False, True → 0, 1
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 255:
            raise ImageError(f"class ids reach {int(wide.max())}: at most 255 fit (255 means ignore)")
        return wide.astype(np.uint8)
    if image.mode in ("RGB", "RGBA"):
        colours = np.asarray(image)
        if (colours[..., :3] == colours[..., :1]).all():
            return np.ascontiguousarray(colours[..., 0])
        raise ImageError("a mask in colours: expected class ids, as a palette or grey PNG")
    raise ImageError(f"a mask of mode {image.mode}: expected class ids, as a palette or grey PNG")
