"""Pixels to Qwen's patches on the device: the host sends uint8, a sixth of the bytes of normalized patches.

Shapes: `B` images, `T` frames of one temporal patch (2), `H W` pixels, `p` patch side, `h = H/p`, `w = W/p`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel / 255 − mean) / std in float32, rounded exactly as transformers' image processor rounds it.

    pixels: uint8 [..., 3, H, W]; mean, std: float32 [3, 1, 1], already multiplied by 255.
    """
    return pixels.to(torch.float32).sub_(mean).div_(std)


def patchify(pixels: Tensor, patch_size: int, frames: int) -> Tensor:
    """Cut [B, 3, H, W] (a still, repeated `frames` times) or [B, frames, 3, H, W] into patches in raster order.

    Returns [B, h·w, 3·frames·p·p]; inside a patch the order is channel, frame, row, column, as the weights of the
    patch embedding expect it. Unlike transformers' processor, patches are not grouped by 2×2 merge blocks.
    """
    if pixels.dim() == 4:
        pixels = pixels.unsqueeze(1).expand(-1, frames, -1, -1, -1)
    batch, _, channels, height, width = pixels.shape
    h, w = height // patch_size, width // patch_size
    cells = pixels.reshape(batch, frames, channels, h, patch_size, w, patch_size)
    return cells.permute(0, 3, 5, 2, 1, 4, 6).reshape(batch, h * w, channels * frames * patch_size**2)
