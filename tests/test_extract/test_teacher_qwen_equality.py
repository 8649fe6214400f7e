"""The tower equals transformers' own, put back into raster order by code that shares nothing with ours.

Every comparison has a negative: a mistake of the kind that it is there to find must fail it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from extract.teachers import load_teacher
from extract.teachers.pixels import normalize, patchify
from extract.teachers.qwen_vl import QwenVLTeacher
from tests.test_extract.reference_tower import TOLERANCE, random_pixels, tower_outputs, worst

SIZES = {
    "square": (224, 224),
    "wide": (112, 336),
    "tall": (336, 112),
    "one merge cell": (28, 28),
    "below a window": (56, 84),
    "cut at the right": (112, 140),
    "cut at the bottom": (196, 112),
    "cut at both": (140, 252),
}


@pytest.fixture(scope="module", params=["full", "windows"])
def pair(request: pytest.FixtureRequest, sharp_checkpoints: dict[str, Path]) -> tuple[QwenVLTeacher, Any]:
    """Our teacher and transformers' model of one checkpoint, with and without full-attention blocks."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = sharp_checkpoints[request.param]
    teacher = load_teacher("qwen2.5-vl", str(folder), device="cpu", dtype="float32")
    assert isinstance(teacher, QwenVLTeacher)
    return teacher, Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def published_order(h: int, w: int) -> list[tuple[int, int]]:
    """(row, column) of each patch in the order of `visual(...).last_hidden_state`, by plain counting.

    Windows of 8 × 8 patches row by row; inside a window, blocks of 2 × 2 row by row; inside a block, row by row.
    """
    order = []
    for window_row in range(0, h, 8):
        for window_column in range(0, w, 8):
            for block_row in range(window_row, min(window_row + 8, h), 2):
                for block_column in range(window_column, min(window_column + 8, w), 2):
                    order += [(block_row + i, block_column + j) for i in (0, 1) for j in (0, 1)]
    return order


def reference_outputs(model: Any, images: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """transformers' features per image as [h, w, D] in raster order, and its own merged output [M, d]."""
    grids, out = tower_outputs(model.model.visual, images, published_order)
    return grids, out.pooler_output


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_features_equal_transformers(
    pair: tuple[QwenVLTeacher, Any], size: tuple[int, int], noise: torch.Generator
) -> None:
    teacher, model = pair
    images = random_pixels(noise, 2, 3, *size)
    encoded = teacher.encode(images)
    grids, _ = reference_outputs(model, list(images))
    assert encoded.grid.shape == (2, size[0] // 14, size[1] // 14, 1280)
    assert worst(encoded.grid, torch.stack(grids)) <= TOLERANCE
    assert worst(encoded.pooled, torch.stack([grid.mean(dim=(0, 1)) for grid in grids])) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 33])
def test_features_equal_transformers_for_any_batch_size(
    pair: tuple[QwenVLTeacher, Any], batch: int, noise: torch.Generator
) -> None:
    teacher, model = pair
    images = random_pixels(noise, batch, 3, 56, 84)
    grids, _ = reference_outputs(model, list(images))
    assert worst(teacher.encode(images).grid, torch.stack(grids)) <= TOLERANCE


