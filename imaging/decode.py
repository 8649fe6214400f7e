"""Decoding: the bytes of an image file → an upright RGB image, or an `ImageError` with the reason.

What is decided here, for both stages:

- The content decides the format, never the file's name; only raster formats are read (no EPS, no PDF).
- EXIF orientation is applied. Unreadable EXIF counts as none, as in browsers.
- Transparency is laid on white, as Qwen's own `qwen_vl_utils` does.
- 16-bit gray is scaled to 8 bits by a stated depth: 2^bit_depth − 1 is white, larger values are white too. 32-bit
  integers and floats are refused: their white is not defined. Of 16-bit color Pillow reads the upper byte.
- Of animations and multi-page files, the first frame is taken.
- A truncated file is an error, never a half gray image; a PNG's checksums are verified. Damage that a format
  cannot notice (changed bytes in a JPEG) goes unnoticed here as well.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from files.reading import open_regular


class ImageError(Exception):
    """One image cannot be used. `reason` is a short text for the ledger; it does not name the file."""

    exit_code: int = 1

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str]]:
        return type(self), (self.reason,)


__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FULL_DEPTH",
    "MOST_PIXELS",
    "Decoded",
    "ImageError",
    "decode",
    "decode_image",
    "image_size",
    "largest_gray",
    "read_blocks",
    "read_file",
]

# Pillow's own warning limit: 89 million pixels, 268 MB as RGB.
DEFAULT_MAX_PIXELS = 89_478_485
# Where Pillow itself refuses, so no larger cap makes sense.
MOST_PIXELS = 2 * DEFAULT_MAX_PIXELS
MAX_FILE_BYTES = 1 << 30
FULL_DEPTH = 16  # bits of a 16-bit image that are used by default
WIDE_GRAY = "I;16"  # how Pillow's names of 16-bit gray modes begin

# MPO needs no entry: Pillow opens it through JPEG, and has no MPO plugin to look up.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DDS")
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".j2k",
        ".avif",
        ".ico",
        ".tga",
    ]
)

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Parts of a PNG that do not touch the pixels: a wrong checksum there is left alone.
_PNG_HARMLESS = frozenset((b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"iCCP"))

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """`image`: upright RGB, perhaps smaller than the file's; `size`: (width, height) of the original, upright."""

    image: Image.Image
    size: tuple[int, int]


def read_file(path: Path | str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of a regular file. Raises ImageError when it cannot be read, without ever blocking on a pipe."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ImageError(f"file of {size:,} bytes: more than the limit of {max_bytes:,}")
        return file.read()


def read_blocks(path: Path | str, block: int) -> bytes:
    """`block` bytes from the middle and `block` bytes from the end of a regular file, or all of a short one.

    Raises ImageError like `read_file`.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= 2 * block:
            return file.read(2 * block)
        file.seek((size - block) // 2)
        middle = file.read(block)
        file.seek(size - block)
        return middle + file.read(block)


@contextmanager
def opened(path: Path | str) -> Iterator[BinaryIO]:
    """A regular file for reading. Raises ImageError for anything else, and for what fails while it is open."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None


def decode_image(
    data: bytes | Path | str,
    *,
    target_size: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    bit_depth: int = FULL_DEPTH,
) -> Image.Image:
    """The image, upright, RGB; see `decode` for the arguments and errors."""
    return decode(data, target_size=target_size, max_pixels=max_pixels, bit_depth=bit_depth).image


def decode(
    data: bytes | Path | str,
    *,
    target_size: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    bit_depth: int = FULL_DEPTH,
) -> Decoded:
    """Decode a file's bytes (or the file at a path).

    `target_size`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with both sides still at least that many
    pixels: much faster, and not bit-equal to the full size. `max_pixels` caps width × height of the original.
    `bit_depth`: how many bits of a 16-bit gray image are used, 8 to 16.
    Raises ImageError with the reason for anything that cannot be decoded whole.
    """
    raw = data if isinstance(data, bytes) else read_file(data)
    try:
        with open_image(raw, max_pixels) as image:
            size = _upright_size(image)
            if target_size is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, (target_size, target_size))
            image.load()
            return Decoded(upright_rgb(image, bit_depth), size)
    except ImageError:
        raise
    except Exception as error:
        # Damaged files make Pillow's plugins raise almost anything: OSError, SyntaxError, struct.error, KeyError…
        raise ImageError(reason_of(error)) from None


