"""How training shows an image: one geometric view and one change of colors per sample and epoch.

The view is drawn first, as data; the image, the mask and the stored features then all follow it
(`train.distill.transport` carries the features), so they cannot drift apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imaging.geometry import PADDING_COLOR, View

LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The ranges that views and colors are drawn from; the defaults change nothing.

    `crop_scale`: share of the area that is left; `crop_ratio`: width / height of the crop in pixels;
    `color`: brightness, contrast and saturation vary within 1 ± `color`.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip_probability: float = 0.0
    rotation_degrees: float = 0.0
    color: float = 0.0

    @property
    def moves(self) -> bool:
        """True when the geometry changes, not only the colors."""
        return self.crop_scale[0] < 1 or self.flip_probability > 0 or self.rotation_degrees > 0


#: Without a stored grid the pooled target is that of the whole image: only what hardly changes it is allowed.
AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "photometric": Augmentation(color=0.4),
    "mild": Augmentation(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), color=0.4),
    "full": Augmentation(
        crop_scale=(0.35, 1.0), crop_ratio=(0.75, 1 / 0.75), flip_probability=0.5, color=0.4
    ),
}


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same in any worker, on any rank, after any resume."""
    digest = blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def draw_view(augmentation: Augmentation, generator: np.random.Generator, base: View) -> View:
    """A random view inside `base` (the view without augmentation, e.g. that of the resize policy)."""
    if not augmentation.moves:
        return base
    view = base.compose(draw_crop(augmentation, generator))
    if augmentation.rotation_degrees > 0:
        angle = generator.uniform(-augmentation.rotation_degrees, augmentation.rotation_degrees)
        view = view.compose(View.affine(angle_degrees=angle))
    if generator.random() < augmentation.flip_probability:
        view = view.compose(View.flip())
    return view


def draw_crop(augmentation: Augmentation, generator: np.random.Generator) -> View:
    """A rectangle inside the unit square, area and aspect ratio from the augmentation's ranges."""
    area = generator.uniform(*augmentation.crop_scale)
    ratio = math.exp(generator.uniform(*np.log(augmentation.crop_ratio)))
    width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    left, top = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
    return View.crop(left, top, left + width, top + height)


def draw_color(augmentation: Augmentation, generator: np.random.Generator) -> NDArray[np.float64] | None:
    """Factors of brightness, contrast and saturation, float64 [3]; None when colors stay."""
    if augmentation.color <= 0:
        return None
    return generator.uniform(1 - augmentation.color, 1 + augmentation.color, size=3)


def change_color(image: Image.Image, factors: NDArray[np.float64] | None) -> Image.Image:
    """Brightness, contrast about the mean luminance, and saturation, as one matrix over RGB."""
    if factors is None:
        return image
    brightness, contrast, saturation = factors
    gray = np.tile(LUMINANCE, (3, 1))
    saturate = saturation * np.eye(3) + (1 - saturation) * gray
    mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX), dtype=np.float64).reshape(3)
    linear = brightness * contrast * saturate
    offset = brightness * (1 - contrast) * float(np.dot(LUMINANCE, mean))
    matrix = np.column_stack([linear, np.full(3, offset)])
    return image.convert("RGB", tuple(float(value) for value in matrix.reshape(-1)))


def render_image(
    image: Image.Image, view: View, size: int, color: NDArray[np.float64] | None = None
) -> NDArray[np.uint8]:
    """The view's pixels with changed colors, uint8 [size, size, 3]; outside the image: the padding color."""
    shown = view.render(image, size, PADDING_COLOR, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.array(change_color(shown, color), dtype=np.uint8)


def render_mask(mask: Image.Image, view: View, size: int, ignore_index: int = 255) -> NDArray[np.uint8]:
    """The mask under the same view, uint8 [size, size]: nearest class, never mixed; outside: `ignore_index`."""
    return np.asarray(view.render(mask, size, ignore_index, Image.Resampling.NEAREST), dtype=np.uint8)
