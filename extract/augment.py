"""The recorded augmented views of `--views K`: a random crop and flip, a function of the sample key alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

AREA = (0.35, 1.0)  # share of the image that a crop covers
ASPECT = (3 / 4, 4 / 3)  # width over height of a crop, in pixels of the original
ATTEMPTS = 10
LARGEST_ZOOM = 2  # a crop has at least sqrt(0.35 · 3/4) = 0.51 times the pixels of the image's shorter side

Matrix = npt.NDArray[np.float64]


def sample_views(key: str, count: int, seed: int, width: int, height: int) -> Matrix:
    """The geometry of `count` augmented views, float64 [K, 2, 3]: view coordinates to image coordinates.

    Both in [0, 1]², x first. Every process and every run gives the same views for a key: the generator is
    seeded from (seed, key, view). The crop is the random resized crop of Inception (Szegedy et al. 2015),
    with a horizontal flip in half of the views.
    """
    views = np.empty((count, 2, 3), np.float64)
    for index in range(count):
        digest = hashlib.blake2b(f"{seed}\0{index}\0{key}".encode(errors="surrogatepass"), digest_size=16)
        views[index] = sample_view(
            np.random.default_rng(np.frombuffer(digest.digest(), np.uint32)), width, height
        )
    return views


def sample_view(generator: np.random.Generator, width: int, height: int) -> Matrix:
    """One crop with flip, float64 [2, 3]."""
    crop_width, crop_height = sample_crop_size(generator, width, height)
    left = generator.uniform(0, 1 - crop_width)
    top = generator.uniform(0, 1 - crop_height)
    if generator.random() < 0.5:
        return np.array([[-crop_width, 0, left + crop_width], [0, crop_height, top]])
    return np.array([[crop_width, 0, left], [0, crop_height, top]])


def sample_crop_size(generator: np.random.Generator, width: int, height: int) -> tuple[float, float]:
    """Width and height of a crop as shares of the image's; the whole image when no attempt fits."""
    for _ in range(ATTEMPTS):
        area = generator.uniform(*AREA)
        aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1]))) * height / width
        share_x, share_y = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if share_x <= 1 and share_y <= 1:
            return share_x, share_y
    return 1.0, 1.0
