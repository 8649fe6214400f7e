"""Draw what a student predicts: labels, boxes and masks on the picture they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imaging.geometry import View

# Okabe and Ito's palette, repeated: told apart by colour-blind readers.
PALETTE = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
)
IGNORE_INDEX = 255
MASK_OPACITY = 0.5


class Box(NamedTuple):
    """A detection: corners in pixels of the image, and what it is."""

    xyxy: tuple[float, float, float, float]
    label: str
    class_index: int


def draw_label(image: Image.Image, text: str) -> Image.Image:
    """The image with `text` on a band along its lower edge."""
    shown = image.convert("RGB").copy()
    pen, font = ImageDraw.Draw(shown, "RGBA"), font_for(shown)
    _, _, _, height = pen.textbbox((0, 0), text, font=font)
    top = shown.height - height - 6
    pen.rectangle((0, top, shown.width, shown.height), fill=(0, 0, 0, 160))
    pen.text((4, top + 2), text, font=font, fill=(255, 255, 255, 255))
    return shown


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], colour: tuple[int, int, int] | None = None
) -> Image.Image:
    """The image with a frame and a label for each box; one `colour` for all, or one a class."""
    shown = image.convert("RGB").copy()
    pen, font = ImageDraw.Draw(shown), font_for(shown)
    line = max(1, round(min(shown.size) / 200))
    for box in boxes:
        chosen = colour or PALETTE[box.class_index % len(PALETTE)]
        pen.rectangle(box.xyxy, outline=chosen, width=line)
        left, top, right, bottom = pen.textbbox((box.xyxy[0], box.xyxy[1]), box.label, font=font)
        pen.rectangle((left, top, right + 4, bottom + 2), fill=chosen)
        pen.text((box.xyxy[0] + 2, box.xyxy[1]), box.label, font=font, fill=(255, 255, 255))
    return shown


def draw_mask(image: Image.Image, classes: Image.Image) -> Image.Image:
    """The image with its class map [H, W] laid over it; class 0 and ignored pixels stay clear."""
    indices = np.asarray(classes)
    colours = np.array(PALETTE, dtype=np.uint8)[(indices.astype(np.int64) - 1) % len(PALETTE)]
    shown = np.asarray(image.convert("RGB"))
    blended = np.round((1 - MASK_OPACITY) * shown + MASK_OPACITY * colours).astype(np.uint8)
    clear = (indices == 0) | (indices == IGNORE_INDEX)
    return Image.fromarray(np.where(clear[..., None], shown, blended))


def mask_image(classes: NDArray[np.uint8], view: View, size: tuple[int, int]) -> Image.Image:
    """A class map [S, S] of the student's input, carried back to an image of `size` (width, height).

    Pixels that the student did not see (a centre crop's margins) are 255.
    """
    return view.inverse().render(Image.fromarray(classes), size, IGNORE_INDEX, Image.Resampling.NEAREST)


def font_for(image: Image.Image) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's built-in font at a size that fits the picture."""
    return ImageFont.load_default(size=max(10, min(image.size) // 20))
