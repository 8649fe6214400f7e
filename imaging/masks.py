"""Masks of class ids: palette, gray and (by a color table) RGB images → uint8 [H, W] and back to a gray PNG.

Without a color table a palette image is read by its indices, never by its colors: converting one to gray would mix up
the classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from imaging.decode import DEFAULT_MAX_PIXELS, ImageError, open_image, reason_of, upright

IGNORE = 255

Mask = npt.NDArray[np.uint8]


def decode_mask(
    data: bytes,
    *,
    colors: Sequence[tuple[int, int, int]] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Mask:
    """Class ids uint8 [H, W], upright; `colors`: the color (R, G, B) of each class, for masks in colors.

    Raises ImageError, also for colors that are no class ids, or are not in the table.
    """
    try:
        with open_image(data, max_pixels) as image:
            image.load()
            return _to_ids(upright(image)) if colors is None else _from_colors(upright(image), colors)
    except ImageError:
        raise
    except Exception as error:  # see imaging.decode.decode
        raise ImageError(reason_of(error)) from None


def _from_colors(image: Image.Image, colors: Sequence[tuple[int, int, int]]) -> Mask:
    """The place of each pixel's color in the table. Raises ImageError for a color that is not in it."""
    codes = _color_codes(np.asarray(image.convert("RGB")))
    table = _color_codes(np.asarray(colors, np.uint8))
    order = np.argsort(table)
    places = np.minimum(np.searchsorted(table[order], codes), len(table) - 1)
    unknown = table[order][places] != codes
    if unknown.any():
        code = int(codes[unknown][0])
        raise ImageError(f"color {(code >> 16, code >> 8 & 255, code & 255)} is not in the color table")
    return order[places].astype(np.uint8)


def _color_codes(colors: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """[..., 3] → [...]: red · 65536 + green · 256 + blue."""
    return np.asarray(colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]))


def encode_mask(ids: Mask) -> bytes:
    """The ids [H, W] as an 8-bit gray PNG."""
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
        channels = np.asarray(image)
        if (channels[..., :3] == channels[..., :1]).all():
            return np.ascontiguousarray(channels[..., 0])
        raise ImageError(
            "in colors: expected class ids, as a palette or gray PNG, or a color table (--source-option colors=FILE)"
        )
    raise ImageError(f"of mode {image.mode}: expected class ids, as a palette or gray PNG")
