"""What a decoding process does with one sample: bytes → hash, pixels at the teacher's size, views, stored bytes.

Light to import, since every decoding process does; torch comes in with the first resize (decode/preprocess.py).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from extract.decode.preprocess import decode_for, resize_pixels
from extract.sources.annotations import clip_boxes
from extract.sources.base import AnnotationError, Boxes, Sample, content_digest
from files.names import printable
from imaging.clips import ClipFrame
from imaging.decode import DEFAULT_MAX_PIXELS, FULL_DEPTH, Decoded, ImageError, decode
from imaging.geometry import View

Pixels = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]

JPEG_QUALITY = 95
JPEG_MAGIC = b"\xff\xd8\xff"

# The augmented views of `--views K`.
AREA = (0.35, 1.0)  # share of the image that a crop covers
ASPECT = (3 / 4, 4 / 3)  # width over height of a crop, in pixels of the original
ATTEMPTS = 10
LARGEST_ZOOM = 2  # a crop has at least sqrt(0.35 · 3/4) = 0.51 times the pixels of the image's shorter side


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """How every sample of a run is decoded.

    `frames` > 0: samples are clips, of which that many places are seen; `pair` is 2 where the teacher takes each
    frame with its successor, else 1.
    """

    image_size: int
    resize: Literal["squash", "letterbox", "center-crop"]
    interpolation: str = "bicubic"
    exact: bool = False
    views: int = 0
    frames: int = 0
    pair: int = 1
    seed: int = 0
    images: Literal["none", "jpeg", "raw"] = "none"
    max_pixels: int = DEFAULT_MAX_PIXELS
    bit_depth: int = FULL_DEPTH

    @property
    def planes(self) -> int:
        """Pixel planes a sample takes in a buffer."""
        return self.clip_frames or 1 + self.views

    @property
    def clip_frames(self) -> int:
        """Frames that are taken of each clip; 0 for images."""
        return self.frames * self.pair


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """What decoding found out about one sample, pixels aside.

    size: (width, height) of the original, upright; (0, 0) when bad. content: blake2b-128 of the file's bytes.
    reason: why the sample is bad, or None. encoded: image bytes to store. geometry: float64 [K, 2, 3].
    mask: PNG bytes. dropped_boxes: how many boxes had no area inside the image. spans: of a clip, int64 [T, 2], start and length of each frame in `encoded`.
    """

    size: tuple[int, int] = (0, 0)
    content: bytes = bytes(16)
    reason: str | None = None
    boxes: Boxes | None = None
    dropped_boxes: int = 0
    mask: bytes = b""
    spans: npt.NDArray[np.int64] | None = None
    encoded: bytes = b""
    geometry: Matrix | None = None


def decode_samples(job: DecodeJob, samples: Sequence[Sample], pixels: Pixels) -> list[DecodedSample]:
    """Decode `samples` into `pixels`, uint8 [n, P, 3, S, S]; a bad one leaves zeros and a reason."""
    return [decode_sample(job, sample, planes) for sample, planes in zip(samples, pixels, strict=True)]


def decode_sample(job: DecodeJob, sample: Sample, planes: Pixels) -> DecodedSample:
    """One sample; whatever its file may be, the answer is pixels or a reason."""
    content = bytes(16)
    try:
        data = sample.read()
        content = content_digest(data)
        result = decode_clip(job, sample, planes) if job.frames else decode_still(job, sample, data, planes)
        boxes, dropped = boxes_to_store(sample, result.size)
        mask = sample.read_mask(result.size) or b""
        return replace(result, content=content, boxes=boxes, dropped_boxes=dropped, mask=mask)
    except ImageError as error:
        reason = error.reason
    except AnnotationError as error:
        reason = f"annotation: {error}"
    except MemoryError:
        reason = "decoding needs more memory than there is"
    planes[...] = 0
    return DecodedSample(reason=printable(reason), content=content)


def boxes_to_store(sample: Sample, size: tuple[int, int]) -> tuple[Boxes | None, int]:
    """The parts of a sample's boxes inside its image of `size` (width, height), and how many had none.

    Raises AnnotationError.
    """
    boxes = sample.read_boxes(size)
    return (None, 0) if boxes is None else clip_boxes(boxes, size)


def decode_still(job: DecodeJob, sample: Sample, data: bytes, planes: Pixels) -> DecodedSample:
    """One image: the base plane, then a plane for each augmented view."""
    needed = job.image_size * (LARGEST_ZOOM if job.views else 1)
    decoded = decode_for(data, needed, exact=job.exact, max_pixels=job.max_pixels, bit_depth=job.bit_depth)
    planes[0] = resize_pixels(decoded, job.image_size, job.resize, job.interpolation)
    geometry = None
    if job.views:
        geometry = sample_views(sample.key, job.views, job.seed, *decoded.size)
        for plane, matrix in zip(planes[1:], geometry, strict=True):
            put_plane(plane, View(matrix).render(decoded.image, job.image_size))
    encoded = jpeg_bytes(data, job) if job.images == "jpeg" else b""
    return DecodedSample(size=decoded.size, encoded=encoded, geometry=geometry)


def decode_clip(job: DecodeJob, sample: Sample, planes: Pixels) -> DecodedSample:
    """A clip: one plane for each frame that the teacher sees."""
    frames = sample.read_clip(
        job.frames, pairs=job.pair == 2, max_pixels=job.max_pixels, bit_depth=job.bit_depth
    )
    size = frames[0].image.size
    for plane, frame in zip(planes, frames, strict=True):
        plane[...] = resize_pixels(Decoded(frame.image, size), job.image_size, job.resize, job.interpolation)
    if job.images != "jpeg":
        return DecodedSample(size=size)
    encoded, spans = join_frames(frames, job)
    return DecodedSample(size=size, encoded=encoded, spans=spans)


def join_frames(frames: Sequence[ClipFrame], job: DecodeJob) -> tuple[bytes, npt.NDArray[np.int64]]:
    """The frames' JPEG bytes one after the other, each different one once, and where each is, int64 [T, 2]."""
    places: dict[int, tuple[int, int]] = {}
    parts: list[bytes] = []
    end = 0
    for frame in frames:
        if id(frame.image) not in places:
            parts.append(encode_jpeg(frame.image) if frame.file is None else jpeg_bytes(frame.file, job))
            places[id(frame.image)] = end, len(parts[-1])
            end += len(parts[-1])
    return b"".join(parts), np.array([places[id(frame.image)] for frame in frames], np.int64)


def put_plane(plane: Pixels, image: Image.Image) -> None:
    """Copy an RGB image of the plane's size into uint8 [3, S, S]."""
    plane[...] = np.asarray(image).transpose(2, 0, 1)


def jpeg_bytes(data: bytes, job: DecodeJob) -> bytes:
    """What `--images jpeg` stores: a JPEG file as it is, anything else re-encoded at quality 95, 4:4:4."""
    if data.startswith(JPEG_MAGIC):
        return data
    return encode_jpeg(decode(data, max_pixels=job.max_pixels, bit_depth=job.bit_depth).image)


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


# -- augmented views: a random crop and flip, a function of the sample key alone ------------------------


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
