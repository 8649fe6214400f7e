"""transformers' own vision towers on random images, put into raster order by code that shares nothing with ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4


def random_pixels(noise: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)


def tower_outputs(
    visual: Any, images: list[Tensor], order: Callable[[int, int], list[tuple[int, int]]], **processor: Any
) -> tuple[list[Tensor], Any]:
    """transformers' features per image as [h, w, D] in raster order, and everything that its tower returns.

    order: (row, column) of each patch of an h × w image in the order of `visual(...).last_hidden_state`.
    processor: options of its image processor.
    """
    from transformers import Qwen2VLImageProcessor

    processed = Qwen2VLImageProcessor(**processor)(images=images, do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        out = visual(processed["pixel_values"], grid_thw=processed["image_grid_thw"])
    grids, start = [], 0
    for _, h, w in processed["image_grid_thw"].tolist():
        grid = torch.full((h, w, out.last_hidden_state.shape[-1]), float("nan"))
        for place, (row, column) in enumerate(order(h, w)):
            grid[row, column] = out.last_hidden_state[start + place]
        grids.append(grid)
        start += h * w
    return grids, out


def worst(ours: Tensor, reference: Tensor) -> float:
    return (ours - reference).abs().max().item()
