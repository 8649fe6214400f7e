"""Decoding of every kind of file, against values that are known or decoded by OpenCV."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.decode import ImageError, decode, decode_image, image_size, largest_gray, read_file
from imaging.masks import decode_mask, encode_mask

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    small = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats(form: str) -> None:
    decoded = decode(encode(Image.fromarray(PIXELS), form))
    assert decoded.image.mode == "RGB"
    assert decoded.size == (30, 20)
    np.testing.assert_array_equal(np.asarray(decoded.image), PIXELS)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats(form: str) -> None:
    image = smooth(64, 48)
    decoded = decode_image(encode(image, form, **({} if form == "JPEG2000" else {"quality": 95})))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, form: str) -> None:
    upright = smooth(64, 48)
    # The transposition that undoes each orientation, written down from the EXIF standard's picture.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    decoded = decode(data)
    assert decoded.size == decoded.image.size == image_size(data) == (64, 48)
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(upright)).mean() < 4
    small = decode(data, target_size=10)
    assert small.size == (64, 48)
    reference = upright.resize(small.image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small.image).astype(int) - np.asarray(reference)).mean() < 6


def test_broken_exif_counts_as_none() -> None:
    data = encode(smooth(64, 48), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).size == (64, 48)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encode(smooth(64, 48), "JPEG", exif=exif)).size == (64, 48)


def test_draft_keeps_both_sides_above_the_target() -> None:
    data = encode(smooth(640, 480), "JPEG")
    assert decode(data).image.size == (640, 480)
    assert decode(data, target_size=224).image.size == (320, 240)
    assert decode(data, target_size=241).image.size == (640, 480)
    assert decode(data, target_size=60).image.size == (80, 60)
    assert decode(data, target_size=60).size == (640, 480)
    assert decode(encode(smooth(640, 480), "PNG"), target_size=60).image.size == (640, 480)


def test_transparency_lies_on_white() -> None:
    rgba = np.dstack([PIXELS, np.full((20, 30), 64, np.uint8)])
    expected = PIXELS * (64 / 255) + 255 * (1 - 64 / 255)
    for form in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        seen = np.asarray(decode_image(encode(Image.fromarray(rgba), form, **options)))
        np.testing.assert_allclose(seen, expected, atol=1.01)
    grey = Image.merge("LA", (Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 0)))
    assert (np.asarray(decode_image(encode(grey, "PNG"))) == 255).all()


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30, 40, 50, 60])
    assert decode_image(encode(image, "PNG")).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encode(image, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(image, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    rgb = encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode_image(rgb).getpixel((0, 0)) == (255, 255, 255)


def test_gray_bits_and_sixteen_bits() -> None:
    assert decode_image(encode(Image.new("1", (3, 3), 1), "PNG")).getpixel((0, 0)) == (255,) * 3
    assert decode_image(encode(Image.new("L", (3, 3), 77), "PNG")).getpixel((0, 0)) == (77,) * 3
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for form in ("PNG", "TIFF"):
        seen = np.asarray(decode_image(encode(Image.fromarray(ramp), form)))
        np.testing.assert_array_equal(seen, np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2))


def test_the_bit_depth_says_what_is_white() -> None:
    """The largest value in use is white, not 65535; values above it are white too."""
    for depth in (8, 10, 12, 16):
        white = 2**depth - 1
        ramp = np.array([[0, white // 2, white, min(white + 7, 65535)]], np.uint16)
        seen = np.asarray(decode_image(encode(Image.fromarray(ramp), "PNG"), bit_depth=depth))[0, :, 0]
        assert seen.tolist() == [0, 127, 255, 255]
    assert largest_gray(encode(Image.fromarray(np.array([[3, 235]], np.uint16)), "TIFF")) == 235
    assert largest_gray(encode(smooth(9, 9), "PNG")) is None


def test_sixteen_bit_pgm_is_read_like_png() -> None:
    values = np.array([[0, 300, 1023, 65535]], np.uint16)
    data = b"P5\n4 1\n65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(
        np.asarray(decode_image(data)), np.asarray(decode_image(encode(Image.fromarray(values), "PNG")))
    )
    assert largest_gray(data) == 65535


def test_sixteen_bit_colour_agrees_with_opencv() -> None:
    import cv2

    wide = np.random.default_rng(2).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    data = cv2.imencode(".png", wide)[1].tobytes()
    seen = np.asarray(decode_image(data)).astype(int)
    np.testing.assert_allclose(seen, wide[..., ::-1] / 257, atol=1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_white_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="pixels have no defined white"):
        decode_image(encode(Image.new(mode, (3, 3), 5), "TIFF"))


def test_cmyk() -> None:
    data = encode(smooth(64, 48).convert("CMYK"), "JPEG", quality=95)
    seen = np.asarray(decode_image(data)).astype(int)
    assert np.abs(seen - np.asarray(smooth(64, 48))).mean() < 6


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        pixel = decode_image(data).getpixel((4, 4))
        assert pixel[0] > 240
        assert pixel[1] < 16


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    file = tmp_path / "really-a.jpg"
    file.write_bytes(encode(Image.fromarray(PIXELS), "PNG"))
    np.testing.assert_array_equal(np.asarray(decode_image(file)), PIXELS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encode(smooth(64, 48), "JPEG")[:700], "cannot be decoded: .*truncated"),
        (encode(smooth(64, 48), "PNG")[:900], "cannot be decoded"),
        (encode(smooth(64, 48), "WEBP")[:100], "cannot be decoded|not an image"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data)
    assert "\n" not in caught.value.reason
    with pytest.raises(ImageError, match=reason):
        decode(data, target_size=8)


def test_pixel_cap_comes_before_decoding() -> None:
    data = encode(Image.new("1", (20_000, 5_000)), "PNG")
    with pytest.raises(
        ImageError, match=r"too many pixels: 20000×5000 = 100,000,000, the limit is 89,478,485"
    ):
        decode(data)
    with pytest.raises(ImageError, match=r"64×48 = 3,072, the limit is 3,000 \(--max-pixels\)"):
        decode(encode(smooth(64, 48), "JPEG"), max_pixels=3_000)
    assert decode(encode(smooth(64, 48), "JPEG"), max_pixels=3_072).size == (64, 48)
    with pytest.raises(ImageError, match="too many pixels"):
        image_size(data)


def test_bomb_beyond_pillows_own_limit() -> None:
    header = b"P6\n100000 100000\n255\n"
    with pytest.raises(ImageError, match=r"too many pixels: 100000×100000 = 10,000,000,000, the limit"):
        decode(header)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "large.jpg").write_bytes(b"x" * 100)
    for name, reason in {
        "pipe.jpg": "not a regular file",
        "loop.jpg": "cannot be read: .*symbolic links",
        "folder.jpg": "not a regular file|Is a directory",
        "gone.jpg": "cannot be read: No such file",
        "nul\0.jpg": "cannot be read",
    }.items():
        with pytest.raises(ImageError, match=reason):
            decode(tmp_path / name)
    with pytest.raises(ImageError, match="file of 100 bytes: more than the limit of 99"):
        read_file(tmp_path / "large.jpg", max_bytes=99)
    if Path("/dev/zero").exists():
        with pytest.raises(ImageError, match="not a regular file"):
            read_file("/dev/zero")


def test_masks_keep_ids_whatever_the_palette() -> None:
    ids = np.random.default_rng(3).integers(0, 256, (9, 11), dtype=np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([(7 * i) % 256 for i in range(768)])
    wide = Image.fromarray(ids.astype(np.uint16))
    for image in (Image.fromarray(ids), palette, wide, Image.fromarray(np.dstack([ids] * 3))):
        np.testing.assert_array_equal(decode_mask(encode(image, "PNG")), ids)
    np.testing.assert_array_equal(decode_mask(encode_mask(ids)), ids)
    assert Image.open(io.BytesIO(encode_mask(ids))).mode == "L"
    bits = Image.fromarray(ids > 100)
    np.testing.assert_array_equal(decode_mask(encode(bits, "PNG")), ids > 100)


def test_masks_in_colors_are_read_by_a_table() -> None:
    colors = [(128, 128, 128), (0, 0, 192), (64, 128, 64)]
    ids = np.random.default_rng(0).integers(0, 3, (9, 12))
    painted = np.array(colors, np.uint8)[ids]
    for image in (Image.fromarray(painted), Image.fromarray(painted).quantize(3, dither=Image.Dither.NONE)):
        np.testing.assert_array_equal(decode_mask(encode(image, "PNG"), colors=colors), ids)
    with pytest.raises(ImageError, match=r"color \(64, 128, 64\) is not in the color table"):
        decode_mask(encode(Image.fromarray(painted), "PNG"), colors=colors[:2])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(PIXELS), "in colors: expected class ids"),
        (Image.fromarray(np.array([[0, 256]], np.uint16)), "class ids reach 256"),
        (Image.new("LA", (2, 2)), "of mode LA"),
    ],
)
def test_masks_that_hold_no_ids(image: Image.Image, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_mask(encode(image, "PNG"))
