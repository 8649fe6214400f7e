"""Stored grids follow the view: proven with a grid, and an image, that hold their own coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from imaging.geometry import View, cell_centers, resize_view
from train.data.views import (
    AUGMENTATIONS,
    Augmentation,
    change_color,
    draw_color,
    draw_view,
    render_image,
    render_mask,
    sample_generator,
)
from train.distill.transport import (
    Geometry,
    Transported,
    apply_transport,
    axis_parallel_weights,
    region_mean,
    relate_views,
    resize_matrices,
    rotated_weights,
    transport_weights,
)

GRID, SIDE = 16, 128


def coordinate_grid(grid: int, teacher: View) -> np.ndarray:
    """A teacher grid [g, g, 2] whose tokens say where in the source image their centre lies."""
    return teacher.apply(cell_centers(grid, grid))


def transport_grid(grid: torch.Tensor, geometry: Geometry | None, height: int, width: int) -> Transported:
    """What the loader and the objective do together."""
    return apply_transport(grid, transport_weights(geometry, height, width, (grid.shape[1], grid.shape[2])))


def carry(view: View, teacher: View, size: int, grid: int = GRID) -> Transported:
    stored = torch.from_numpy(coordinate_grid(grid, teacher)).float()[None]
    geometry = relate_views(view.matrix[None], teacher.matrix[None])
    return transport_grid(stored, geometry, size, size)


def coordinate_image(channel: int) -> Image.Image:
    """A float picture whose pixels hold their own x (0) or y (1) coordinate."""
    return Image.fromarray(cell_centers(SIDE, SIDE)[..., channel].astype(np.float32))


def same_augmentation_of_image(view: View, size: int) -> np.ndarray:
    """What the augmentation does to the image of coordinates, mean over each cell: [size, size, 2]; NaN outside."""
    fine = 16
    layers = []
    for channel in (0, 1):
        image = view.render(
            coordinate_image(channel), size * fine, fill=0, resample=Image.Resampling.BILINEAR
        )
        layers.append(np.asarray(image, dtype=np.float64).reshape(size, fine, size, fine).mean(axis=(1, 3)))
    return np.stack(layers, axis=-1)


CHAINS = {
    "resize": View.identity(),
    "crop": View.crop(0.2, 0.1, 0.7, 0.9),
    "flip": View.flip(),
    "flip both": View.flip(True, True),
    "affine": View.crop(0.3, 0.3, 0.7, 0.7).compose(
        View.affine(scale=1.1, shear_degrees=8, shift=(0.05, -0.04))
    ),
    "rotation": View.crop(0.25, 0.25, 0.75, 0.75).compose(View.affine(angle_degrees=30)),
    "crop, rotation, flip": View.crop(0.2, 0.25, 0.75, 0.8)
    .compose(View.affine(angle_degrees=-20))
    .compose(View.flip()),
    "flip, crop, crop": View.flip()
    .compose(View.crop(0.1, 0.2, 0.8, 0.9))
    .compose(View.crop(0.1, 0.1, 0.8, 0.7)),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("size", [4, 7, 16])
def test_transported_grid_equals_the_same_augmentation_of_a_coordinate_image(chain, size):
    view = CHAINS[chain]
    found = carry(view, View.identity(), size)
    expected = same_augmentation_of_image(view, size)
    assert found.weight.min() == 1, "all these views lie inside the image"
    # Beyond the outer tokens' centres the grid is flat: half a token at most, and only at the image's border.
    border = 0.5 / GRID
    inside = np.all((expected > 1.5 * border) & (expected < 1 - 1.5 * border), axis=-1)
    error = np.abs(found.cells[0].numpy() - expected)
    assert inside.mean() > 0.2
    assert error[inside].max() < 0.1 / GRID
    assert error.max() <= border + 0.1 / GRID


@pytest.mark.parametrize("policy", ["squash", "letterbox", "center-crop"])
def test_teacher_and_student_policies_may_differ(policy):
    size = (300, 200)
    teacher, student = resize_view(policy, size, 224), View.crop(0.3, 0.2, 0.7, 0.8)
    found = carry(student, teacher, 8)
    expected = student.apply(cell_centers(8, 8))
    seen = found.weight[0].numpy() == 1
    assert seen.any()
    scale = np.abs(np.diag(teacher.matrix[:, :2])).max() / GRID
    assert np.abs(found.cells[0].numpy() - expected)[seen].max() < 0.6 * scale


def test_many_random_views_of_the_real_augmentation():
    augmentation = Augmentation(
        crop_scale=(0.35, 1.0), crop_ratio=(0.75, 1.33), flip_probability=0.5, rotation_degrees=25
    )
    worst = 0.0
    for number in range(60):
        view = draw_view(augmentation, sample_generator(0, number, "key"), View.identity())
        found = carry(view, View.identity(), 4)
        expected = view.apply(cell_centers(4, 4))
        # A cell is compared when all its points are at least a token away from the border.
        half = np.abs(view.matrix[:, :2]).sum(axis=1) / 8
        margin = half + 0.5 / GRID
        inner = np.all((expected > margin) & (expected < 1 - margin), axis=-1)
        if inner.any():
            worst = max(worst, np.abs(found.cells[0].numpy() - expected)[inner].max())
    assert 0 < worst < 0.05 / GRID


def test_equal_sizes_give_the_tokens_and_whole_ratios_their_mean():
    torch.manual_seed(0)
    grid = torch.randn(2, 8, 8, 5)
    identity = transport_grid(grid, None, 8, 8)
    torch.testing.assert_close(identity.cells, grid)
    halved = transport_grid(grid, None, 4, 4).cells
    torch.testing.assert_close(halved, grid.reshape(2, 4, 2, 4, 2, 5).mean(dim=(2, 4)))


def test_seven_tokens_onto_four_cells_by_hand():
    grid = torch.arange(7.0).view(1, 1, 7, 1).expand(1, 7, 7, 1)
    cells = transport_grid(grid, None, 4, 4).cells[0, 0, :, 0]
    # Two points a cell, at (k + 0.5) / 8 of the width: token positions k·7/8 − 1/16, the first clipped to 0.
    points = [max(0.0, (k + 0.5) / 8 * 7 - 0.5) for k in range(8)]
    points[-1] = min(points[-1], 6.0)
    expected = [(points[2 * i] + points[2 * i + 1]) / 2 for i in range(4)]
    torch.testing.assert_close(cells, torch.tensor(expected))


def test_both_ways_agree_on_axis_parallel_views():
    torch.manual_seed(1)
    grid = torch.randn(3, 6, 6, 4)
    views = np.stack([CHAINS[name].matrix for name in ("crop", "flip", "flip, crop, crop")])
    geometry = relate_views(views, np.stack([np.eye(2, 3)] * 3))
    fast, general = (
        apply_transport(grid, make(geometry, 4, 5, (6, 6)))
        for make in (axis_parallel_weights, rotated_weights)
    )
    torch.testing.assert_close(fast.cells, general.cells)
    torch.testing.assert_close(fast.weight, general.weight)


def test_cells_outside_the_image_have_no_weight():
    view = View.crop(-1.0, 0.0, 1.0, 1.0)  # the left half shows nothing
    found = carry(view, View.identity(), 4)
    assert found.weight[0, :, :2].max() == 0
    assert found.weight[0, :, 2:].min() == 1
    half = carry(View.crop(-0.25, 0, 0.75, 1), View.identity(), 2)
    torch.testing.assert_close(half.weight[0, 0], torch.tensor([0.5, 1.0]))


def test_letterbox_padding_of_the_teacher_never_leaks_in():
    teacher = resize_view("letterbox", (64, 32), 64)
    stored = torch.full((1, 8, 8, 1), 100.0)
    stored[:, 2:6] = 1.0  # the rows that show the image; the rest is padding
    geometry = relate_views(np.eye(2, 3)[None], teacher.matrix[None])
    found = transport_grid(stored, geometry, 4, 4)
    assert found.weight.min() == 1
    torch.testing.assert_close(found.cells, torch.ones(1, 4, 4, 1))


def test_what_a_centre_cropping_teacher_did_not_see_is_masked():
    teacher = resize_view("center-crop", (200, 100), 64)
    geometry = relate_views(np.eye(2, 3)[None], teacher.matrix[None])
    found = transport_grid(torch.ones(1, 8, 8, 1), geometry, 4, 4)
    torch.testing.assert_close(found.weight[0, 0], torch.tensor([0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("policy", ["squash", "letterbox", "center-crop"])
def test_batched_resize_policies_equal_the_geometry_module(policy):
    sizes = [(640, 480), (33, 1001), (224, 224), (1, 7)]
    expected = np.stack([resize_view(policy, size, 224).matrix for size in sizes])
    np.testing.assert_allclose(resize_matrices(policy, sizes, 224), expected, atol=1e-12)


def test_region_mean_weighs_what_was_seen():
    cells = torch.tensor([[[[1.0], [3.0]]]])
    mean, share = region_mean(Transported(cells, torch.tensor([[[1.0, 0.5]]])))
    assert mean.item() == pytest.approx((1 + 1.5) / 1.5)
    assert share.item() == pytest.approx(0.75)


def test_whole_view_region_mean_is_the_mean_of_the_grid():
    torch.manual_seed(2)
    grid = torch.randn(2, 8, 8, 3)
    mean, share = region_mean(transport_grid(grid, None, 4, 4))
    torch.testing.assert_close(mean, grid.mean((1, 2)))
    assert share.tolist() == [1, 1]


def test_float16_grids_are_computed_in_float32():
    grid = torch.full((1, 4, 4, 1), 60000.0, dtype=torch.float16)
    cells = transport_grid(grid, None, 2, 2).cells
    assert cells.dtype == torch.float32
    torch.testing.assert_close(cells, grid.float()[:, :2, :2])


def test_masks_move_with_the_image_and_stay_integer():
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:20] = 3
    image = np.stack([mask * 80] * 3, axis=-1).astype(np.uint8)
    for number in range(12):
        generator = sample_generator(0, number, "mask")
        augmentation = Augmentation(crop_scale=(0.4, 1), flip_probability=0.5, rotation_degrees=20)
        view = draw_view(augmentation, generator, View.identity())
        shown = render_image(Image.fromarray(image), view, 64)
        moved = render_mask(Image.fromarray(mask), view, 64)
        assert set(np.unique(moved)) <= {0, 3, 255}
        certain = (moved == 3) | (moved == 0)
        # Away from edges (bilinear mixes there), pixel and mask say the same.
        flat = np.isin(shown[..., 0], (0, 240)) & certain
        assert flat.mean() > 0.5
        assert np.array_equal(shown[flat][:, 0] == 240, moved[flat] == 3)


def test_outside_the_image_masks_are_ignored():
    moved = render_mask(Image.new("L", (8, 8), 2), View.crop(-1, 0, 1, 1), 8)
    assert (moved[:, :4] == 255).all()
    assert (moved[:, 4:] == 2).all()


def test_a_view_is_a_function_of_seed_epoch_and_key():
    def draw(seed: int, epoch: int, key: str) -> np.ndarray:
        generator = sample_generator(seed, epoch, key)
        view = draw_view(AUGMENTATIONS["full"], generator, View.identity())
        return np.append(view.matrix, draw_color(AUGMENTATIONS["full"], generator))

    assert np.array_equal(draw(0, 1, "a"), draw(0, 1, "a"))
    others = [draw(0, 1, "b"), draw(0, 2, "a"), draw(1, 1, "a")]
    assert not any(np.array_equal(draw(0, 1, "a"), other) for other in others)


def test_mild_crops_keep_most_of_the_image_and_never_flip():
    for number in range(100):
        view = draw_view(AUGMENTATIONS["mild"], sample_generator(0, number, "k"), View.identity())
        assert view.determinant >= 0.75


def test_colors_by_hand():
    pixels = np.random.default_rng(0).integers(60, 180, size=(8, 8, 3)).astype(np.uint8)
    brightness, contrast, saturation = 1.1, 0.8, 0.7
    found = np.asarray(change_color(Image.fromarray(pixels), np.array([brightness, contrast, saturation])))
    values = pixels.astype(float)
    grey = values @ [0.299, 0.587, 0.114]
    saturated = saturation * values + (1 - saturation) * grey[..., None]
    expected = brightness * (contrast * saturated + (1 - contrast) * grey.mean())
    assert np.abs(found - expected).max() <= 2


def test_geometry_is_inverse_teacher_after_student():
    teacher, student = View.crop(0.1, 0.2, 0.8, 0.9), CHAINS["crop, rotation, flip"]
    geometry: Geometry = relate_views(student.matrix[None], teacher.matrix[None])
    expected = teacher.inverse().compose(student)
    np.testing.assert_allclose(geometry.to_teacher[0], expected.matrix, atol=1e-12)
