"""What a decoding process does with one sample: bytes → hash, pixels at the teacher's size, views, stored bytes.

Light to import, since every decoding process does; torch is imported when the first image is resized.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from extract.sources.annotations import clip_boxes
from extract.sources.base import AnnotationError, Boxes, Sample, content_digest
from files.names import printable
from imaging.clips import ClipFrame
from imaging.decode import DEFAULT_MAX_PIXELS, FULL_DEPTH, Decoded, ImageError, decode
from imaging.geometry import PADDING_COLOR, View, content_rectangle, resize_view

if TYPE_CHECKING:
    import torch

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
class Encoding:
    """How every sample of a store is decoded, and what is kept of its features besides pooled.

    `frames` > 0: samples are clips, of which that many places are seen; `pair` is 2 where the teacher takes each
    frame with its successor, else 1. `grid`: side of the stored grid, 0 for none. `area`: a smaller grid whose side
    does not divide the teacher's is averaged exactly by area. False is adaptive pooling, whose cells overlap: the rule
    of stores that record no `grid_resampling`. `cli verify` needs it for them. `layers`: (number, side of the stored
    grid) of further layers, which are always averaged by area. `views`: recorded views of each image; `flip`: the one
    view is the mirror image of what the teacher sees, made on the teacher's device, so that it takes no plane.
    """

    image_size: int
    resize: Literal["squash", "letterbox", "center-crop"]
    interpolation: str = "bicubic"
    exact: bool = False
    views: int = 0
    flip: bool = False
    frames: int = 0
    pair: int = 1
    seed: int = 0
    images: Literal["none", "jpeg", "raw"] = "none"
    max_pixels: int = DEFAULT_MAX_PIXELS
    bit_depth: int = FULL_DEPTH
    grid: int = 0
    area: bool = True
    layers: tuple[tuple[int, int], ...] = ()

    @property
    def planes(self) -> int:
        """Pixel planes a sample takes in a buffer."""
        return self.clip_frames or 1 + self.augmented_views

    @property
    def augmented_views(self) -> int:
        """Views that are drawn from the image: random crops and flips."""
        return 0 if self.flip else self.views

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


def decode_samples(encoding: Encoding, samples: Sequence[Sample], pixels: Pixels) -> list[DecodedSample]:
    """Decode `samples` into `pixels`, uint8 [n, P, 3, S, S]; a bad one leaves zeros and a reason."""
    return [decode_sample(encoding, sample, planes) for sample, planes in zip(samples, pixels, strict=True)]


def decode_sample(encoding: Encoding, sample: Sample, planes: Pixels) -> DecodedSample:
    """One sample; whatever its file may be, the answer is pixels or a reason."""
    content = bytes(16)
    try:
        data = sample.read()
        content = content_digest(data)
        result = (
            decode_clip(encoding, sample, planes)
            if encoding.frames
            else decode_still(encoding, sample, data, planes)
        )
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


def decode_still(encoding: Encoding, sample: Sample, data: bytes, planes: Pixels) -> DecodedSample:
    """One image: the base plane, then a plane for each augmented view."""
    needed = encoding.image_size * (LARGEST_ZOOM if encoding.augmented_views else 1)
    target = None if encoding.exact else DRAFT_MARGIN * needed
    decoded = decode(data, target_size=target, max_pixels=encoding.max_pixels, bit_depth=encoding.bit_depth)
    planes[0] = resize_pixels(decoded, encoding.image_size, encoding.resize, encoding.interpolation)
    geometry = None
    if encoding.flip:
        shown = resize_view(encoding.resize, decoded.size, encoding.image_size)
        geometry = shown.compose(View.flip()).matrix[None]
    elif encoding.views:
        geometry = sample_views(sample.key, encoding.views, encoding.seed, *decoded.size)
        for plane, matrix in zip(planes[1:], geometry, strict=True):
            plane[...] = np.asarray(View(matrix).render(decoded.image, encoding.image_size)).transpose(
                2, 0, 1
            )
    encoded = jpeg_bytes(data, encoding) if encoding.images == "jpeg" else b""
    return DecodedSample(size=decoded.size, encoded=encoded, geometry=geometry)


def decode_clip(encoding: Encoding, sample: Sample, planes: Pixels) -> DecodedSample:
    """A clip: one plane for each frame that the teacher sees."""
    frames = sample.read_clip(
        encoding.frames,
        pairs=encoding.pair == 2,
        max_pixels=encoding.max_pixels,
        bit_depth=encoding.bit_depth,
    )
    size = frames[0].image.size
    for plane, frame in zip(planes, frames, strict=True):
        plane[...] = resize_pixels(
            Decoded(frame.image, size), encoding.image_size, encoding.resize, encoding.interpolation
        )
    if encoding.images != "jpeg":
        return DecodedSample(size=size)
    encoded, spans = join_frames(frames, encoding)
    return DecodedSample(size=size, encoded=encoded, spans=spans)


def join_frames(frames: Sequence[ClipFrame], encoding: Encoding) -> tuple[bytes, npt.NDArray[np.int64]]:
    """The frames' JPEG bytes one after the other, each different one once, and where each is, int64 [T, 2]."""
    places: dict[int, tuple[int, int]] = {}
    parts: list[bytes] = []
    end = 0
    for frame in frames:
        if id(frame.image) not in places:
            parts.append(encode_jpeg(frame.image) if frame.file is None else jpeg_bytes(frame.file, encoding))
            places[id(frame.image)] = end, len(parts[-1])
            end += len(parts[-1])
    return b"".join(parts), np.array([places[id(frame.image)] for frame in frames], np.int64)


