"""Draw what a student predicts: labels, boxes and masks on the picture they belong to."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from imaging.geometry import View
from train.fonts import ELLIPSIS, Font, font_for, warn_missing

# Okabe and Ito's palette, told apart by color-blind readers; more classes get further hues.
PALETTE = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
)
GOLDEN_RATIO = 0.618033988749895
IGNORE_INDEX = 255
MASK_OPACITY = 0.5
LEGEND_LIMIT = 20  # classes that a picture's legend names
WHITE, BLACK, BAND = (255, 255, 255), (0, 0, 0), (0, 0, 0, 160)

Color = tuple[int, int, int]


class Label(NamedTuple):
    """The words of a prediction. `class_index` stands in where no font has the name's characters."""

    name: str
    class_index: int
    suffix: str = ""  # kept whole where the name is shortened

    @property
    def text(self) -> str:
        return f"{self.name} {self.suffix}".strip()


class Box(NamedTuple):
    """A detection or a true box: corners in pixels of the image, and what it is; no label: a frame alone."""

    xyxy: tuple[float, float, float, float]
    class_index: int
    label: Label | None = None


def class_color(index: int) -> Color:
    """The color that a class has in every picture and legend."""
    if 0 <= index < len(PALETTE):
        return PALETTE[index]
    hue, step = (index * GOLDEN_RATIO) % 1.0, index % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.2 * step, 0.95 - 0.15 * step)
    return round(255 * red), round(255 * green), round(255 * blue)


def mask_color(index: int) -> Color:
    """The color of a class in a mask, where class 0 (background) has none."""
    return class_color(index - 1)


def draw_label(image: Image.Image, label: Label) -> Image.Image:
    """The image with the label on a band along its lower edge; in two lines where they cover a third of it at most."""
    shown = image.convert("RGB").copy()
    pen, size = ImageDraw.Draw(shown, "RGBA"), text_size(shown)
    label, font = drawable(label, size)
    width, height = shown.width - 8, line_height(font)
    lines = wrap(label, font, width) if 6 * height <= shown.height else [shorten(label, font, width)]
    top = shown.height - height * len(lines) - 4
    pen.rectangle((0, top, shown.width, shown.height), fill=BAND)
    for number, line in enumerate(lines):
        pen.text((4, top + 2 + number * height), line, font=font, fill=WHITE)
    return shown


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The image with a frame in its class's color, and a label inside the picture, for each box."""
    shown = image.convert("RGB").copy()
    pen, size, line = ImageDraw.Draw(shown), text_size(shown), line_width(shown)
    for box in boxes:
        pen.rectangle(box.xyxy, outline=class_color(box.class_index), width=line)
    for box in boxes:  # above all frames
        if box.label is not None:
            draw_tag(pen, shown.size, box, box.label, size)
    return shown


def draw_tag(pen: ImageDraw.ImageDraw, limits: tuple[int, int], box: Box, label: Label, size: int) -> None:
    """A box's label above its upper edge, or below it at the picture's edge; never outside the picture."""
    label, font = drawable(label, size)
    text, height = shorten(label, font, limits[0] - 4), line_height(font)
    width = font.getlength(text) + 4
    left = min(max(box.xyxy[0], 0), max(limits[0] - width, 0))
    top = box.xyxy[1] - height if box.xyxy[1] >= height else box.xyxy[1]
    top = min(max(top, 0), max(limits[1] - height, 0))
    color = class_color(box.class_index)
    pen.rectangle((left, top, left + width, top + height), fill=color)
    pen.text((left + 2, top), text, font=font, fill=ink_on(color))


def draw_true_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The image with true boxes: white frames with a black edge, unlike any class's color."""
    shown = image.convert("RGB").copy()
    pen, line = ImageDraw.Draw(shown), line_width(shown)
    for box in boxes:
        x0, y0, x1, y1 = box.xyxy
        pen.rectangle((x0 - line, y0 - line, x1 + line, y1 + line), outline=BLACK, width=3 * line)
        pen.rectangle(box.xyxy, outline=WHITE, width=line)
    return shown


