"""Views: algebra, rendering against independent resampling, resize policies."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imaging.geometry import RESIZE_POLICIES, View, cell_centers, content_rectangle, resize_view

SIZES = [(64, 48), (48, 64), (50, 50), (300, 20), (17, 131)]


def coordinates(width: int, height: int) -> Image.Image:
    """A float image whose value at each pixel centre is its x; a resampled one shows where it looked."""
    return Image.fromarray(np.tile((np.arange(width, dtype=np.float32) + 0.5) / width, (height, 1)))


def coordinate_images(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    y = coordinates(height, width).transpose(Image.Transpose.TRANSPOSE)
    return coordinates(width, height), y


def views() -> st.SearchStrategy[View]:
    return st.builds(
        lambda angle, scale, shear, x, y, mirror: View.affine(
            angle_degrees=angle, scale=scale, shear_degrees=shear, shift=(x, y)
        ).compose(View.flip(horizontal=mirror)),
        st.floats(-180, 180),
        st.floats(0.6, 3),
        st.floats(-30, 30),
        st.floats(-0.4, 0.4),
        st.floats(-0.4, 0.4),
        st.booleans(),
    )


@settings(max_examples=50, deadline=None)
@given(views(), views())
def test_composition_and_inverse(first: View, second: View) -> None:
    points = np.random.default_rng(0).random((5, 2))
    np.testing.assert_allclose(
        first.compose(second).apply(points), first.apply(second.apply(points)), atol=1e-9
    )
    np.testing.assert_allclose(first.inverse().apply(first.apply(points)), points, atol=1e-9)
    assert first.compose(View.identity()) == first
    assert pickle.loads(pickle.dumps(first)) == first  # noqa: S301 - our own bytes


@settings(max_examples=40, deadline=None)
@given(views())
def test_rendering_shows_what_apply_says(view: View) -> None:
    size = (40, 30)
    x, y = (view.render(image, size, fill=-9) for image in coordinate_images(120, 90))
    expected = view.apply(cell_centers(size[1], size[0]))
    seen = np.stack([np.asarray(x), np.asarray(y)], axis=-1)
    # Near the source's edges resampling has fewer pixels to go by.
    inner = ((expected > 0.15) & (expected < 0.85)).all(axis=-1)
    np.testing.assert_allclose(seen[inner], expected[inner], atol=0.012)
    outer = ((expected < -0.05) | (expected > 1.05)).any(axis=-1)
    assert (seen[outer] == -9).all()


def test_a_wrong_view_would_be_noticed() -> None:
    image = coordinates(120, 90)
    seen = np.asarray(View.flip().render(image, (40, 30)))
    assert np.abs(seen - cell_centers(30, 40)[..., 0]).max() > 0.9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", RESIZE_POLICIES)
def test_resize_policies_render_their_own_geometry(policy: str, size: tuple[int, int]) -> None:
    view = resize_view(policy, size, 28)
    expected = view.apply(cell_centers(28, 28))
    inside = view.inside(28, 28)
    for axis, image in enumerate(coordinate_images(*size)):
        seen = np.asarray(view.render(image, 28, fill=-9))
        # Anti-aliasing shortens the outermost pixels' neighbourhood, so they lie a little further inside.
        np.testing.assert_allclose(seen[inside], expected[inside][:, axis], atol=0.04)
        assert (seen[~inside] == -9).all()


def test_letterbox_pads_centred_and_keeps_the_shape() -> None:
    assert content_rectangle("letterbox", (640, 480), 224) == (0, 28, 224, 168)
    assert content_rectangle("letterbox", (100, 1000), 224) == (101, 0, 22, 224)
    assert content_rectangle("letterbox", (5000, 1), 224) == (0, 111, 224, 1)
    view = resize_view("letterbox", (640, 480), 224)
    assert view.inside(16, 16).sum() == 12 * 16
    assert not view.inside(16, 16)[:2].any()


def test_center_crop_covers_the_view() -> None:
    assert content_rectangle("center-crop", (640, 480), 224) == (-38, 0, 299, 224)
    view = resize_view("center-crop", (640, 480), 224)
    assert view.inside(224, 224).all()
    np.testing.assert_allclose(view.apply([0.5, 0.5]), [0.5, 0.5], atol=0.002)


def test_squash_is_the_identity() -> None:
    assert resize_view("squash", (640, 480), 224) == View.identity()


def test_unknown_policy() -> None:
    with pytest.raises(
        ValueError, match="resize policy 'stretch': expected one of squash, letterbox, center-crop"
    ):
        resize_view("stretch", (2, 2), 2)


def test_crop_and_flip_are_exact_on_whole_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crop = View.crop(10 / 60, 5 / 40, 40 / 60, 25 / 40)
    np.testing.assert_array_equal(np.asarray(crop.render(image, (30, 20))), pixels[5:25, 10:40])
    mirrored = crop.compose(View.flip())
    np.testing.assert_array_equal(np.asarray(mirrored.render(image, (30, 20))), pixels[5:25, 10:40][:, ::-1])
    turned = View.flip(horizontal=False, vertical=True)
    np.testing.assert_array_equal(np.asarray(turned.render(image, (60, 40))), pixels[::-1])


def test_crop_beyond_the_edge_is_filled() -> None:
    image = Image.new("RGB", (20, 20), (255, 0, 0))
    seen = np.asarray(View.crop(-0.5, -0.5, 1.0, 1.0).render(image, 30, fill=(0, 9, 0)))
    assert (seen[:10] == (0, 9, 0)).all()
    assert (seen[10:, 10:] == (255, 0, 0)).all()


def test_positive_angle_turns_the_picture_clockwise() -> None:
    image = Image.new("L", (64, 64))
    image.putpixel((32, 4), 255)
    image.paste(255, (30, 2, 34, 10))  # a bar at twelve o'clock
    seen = np.asarray(View.affine(angle_degrees=90).render(image, 64, fill=0)).astype(float)
    y, x = np.average(np.mgrid[:64, :64].reshape(2, -1), axis=1, weights=seen.reshape(-1))
    assert x > 54  # three o'clock
    assert abs(y - 31.5) < 1.5


def test_masks_are_rendered_without_mixing() -> None:
    mask = Image.fromarray(np.random.default_rng(0).choice(np.array([0, 7, 255], np.uint8), (40, 60)))
    for view in (View.identity(), View.affine(angle_degrees=20, scale=0.7), View.crop(-0.3, 0, 0.8, 1)):
        seen = view.render(mask, 25, fill=255, resample=Image.Resampling.NEAREST)
        assert set(np.unique(np.asarray(seen))) <= {0, 7, 255}


def test_boxes_follow_the_picture() -> None:
    pixels = np.zeros((80, 120), np.uint8)
    pixels[20:40, 30:90] = 255
    view = View.crop(0.1, 0.1, 0.9, 0.9).compose(View.flip())
    seen = np.asarray(view.render(Image.fromarray(pixels), (96, 64)))
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    box = view.boxes_to_view([[30 / 120, 20 / 80, 90 / 120, 40 / 80]])[0] * (96, 64, 96, 64)
    np.testing.assert_allclose(box, [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1e-9)


def test_pixel_matrices_map_corners_to_corners() -> None:
    view = View.affine(angle_degrees=12, scale=1.3, shift=(0.1, -0.2))
    matrix = view.pixels((40, 30), (120, 90))
    np.testing.assert_allclose(matrix[:, 2], view.apply([0, 0]) * (120, 90))
    np.testing.assert_allclose(matrix[:, :2] @ (40, 30) + matrix[:, 2], view.apply([1, 1]) * (120, 90))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [(np.eye(3), r"shape \[2, 3\], got \[3, 3\]"), (np.full((2, 3), np.nan), "must be finite")],
)
def test_bad_matrices(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        View(matrix)


def test_a_view_without_area_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="without area"):
        View.crop(0.5, 0, 0.5, 1).inverse()