def jpeg_bytes(data: bytes, encoding: Encoding) -> bytes:
    """What `--images jpeg` stores: a JPEG file as it is, anything else re-encoded at quality 95, 4:4:4."""
    if data.startswith(JPEG_MAGIC):
        return data
    return encode_jpeg(decode(data, max_pixels=encoding.max_pixels, bit_depth=encoding.bit_depth).image)


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


# -- pixels at the teacher's size: the host's half of preprocessing; the device normalizes and makes patches ------
#
# Two paths, which differ in the decoder alone:
#
# - exact: decoded at full size; the pixels are bit-equal to what the Hugging Face Qwen2-VL image processor resizes to
#   for the same target size.
# - fast (default): a JPEG of at least four times the target (each side) is decoded at 1/2, 1/4 or 1/8, always with both
#   sides at least twice the target. The decoder averages whole blocks of pixels, and at twice the target that changes
#   the pretrained teacher's features by less than the bound of `benchmarks/preprocess.py`; decoding down to just above
#   the target does not (1st percentile of the cosine 0.97 instead of 0.995).
#
# The resampling kernel is torch's bicubic with anti-aliasing, about five times as fast as Pillow's and within a few
# gray levels of it (0.4 % of pixels differ at all).

# The least size, as a multiple of the target, down to which a JPEG is decoded on the fast path.
DRAFT_MARGIN = 2


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
        generator = np.random.default_rng(np.frombuffer(digest.digest(), np.uint32))
        crop_width, crop_height = sample_crop_size(generator, width, height)
        left, top = generator.uniform(0, 1 - crop_width), generator.uniform(0, 1 - crop_height)
        flipped = generator.random() < 0.5
        across = [-crop_width, 0, left + crop_width] if flipped else [crop_width, 0, left]
        views[index] = [across, [0, crop_height, top]]
    return views


def sample_crop_size(generator: np.random.Generator, width: int, height: int) -> tuple[float, float]:
    """Width and height of a crop as shares of the image's; the whole image when no attempt fits."""
    for _ in range(ATTEMPTS):
        area = generator.uniform(*AREA)
        aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1]))) * height / width
        share_x, share_y = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if share_x <= 1 and share_y <= 1:
            return share_x, share_y
    return 1.0, 1.0