def draw_mask(image: Image.Image, classes: Image.Image) -> Image.Image:
    """The image with its class map [H, W] laid over it; class 0 and ignored pixels stay clear."""
    indices = np.asarray(classes)
    colors = np.array([mask_color(index) for index in range(256)], dtype=np.uint8)[indices]
    shown = np.asarray(image.convert("RGB"))
    blended = np.round((1 - MASK_OPACITY) * shown + MASK_OPACITY * colors).astype(np.uint8)
    clear = (indices == 0) | (indices == IGNORE_INDEX)
    return Image.fromarray(np.where(clear[..., None], shown, blended))


def draw_legend(image: Image.Image, labels: Sequence[Label]) -> Image.Image:
    """The image with a strip below it that names the classes of its mask; class 0 is left out."""
    named = [label for label in labels if label.class_index != 0]
    shown, size = image.convert("RGB"), text_size(image)
    entries = []
    for label in named[:LEGEND_LIMIT]:
        label, font = drawable(label, size)
        entries.append((shorten(label, font, shown.width - size - 8), font, mask_color(label.class_index)))
    if len(named) > LEGEND_LIMIT:
        entries.append((f"+ {len(named) - LEGEND_LIMIT}", drawable(Label("+", 0), size)[1], WHITE))
    if not entries:
        return shown
    places, left, row = [], 4, 0
    for text, font, _ in entries:
        width = size + 4 + round(font.getlength(text)) + size
        if left > 4 and left + width - size > shown.width:
            left, row = 4, row + 1
        places.append((left, row))
        left += width
    height = max(line_height(font) for _, font, _ in entries) + 2
    joined = Image.new("RGB", (shown.width, shown.height + height * (row + 1) + 4), WHITE)
    joined.paste(shown)
    pen = ImageDraw.Draw(joined)
    for (text, font, color), (x, line) in zip(entries, places, strict=True):
        y = shown.height + 2 + line * height
        pen.rectangle((x, y + (height - size) // 2, x + size, y + (height + size) // 2), fill=color)
        pen.text((x + size + 4, y + height // 2), text, font=font, fill=BLACK, anchor="lm")
    return joined


def mask_image(classes: NDArray[np.uint8], view: View, size: tuple[int, int]) -> Image.Image:
    """A class map [S, S] of the student's input, carried back to an image of `size` (width, height).

    `view` is the student's view of that image. Pixels that the student did not see (a center crop's margins) are 255.
    """
    return view.inverse().render(Image.fromarray(classes), size, IGNORE_INDEX, Image.Resampling.NEAREST)


def text_size(image: Image.Image) -> int:
    """Pixels of a text that is readable in the picture and leaves most of it free."""
    return max(10, min(image.size) // 20)


def line_width(image: Image.Image) -> int:
    return max(1, round(min(image.size) / 200))


def line_height(font: Font) -> int:
    return sum(font.getmetrics()) + 1


def ink_on(color: Color) -> Color:
    """Black or white, whichever is read better on `color`."""
    return BLACK if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 150 else WHITE


def drawable(label: Label, size: int) -> tuple[Label, Font]:
    """The label and a font that has all of its characters; the class's number where no font has its name's."""
    clean = label._replace(name="".join(c if c.isprintable() else " " for c in label.name))
    font = font_for(clean.text + ELLIPSIS, size)
    if font is None:
        warn_missing(clean.name)
        clean = clean._replace(name=f"class {clean.class_index}")
        font = font_for(clean.text, size)
    assert font is not None  # the built-in font has ASCII
    return clean, font


def shorten(label: Label, font: Font, width: float) -> str:
    """The label's text, its name cut to fit into `width` pixels."""
    if font.getlength(label.text) <= width:
        return label.text
    for end in range(len(label.name), -1, -1):
        text = label._replace(name=label.name[:end].rstrip() + ELLIPSIS).text
        if font.getlength(text) <= width:
            return text
    return cut(label.suffix or ELLIPSIS, font, width)


def cut(text: str, font: Font, width: float) -> str:
    """As much of `text` as fits."""
    return next((text[:end] for end in range(len(text), 0, -1) if font.getlength(text[:end]) <= width), "")


def wrap(label: Label, font: Font, width: float) -> list[str]:
    """The label in at most two lines, broken at a space where there is one; the rest is cut."""
    if font.getlength(label.text) <= width:
        return [label.text]
    first = cut(label.name, font, width)
    space = first.rfind(" ")
    if space > 0 and len(first) < len(label.name):
        first = first[:space]
    rest = label._replace(name=label.name[len(first) :].strip())
    return [first.rstrip(), shorten(rest, font, width)]
