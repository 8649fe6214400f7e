"""The towers of Qwen3-VL and Qwen3.5 equal transformers' own, put into raster order by code that shares nothing with ours.

Every comparison has a negative: a mistake of the kind that it is there to find must fail it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from extract.teachers import load_teacher
from extract.teachers.pixels import normalize, patchify
from extract.teachers.qwen_config import FAMILIES
from extract.teachers.qwen_vl import QwenVLTeacher
from tests.test_extract.reference_tower import TOLERANCE, random_pixels, tower_outputs, worst

SIZES = {
    "square": (256, 256),
    "wide": (96, 384),
    "tall": (384, 96),
    "one merge cell": (32, 32),
    "more patches than learned positions": (64, 832),
}


@pytest.fixture(scope="module", params=["qwen3-vl", "qwen3.5"])
def pair(request: pytest.FixtureRequest, sharp_checkpoints: dict[str, Path]) -> tuple[QwenVLTeacher, Any]:
    """Our teacher and transformers' model of one checkpoint."""
    from transformers import AutoModelForImageTextToText

    folder = sharp_checkpoints[request.param]
    teacher = load_teacher(request.param, str(folder), device="cpu", dtype="float32", image_size=256)
    assert isinstance(teacher, QwenVLTeacher)
    return teacher, AutoModelForImageTextToText.from_pretrained(folder).eval().model.visual


def published_order(h: int, w: int) -> list[tuple[int, int]]:
    """(row, column) of each patch in the order of `visual(...).last_hidden_state`: blocks of 2 × 2, row by row."""
    return [
        (row + i, column + j)
        for row in range(0, h, 2)
        for column in range(0, w, 2)
        for i in (0, 1)
        for j in (0, 1)
    ]