def test_images_of_different_sizes(pair: tuple[QwenVLTeacher, Any], noise: torch.Generator) -> None:
    teacher, model = pair
    sizes = [(112, 112), (56, 140), (112, 112), (140, 56), (28, 28)]
    images = [random_pixels(noise, 3, *size) for size in sizes]
    grids, _ = reference_outputs(model, images)
    encoded = [teacher.encode(image[None]) for image in images]
    assert [tuple(item.grid.shape[1:3]) for item in encoded] == [(h // 14, w // 14) for h, w in sizes]
    for item, grid in zip(encoded, grids, strict=True):
        assert worst(item.grid[0], grid) <= TOLERANCE
        assert worst(item.pooled[0], grid.mean(dim=(0, 1))) <= TOLERANCE


def test_our_grid_merges_to_what_transformers_puts_back_itself(
    pair: tuple[QwenVLTeacher, Any], noise: torch.Generator
) -> None:
    """`pooler_output` is the one output that transformers restores: its merger on our 2 × 2 cells must give it."""
    teacher, model = pair
    images = random_pixels(noise, 2, 3, 140, 252)
    grid = teacher.encode(images).grid
    cells = grid.reshape(2, 5, 2, 9, 2, 1280).permute(0, 1, 3, 2, 4, 5).reshape(-1, 1280)
    with torch.inference_mode():
        merged = model.model.visual.merger(cells)
    assert worst(merged, reference_outputs(model, list(images))[1]) <= TOLERANCE


def test_the_comparison_notices_a_window_ordered_grid(
    pair: tuple[QwenVLTeacher, Any], noise: torch.Generator
) -> None:
    """Trap 1: `last_hidden_state` simply reshaped has the right shape and the wrong order."""
    teacher, model = pair
    images = random_pixels(noise, 1, 3, 224, 224)
    (grid,), _ = reference_outputs(model, list(images))
    scrambled = torch.stack([grid[row, column] for row, column in published_order(16, 16)]).view(16, 16, 1280)
    ours = teacher.encode(images).grid[0]
    assert worst(ours, grid) <= TOLERANCE
    assert worst(ours, scrambled) > 1.0
    assert (
        worst(ours.mean(dim=(0, 1)), scrambled.mean(dim=(0, 1))) <= TOLERANCE
    )  # pooled alone would not notice


def test_the_comparison_notices_wrong_windows_and_wrong_positions(
    sharp_checkpoints: dict[str, Path], noise: torch.Generator
) -> None:
    """The random weights are sharp enough: windows ignored, or rows and columns exchanged, exceed the tolerance."""
    teacher = load_teacher("qwen2.5-vl", str(sharp_checkpoints["windows"]), device="cpu", dtype="float32")
    assert isinstance(teacher, QwenVLTeacher)
    images = random_pixels(noise, 1, 3, 140, 252)
    right = teacher.encode(images).grid
    layout = teacher.layouts[10, 18]
    whole = layout.groups[0]._replace(start=0, windows=1, tokens=180)
    transposed = type(teacher)(teacher.tower, teacher.spec, teacher.preprocessing, max_pixels=1 << 24)
    transposed.layouts[10, 18] = layout._replace(groups=(whole,))
    assert worst(transposed.encode(images).grid, right) > 100 * TOLERANCE
    transposed.layouts[10, 18] = layout._replace(cos=layout.cos.flip(0), sin=layout.sin.flip(0))
    assert worst(transposed.encode(images).grid, right) > 100 * TOLERANCE


def test_frame_pairs_equal_transformers_on_a_video(
    pair: tuple[QwenVLTeacher, Any], noise: torch.Generator
) -> None:
    teacher, model = pair
    frames = random_pixels(noise, 6, 3, 56, 140)  # three temporal patches
    values = normalize(frames, teacher.mean, teacher.std)
    cells = values.reshape(3, 2, 3, 2, 2, 14, 5, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    with torch.inference_mode():
        out = model.model.visual(cells.reshape(-1, 1176), grid_thw=torch.tensor([[3, 4, 10]]))
    places = [row * 10 + column for row, column in published_order(4, 10)]
    reference = torch.empty(3, 40, 1280)
    reference[:, places] = out.last_hidden_state.view(3, 40, 1280)
    ours = teacher.encode(frames.view(3, 2, 3, 56, 140)).grid
    assert worst(ours, reference.view(3, 4, 10, 1280)) <= TOLERANCE
    exchanged = teacher.encode(frames.view(3, 2, 3, 56, 140).flip(1)).grid
    assert worst(exchanged, ours) > 100 * TOLERANCE


def test_patches_equal_the_image_processors_bit_for_bit(
    noise: torch.Generator, tiny_teacher_folder: Path
) -> None:
    """Trap 5: normalization rounds as transformers' does; only the order of the patches is ours."""
    from transformers import Qwen2VLImageProcessor

    teacher = load_teacher("qwen2.5-vl", str(tiny_teacher_folder), device="cpu", dtype="float32")
    assert isinstance(teacher, QwenVLTeacher)
    image = random_pixels(noise, 3, 140, 84)
    processor = Qwen2VLImageProcessor.from_pretrained(tiny_teacher_folder)
    theirs = processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
    merge_order = theirs.view(5, 3, 2, 2, 1176).permute(0, 2, 1, 3, 4).reshape(60, 1176)
    ours = patchify(normalize(image[None], teacher.mean, teacher.std), 14, 2)[0]
    assert torch.equal(ours, merge_order)
    assert not torch.equal(ours, theirs)
