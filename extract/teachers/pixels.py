"""From what the caller has (PIL images or uint8 tensors) to uint8 pixels, and from grids to pooled vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as PILImage
from torch import Tensor

from extract.decode.sample import resize_pixels
from extract.teachers.base import TeacherError
from imaging.decode import Decoded
from imaging.geometry import RESIZE_POLICIES, ResizePolicy, View, resize_view

if TYPE_CHECKING:
    from extract.teachers.base import Teacher


def as_pixels(
    images: Sequence[PILImage] | Tensor, inside: Tensor | None, teacher: Teacher
) -> tuple[Tensor, Tensor | None]:
    """uint8 [B, 3, H, W] (or [B, 2, 3, H, W] frame pairs) and the weights of the grid cells.

    Raises:
        TeacherError: for another dtype or shape, or an empty batch.
    """
    if not isinstance(images, Tensor):
        return resize_images(images, teacher)
    if images.dtype != torch.uint8 or images.dim() not in (4, 5) or images.shape[-3] != 3:
        raise TeacherError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 [B, 3, H, W], or a list of PIL images"
        )
    if len(images) == 0:
        raise TeacherError("an empty batch cannot be encoded")
    return images, inside


def resize_images(images: Sequence[PILImage], teacher: Teacher) -> tuple[Tensor, Tensor | None]:
    """PIL images, resized by the teacher's preprocessing, and which of their cells show the image.

    They are taken as they are: apply EXIF orientation and alpha before (`imaging.decode.decode_image` does).
    """
    if not images:
        raise TeacherError("an empty batch cannot be encoded")
    if not all(isinstance(image, PILImage) for image in images):
        kinds = sorted({type(image).__name__ for image in images})
        raise TeacherError(
            f"images are a list of {', '.join(kinds)}: expected PIL images, or uint8 [B, 3, H, W]"
        )
    wanted = teacher.preprocessing
    size, policy = wanted.image_size, wanted.resize
    arrays = [
        resize_pixels(Decoded(image.convert("RGB"), image.size), size, policy, wanted.interpolation)
        for image in images
    ]
    pixels = torch.from_numpy(np.stack(arrays))
    if policy != "letterbox":
        return pixels, None
    h, w = teacher.grid_size(size, size)
    views = [resize_view(policy, image.size, size) for image in images]
    return pixels, torch.from_numpy(np.stack([cells_inside(view, h, w) for view in views]))


def cells_inside(view: View, h: int, w: int) -> NDArray[np.float32]:
    """float32 [h, w]: the share of each grid cell that shows the image and not padding; the view must not rotate."""
    corners = view.inverse().apply([[0.0, 0.0], [1.0, 1.0]])
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    share = axis_share(top, bottom, h)[:, None] * axis_share(left, right, w)[None, :]
    return share.astype(np.float32)


def axis_share(low: float, high: float, cells: int) -> NDArray[np.float64]:
    """The share of each of `cells` equal parts of [0, 1] that is inside [low, high]."""
    edges = np.linspace(0.0, 1.0, cells + 1)
    share: NDArray[np.float64] = (
        np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0.0, None) * cells
    )
    return share


def as_resize_policy(name: str) -> ResizePolicy:
    """`name` if it is a resize policy.

    Raises:
        TeacherError: otherwise.
    """
    for policy in get_args(ResizePolicy):
        if policy == name:
            return cast(ResizePolicy, policy)
    raise TeacherError(f"unknown resize policy {name!r}: expected {', '.join(RESIZE_POLICIES)}")


def pooled_mean(grid: Tensor, inside: Tensor | None) -> Tensor:
    """Mean over the cells of grid [B, h, w, D], weighted by inside [B, h, w] where given: float32 [B, D].

    Raises:
        TeacherError: when the weights have another shape.
    """
    if inside is None:
        return grid.mean(dim=(1, 2))
    if inside.shape != grid.shape[:3]:
        raise TeacherError(f"inside has shape {list(inside.shape)}, the grid is {list(grid.shape[:3])}")
    weights = inside.to(grid.device, torch.float32, non_blocking=True)
    weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    return torch.einsum("bhwd,bhw->bd", grid, weights)


# -- on the device: uint8 pixels to Qwen's patches -------------------------------------------------------


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
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