def reference_outputs(visual: Any, images: list[Tensor]) -> tuple[list[Tensor], Any]:
    """transformers' features per image as [h, w, D] in raster order, and everything that its tower returns."""
    half = [0.5] * 3
    return tower_outputs(visual, images, published_order, patch_size=16, image_mean=half, image_std=half)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_features_equal_transformers(
    pair: tuple[QwenVLTeacher, Any], size: tuple[int, int], noise: torch.Generator
) -> None:
    teacher, visual = pair
    images = random_pixels(noise, 2, 3, *size)
    encoded = teacher.encode(images)
    grids, _ = reference_outputs(visual, list(images))
    assert encoded.grid.shape == (2, size[0] // 16, size[1] // 16, 288)
    assert worst(encoded.grid, torch.stack(grids)) <= TOLERANCE
    assert worst(encoded.pooled, torch.stack([grid.mean(dim=(0, 1)) for grid in grids])) <= TOLERANCE


def test_images_of_different_sizes(pair: tuple[QwenVLTeacher, Any], noise: torch.Generator) -> None:
    teacher, visual = pair
    sizes = [(128, 128), (64, 160), (160, 64), (128, 128), (32, 32)]
    images = [random_pixels(noise, 3, *size) for size in sizes]
    grids, _ = reference_outputs(visual, images)
    for image, grid in zip(images, grids, strict=True):
        assert worst(teacher.encode(image[None]).grid[0], grid) <= TOLERANCE


def test_our_grid_merges_to_what_transformers_puts_back_itself(
    pair: tuple[QwenVLTeacher, Any], noise: torch.Generator
) -> None:
    """`pooler_output` is in the raster order of merged cells: its merger on our 2 × 2 cells must give it."""
    teacher, visual = pair
    images = random_pixels(noise, 2, 3, 160, 288)
    grid = teacher.encode(images).grid
    cells = grid.reshape(2, 5, 2, 9, 2, 288).permute(0, 1, 3, 2, 4, 5).reshape(-1, 288)
    with torch.inference_mode():
        merged = visual.merger(cells)
    assert worst(merged, reference_outputs(visual, list(images))[1].pooler_output) <= TOLERANCE


def test_the_comparison_notices_wrong_order_positions_and_parts(
    pair: tuple[QwenVLTeacher, Any], noise: torch.Generator
) -> None:
    """The random weights are sharp enough: each mistake exceeds the tolerance by far."""
    teacher, visual = pair
    images = random_pixels(noise, 1, 3, 160, 288)
    (grid,), out = reference_outputs(visual, list(images))
    assert worst(teacher.encode(images).grid[0], grid) <= TOLERANCE
    assert worst(out.last_hidden_state.view(10, 18, 288), grid) > 1.0  # merge order, simply reshaped
    layout = teacher.layouts[10, 18]
    assert layout.positions is not None
    bias = teacher.tower.patch_embed.proj.bias
    assert bias is not None
    mistakes = {
        "rotary positions": {"cos": layout.cos.flip(0), "sin": layout.sin.flip(0)},
        "no learned positions": {"positions": torch.zeros_like(layout.positions)},
        "transposed learned positions": {
            "positions": layout.positions.view(10, 18, -1).transpose(0, 1).reshape(180, -1)
        },
        "no bias of the patch embedding": {"positions": layout.positions - bias},
    }
    for name, mistake in mistakes.items():
        wrong = QwenVLTeacher(teacher.tower, teacher.spec, teacher.preprocessing, max_pixels=1 << 24)
        wrong.layouts[10, 18] = layout._replace(**mistake)
        assert worst(wrong.encode(images).grid[0], grid) > 100 * TOLERANCE, name


def test_frame_pairs_equal_transformers_on_a_video(
    pair: tuple[QwenVLTeacher, Any], noise: torch.Generator
) -> None:
    teacher, visual = pair
    frames = random_pixels(noise, 6, 3, 64, 160)  # three temporal patches
    values = normalize(frames, teacher.mean, teacher.std)
    cells = values.reshape(3, 2, 3, 2, 2, 16, 5, 2, 16).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    with torch.inference_mode():
        out = visual(cells.reshape(-1, 1536), grid_thw=torch.tensor([[3, 4, 10]]))
    places = [row * 10 + column for row, column in published_order(4, 10)]
    reference = torch.empty(3, 40, 288)
    reference[:, places] = out.last_hidden_state.view(3, 40, 288)
    ours = teacher.encode(frames.view(3, 2, 3, 64, 160)).grid
    assert worst(ours, reference.view(3, 4, 10, 288)) <= TOLERANCE
    assert worst(teacher.encode(frames.view(3, 2, 3, 64, 160).flip(1)).grid, ours) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen3-vl", "qwen3.5"])
def test_patches_equal_the_familys_image_processor_bit_for_bit(
    family: str, noise: torch.Generator, sharp_checkpoints: dict[str, Path]
) -> None:
    from transformers import AutoImageProcessor

    teacher = load_teacher(family, str(sharp_checkpoints[family]), device="cpu", image_size=256)
    assert isinstance(teacher, QwenVLTeacher)
    image = random_pixels(noise, 3, 160, 96)
    processor = AutoImageProcessor.from_pretrained(sharp_checkpoints[family])
    theirs = processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
    merge_order = theirs.view(5, 3, 2, 2, 1536).permute(0, 2, 1, 3, 4).reshape(60, 1536)
    ours = patchify(normalize(image[None], teacher.mean, teacher.std), 16, 2)[0]
    assert torch.equal(ours, merge_order)
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "qwen3.5"])
def test_the_towers_values_are_those_of_transformers(family: str) -> None:
    """What config.json may leave out is the same in both."""
    from transformers import AutoConfig

    kind = FAMILIES[family]
    theirs = AutoConfig.for_model(kind.model_types[0]).vision_config
    for key in kind.keys:
        if key == "rope_theta":
            assert theirs.rope_parameters["rope_theta"] == kind.tower.rope_theta
        elif hasattr(theirs, key) and (family, key) not in {
            ("qwen2.5-vl", "hidden_size"),
            ("qwen2.5-vl", "depth"),
        }:
            got = getattr(theirs, key)
            assert (tuple(got) if isinstance(got, list | tuple) else got) == getattr(kind.tower, key), key


def test_a_saved_processor_is_understood(sharp_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 saves a whole processor in one file; its mean, std and pixel limit count."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    source = sharp_checkpoints["qwen3-vl"]
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    processor = json.loads((source / "preprocessor_config.json").read_text())
    processor |= {"image_mean": [0.1, 0.2, 0.3], "size": {"longest_edge": 300 * 300}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    teacher = load_teacher("qwen3-vl", str(folder), device="cpu", image_size=256)
    assert isinstance(teacher, QwenVLTeacher)
    assert (teacher.preprocessing.mean, teacher.max_pixels) == ((0.1, 0.2, 0.3), 90_000)
    (folder / "processor_config.json").unlink()
    teacher = load_teacher("qwen3-vl", str(folder), device="cpu", image_size=256)
    assert isinstance(teacher, QwenVLTeacher)
    assert (teacher.preprocessing.mean, teacher.max_pixels) == ((0.5, 0.5, 0.5), 4096 * 4096)
