"""Generated bad and odd image files, each with what may come of it. Seeded: the same files every time."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Generator = np.random.Generator

SUFFIXES = (".jpg", ".png", ".webp", ".gif", ".bmp", ".tif")


@dataclass(frozen=True)
class Case:
    """A file to write, and its outcome: `pixels` uint8 [H, W, 3] if it may be decoded, `must` if it has to be.

    No pixels: it has to be refused. `tolerance`: mean absolute difference allowed (lossy formats).
    """

    name: str
    write: Callable[[Path], None]
    pixels: np.ndarray | None = None
    must: bool = True
    tolerance: float = 0.0


def case(
    name: str, data: bytes, pixels: np.ndarray | None = None, must: bool = True, tolerance: float = 0.0
) -> Case:
    return Case(name, lambda path: void(path.write_bytes(data)), pixels, must, tolerance)


def void(_: object) -> None:
    pass


def smooth(generator: Generator, width: int | None = None, height: int | None = None) -> np.ndarray:
    """A picture that lossy formats keep well, uint8 [H, W, 3]."""
    width = width or int(generator.integers(20, 120))
    height = height or int(generator.integers(20, 120))
    seed = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(seed.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def exact_form(generator: Generator) -> tuple[str, dict[str, object]]:
    options: list[tuple[str, dict[str, object]]] = [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ]
    return options[int(generator.integers(len(options)))]


def any_file(generator: Generator) -> tuple[bytes, np.ndarray, float, str]:
    """A healthy file, its picture, tolerance and format."""
    pixels = smooth(generator)
    if generator.random() < 0.5:
        return encode(pixels, "JPEG", quality=95, subsampling=0), pixels, 6.0, "JPEG"
    form, options = exact_form(generator)
    return encode(pixels, form, **options), pixels, 0.0, form


def truncated(g: Generator) -> Case:
    data, pixels, tolerance, form = any_file(g)
    cut = int(g.integers(1, len(data)))
    return case(f"truncated {form} {cut} of {len(data)}", data[:cut], pixels, must=False, tolerance=tolerance)


def empty(g: Generator) -> Case:
    return case("zero bytes", b"")


def noise(g: Generator) -> Case:
    return case("noise", g.bytes(int(g.integers(1, 3000))))


def magic_then_noise(g: Generator) -> Case:
    starts = [
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF____WEBPVP8 ",
        b"P6\n9 9\n",
    ]
    return case("magic", starts[int(g.integers(len(starts)))] + g.bytes(int(g.integers(0, 200))))


def other_content(g: Generator) -> Case:
    texts = [
        b"<html><body>404</body></html>",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"PK\x03\x04",
        b"{}",
        b"\0" * 99,
    ]
    return case("other content", texts[int(g.integers(len(texts)))])


def wrong_extension(g: Generator) -> Case:
    data, pixels, tolerance, form = any_file(g)
    return case(f"{form} under any name", data, pixels, tolerance=tolerance)


def garbage_after(g: Generator) -> Case:
    pixels = smooth(g)
    return case("garbage after the end", encode(pixels, "PNG") + g.bytes(500), pixels)


def huge(g: Generator) -> Case:
    width, height = int(g.integers(30_000, 60_000)), int(g.integers(30_000, 60_000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    bmp = bytearray(encode(smooth(g), "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    gif = bytearray(encode(smooth(g), "GIF"))
    gif[6:10] = struct.pack("<HH", width, height)
    jpeg = bytearray(encode(smooth(g), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", height, width)
    files = [png, bytes(bmp), bytes(gif), bytes(jpeg), b"P6\n%d %d\n255\n" % (width, height)]
    return case("huge dimensions", files[int(g.integers(len(files)))])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def damaged_jpeg(g: Generator) -> Case:
    """More rows than data, or changed bytes: a JPEG has no checksum, so OpenCV's decoder is the judge."""
    jpeg = bytearray(encode(smooth(g, 64, 64), "JPEG"))
    if g.random() < 0.5:
        start = jpeg.index(b"\xff\xc0") + 5
        jpeg[start : start + 2] = struct.pack(">H", 640)
    else:
        for _ in range(3):
            jpeg[int(g.integers(300, len(jpeg)))] ^= int(g.integers(1, 256))
    seen = cv2.imdecode(np.frombuffer(bytes(jpeg), np.uint8), cv2.IMREAD_COLOR)
    pixels = None if seen is None else np.ascontiguousarray(seen[..., ::-1])
    return case("damaged JPEG", bytes(jpeg), pixels, must=False, tolerance=6)


def palette(g: Generator) -> Case:
    colours = g.integers(0, 256, (256, 3), dtype=np.uint8)
    index = g.integers(0, 256, (30, 40), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.reshape(-1).tolist())
    pixels = colours[index]
    if g.random() < 0.5:
        clear = int(g.integers(256))
        return case(
            "palette, transparent", encode(image, "PNG", transparency=clear), on_white(pixels, index != clear)
        )
    return case("palette", encode(image, ("PNG", "GIF", "BMP")[int(g.integers(3))]), pixels)