def image_size(data: bytes | Path | str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright image, from the header alone. Raises ImageError like `decode`."""
    try:
        if not isinstance(data, bytes):
            data = read_file(data)
        with open_image(data, max_pixels) as image:
            return _upright_size(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(reason_of(error)) from None


def largest_gray(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> int | None:
    """The largest value of a 16-bit gray image, by which a data set's bit depth is chosen; None for any other image.

    Raises ImageError like `decode`.
    """
    try:
        with open_image(data, max_pixels) as image:
            if not wide_gray(image).mode.startswith(WIDE_GRAY):
                return None
            image.load()
            return int(np.asarray(image).max())
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(reason_of(error)) from None


def wide_gray(image: Image.Image) -> Image.Image:
    """Pillow reads 16-bit PGM as 32-bit integers of the range 0 to 65535: those as 16-bit gray, others as they are."""
    if image.mode != "I" or image.format != "PPM":
        return image
    return Image.fromarray(np.asarray(image).astype(np.uint16))


def open_image(raw: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read, its size checked. Raises ImageError, or whatever Pillow's plugin raises."""
    if not raw:
        raise ImageError("empty file (0 bytes)")
    if raw.startswith(_PNG_MAGIC):
        _check_png(raw)
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many_pixels(_size_in_header(raw), max_pixels) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"image of {width}×{height} pixels")
    if width * height > max_pixels:
        raise too_many_pixels(image.size, max_pixels)
    return image


def too_many_pixels(size: tuple[int, int] | None, max_pixels: int) -> ImageError:
    """The error for an image of `size` (width, height), None where it is not known."""
    shown = "" if size is None else f"{size[0]}×{size[1]} = {size[0] * size[1]:,}, "
    return ImageError(f"too many pixels: {shown}the limit is {max_pixels:,} (--max-pixels)")


def _size_in_header(raw: bytes) -> tuple[int, int] | None:
    """The size of an image that Pillow's own limit keeps `Image.open` from returning; no pixel is decoded."""
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(raw[:16]) is not True:
            continue
        try:
            size: tuple[int, int] = factory(io.BytesIO(raw), "").size
        except Exception:  # a plugin may raise anything, see `decode`
            continue
        return size
    return None


def _check_png(raw: bytes) -> None:
    """Compare the checksums that a PNG carries: Pillow skips those of the pixels. Raises ImageError."""
    view, place = memoryview(raw), len(_PNG_MAGIC)
    while place + 12 <= len(raw):
        length, kind = struct.unpack_from(">I4s", raw, place)
        end = place + 8 + length
        if end + 4 > len(raw):
            raise ImageError("cannot be decoded: PNG file is truncated")
        (stored,) = struct.unpack_from(">I", raw, end)
        if kind not in _PNG_HARMLESS and zlib.crc32(view[place + 4 : end]) != stored:
            raise ImageError(f"cannot be decoded: damaged PNG, wrong checksum of part {kind!r}")
        if kind == b"IEND":
            return
        place = end + 4
    raise ImageError("cannot be decoded: PNG file is truncated")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after turning, from the header. Pillow's TIFF reader has swapped them already."""
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if turned else image.size


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 when absent, unreadable or out of range."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if value in _UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """The image rotated and mirrored by its EXIF orientation."""
    operation = _UPRIGHT.get(_orientation(image))
    return image if operation is None else image.transpose(operation)


def upright_rgb(image: Image.Image, bit_depth: int = FULL_DEPTH) -> Image.Image:
    """The image rotated by its EXIF orientation, RGB on white; of 16-bit gray images `bit_depth` bits are used.

    Raises ImageError for pixels without a defined white (32-bit integers, floating-point numbers).
    """
    return _to_rgb(upright(wide_gray(image)), bit_depth)


def _to_rgb(image: Image.Image, bit_depth: int) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith(WIDE_GRAY):
        white = 2**bit_depth - 1
        gray = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white  # rounded to nearest
        return Image.fromarray(np.minimum(gray, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        kind = "32-bit integer" if mode == "I" else "floating-point"
        raise ImageError(f"{kind} pixels have no defined white: convert the file to 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def reason_of(error: Exception) -> str:
    """One line about an exception that Pillow raised on a damaged file."""
    # Once ultralytics is imported, Pillow's `open` asks for a HEIC plugin where it knows no format.
    if isinstance(error, (UnidentifiedImageError, ImportError)):
        return "not an image, or in a format that is not supported"
    if isinstance(error, MemoryError):
        return "decoding needs more memory than there is"
    text = " ".join(str(error).split())
    return f"cannot be decoded: {text or type(error).__name__}"[:300]