def on_white(pixels: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    return np.where(opaque[..., None], pixels, 255).astype(np.uint8)


def sixteen_bits(g: Generator) -> Case:
    wide = g.integers(0, 65536, (25, 35), dtype=np.uint16)
    grey = np.rint(wide / 257).astype(np.uint8)
    data = encode(Image.fromarray(wide), ("PNG", "TIFF")[int(g.integers(2))])
    return case("16 bits", data, np.repeat(grey[..., None], 3, axis=2), tolerance=0.01)


def no_white(g: Generator) -> Case:
    mode = ("I", "F")[int(g.integers(2))]
    return case(f"mode {mode}", encode(Image.new(mode, (9, 9), 5), "TIFF"))


def cmyk(g: Generator) -> Case:
    pixels = smooth(g)
    return case(
        "CMYK", encode(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95), pixels, tolerance=6
    )


def alpha(g: Generator) -> Case:
    pixels, opacity = smooth(g, 40, 30), g.choice(np.array([0, 255], np.uint8), (30, 40))
    image = Image.fromarray(np.dstack([pixels, opacity]))
    form, options = ("PNG", {}) if g.random() < 0.5 else ("WEBP", {"lossless": True, "exact": True})
    if g.random() < 0.3:
        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(opacity)))
        pixels, form, options = np.repeat(grey[..., None], 3, axis=2), "PNG", {}
    return case("alpha", encode(image, form, **options), on_white(pixels, opacity > 0))


def animated(g: Generator) -> Case:
    frames = [np.full((20, 30, 3), g.integers(0, 256, 3), np.uint8) for _ in range(3)]
    form = ("GIF", "PNG", "WEBP", "TIFF")[int(g.integers(4))]
    options = {"lossless": True} if form == "WEBP" else {}
    images = [Image.fromarray(frame) for frame in frames]
    data = encode(images[0], form, save_all=True, append_images=images[1:], **options)
    return case(f"animated {form}", data, frames[0], tolerance=1)


def rotated(g: Generator) -> Case:
    pixels, orientation = smooth(g), int(g.integers(1, 9))
    # EXIF: which corner the first row and column are. Undone by these, so applied before storing.
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    form = ("JPEG", "PNG", "TIFF", "WEBP")[int(g.integers(4))]
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    data = encode(np.ascontiguousarray(stored), form, exif=exif, **options)
    return case(f"orientation {orientation} {form}", data, pixels, tolerance=6 if form == "JPEG" else 0)


def odd_jpeg(g: Generator) -> Case:
    pixels = smooth(g)
    kind = int(g.integers(4))
    if kind == 0:
        return case(
            "progressive",
            encode(pixels, "JPEG", quality=95, subsampling=0, progressive=True),
            pixels,
            tolerance=4,
        )
    if kind == 1:
        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        wide = np.repeat(grey[..., None], 3, axis=2)
        return case("grey", encode(grey, "JPEG", quality=95), wide, tolerance=6)
    if kind == 2:
        data = encode(pixels, "JPEG", quality=95, icc_profile=g.bytes(300))
        return case("broken colour profile", data, pixels, tolerance=6)
    data = encode(pixels, "JPEG", quality=95, exif=b"Exif\0\0" + g.bytes(60))
    return case("broken EXIF", data, pixels, tolerance=6)


def odd_shape(g: Generator) -> Case:
    width, height = ((1, 1), (1, 3000), (3000, 1), (2, 5))[int(g.integers(4))]
    pixels = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return case(f"{width}×{height}", encode(pixels, "PNG"), pixels)


def link_loop(g: Generator) -> Case:
    return Case("link to itself", lambda path: path.symlink_to(path.name))


def broken_link(g: Generator) -> Case:
    return Case("broken link", lambda path: path.symlink_to("nowhere.jpg"))


def pipe(g: Generator) -> Case:
    return Case("pipe", lambda path: os.mkfifo(path))


def unreadable(g: Generator) -> Case:
    data = encode(smooth(g), "PNG")

    def write(path: Path) -> None:
        path.write_bytes(data)
        path.chmod(0)

    # Root reads it all the same, and then rightly.
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if os.geteuid() == 0 else None
    return Case("unreadable", write, pixels)


def flipped_png(g: Generator) -> Case:
    """Any changed byte of a PNG: noticed by a checksum, or without effect on the picture."""
    pixels = smooth(g)
    data = bytearray(encode(pixels, "PNG"))
    data[int(g.integers(len(data)))] ^= int(g.integers(1, 256))
    return case("changed byte in a PNG", bytes(data), pixels, must=False)


KINDS: tuple[Callable[[Generator], Case], ...] = (
    truncated,
    truncated,
    truncated,
    flipped_png,
    flipped_png,
    empty,
    noise,
    magic_then_noise,
    other_content,
    wrong_extension,
    garbage_after,
    huge,
    damaged_jpeg,
    palette,
    sixteen_bits,
    no_white,
    cmyk,
    alpha,
    animated,
    rotated,
    rotated,
    odd_jpeg,
    odd_shape,
    link_loop,
    broken_link,
    pipe,
    unreadable,
)


def bad_images(count: int, seed: int = 0) -> Iterator[tuple[str, Case]]:
    """(file name, case) of `count` files, every kind in turn, under suffixes that mean nothing."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        made = KINDS[number % len(KINDS)](generator)
        yield f"{number:05d}{SUFFIXES[int(generator.integers(len(SUFFIXES)))]}", made
