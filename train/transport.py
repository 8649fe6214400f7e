"""Stored teacher grids carried to the student's cells, with the geometry of the view that the student sees.

`B` samples; the student's map has `h × w` cells, the stored grid `g × g` tokens of width `D`. A cell's target is
the mean over sample points inside it of the bilinearly interpolated grid: with as many points a side as tokens
fall into a cell, whole-number ratios give the exact mean of the tokens, equal sizes the tokens themselves.
Points outside the source image, or outside the teacher's view, do not count; `weight` says how many did.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from imaging.geometry import View, resize_view

Matrices = NDArray[np.float64]


class Transported(NamedTuple):
    """`cells` float32 [B, h, w, D]; `weight` float32 [B, h, w]: the share of each cell that the teacher saw."""

    cells: Tensor
    weight: Tensor


class Geometry(NamedTuple):
    """Affine maps float64 [B, 2, 3] of student-view points: into the teacher's view, and into the source image."""

    to_teacher: Matrices
    to_source: Matrices


def resize_matrices(policy: str, sizes: ArrayLike, view_size: int) -> Matrices:
    """`imaging.geometry.resize_view` for many images: sizes [N, 2] (width, height) → [N, 2, 3]."""
    if policy == "squash":
        return np.tile(View.identity().matrix, (len(np.atleast_2d(sizes)), 1, 1))
    # Data sets have few distinct sizes, each of which is asked for once.
    distinct, index = np.unique(np.asarray(sizes).reshape(-1, 2), axis=0, return_inverse=True)
    views = [resize_view(policy, (int(width), int(height)), view_size).matrix for width, height in distinct]
    return np.stack(views)[index.reshape(-1)]


def relate_views(student: Matrices, teacher: Matrices) -> Geometry:
    """Student view → teacher view, `inverse(teacher) ∘ student`, for each pair of matrices [B, 2, 3]."""
    inverse = np.linalg.inv(teacher[:, :, :2])
    linear = inverse @ student[:, :, :2]
    offset = inverse @ (student[:, :, 2:] - teacher[:, :, 2:])
    return Geometry(np.concatenate([linear, offset], axis=2), student)


def transport_grid(grid: Tensor, geometry: Geometry | None, height: int, width: int) -> Transported:
    """Carry `grid` [B, g, g, D] (any float type) to the student's `height` × `width` cells.

    `geometry` None: the student sees exactly what the teacher saw.
    """
    if geometry is None:
        identity = np.broadcast_to(np.eye(2, 3), (len(grid), 2, 3))
        geometry = Geometry(identity, identity)
    if is_axis_parallel(geometry):
        return transport_axes(grid, geometry, height, width)
    return transport_points(grid, geometry, height, width)


def is_axis_parallel(geometry: Geometry) -> bool:
    """True when no view turns or shears: both axes can then be treated on their own."""
    off_diagonal = [matrix[:, [0, 1], [1, 0]] for matrix in geometry]
    return not any(values.any() for values in off_diagonal)


def transport_axes(grid: Tensor, geometry: Geometry, height: int, width: int) -> Transported:
    """Crops, flips and resizes: one small matrix per axis and sample."""
    rows, row_share = axis_weights(geometry, axis=1, cells=height, tokens=grid.shape[1], like=grid)
    columns, column_share = axis_weights(geometry, axis=0, cells=width, tokens=grid.shape[2], like=grid)
    tall = torch.einsum("bhi,bijd->bhjd", rows, grid.float())
    cells = torch.matmul(columns.unsqueeze(1), tall)
    return Transported(cells, row_share.unsqueeze(2) * column_share.unsqueeze(1))


def axis_weights(
    geometry: Geometry, *, axis: int, cells: int, tokens: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights [B, cells, tokens] (each row sums to 1, or 0 outside) and the share inside [B, cells]."""
    points = cell_points(cells, tokens)
    teacher, source = (matrix[:, axis, axis, None] * points + matrix[:, axis, 2, None] for matrix in geometry)
    seen = is_inside(teacher) & is_inside(source)
    hats = hat_weights(teacher, tokens) * content_tokens(geometry, axis, tokens)[:, None, :] * seen[..., None]
    by_cell = hats.reshape(len(hats), cells, -1, tokens).sum(axis=2)
    share = seen.reshape(len(seen), cells, -1).mean(axis=2)
    return normalise_weights(by_cell, share, like)


def transport_points(grid: Tensor, geometry: Geometry, height: int, width: int) -> Transported:
    """Any affine view: weights over all tokens for each cell, then one batched matrix product."""
    tokens_y, tokens_x = grid.shape[1:3]
    points = np.stack(np.meshgrid(cell_points(width, tokens_x), cell_points(height, tokens_y)), axis=-1)
    teacher, source = (
        np.einsum("yxc,bkc->byxk", points, matrix[:, :, :2]) + matrix[:, None, None, :, 2]
        for matrix in geometry
    )
    seen = np.all(is_inside(teacher) & is_inside(source), axis=-1)
    across = hat_weights(teacher[..., 0], tokens_x) * content_tokens(geometry, 0, tokens_x)[:, None, None, :]
    down = hat_weights(teacher[..., 1], tokens_y) * content_tokens(geometry, 1, tokens_y)[:, None, None, :]
    split = (len(grid), height, points.shape[0] // height, width, points.shape[1] // width)
    by_cell = np.einsum(
        "bhswti,bhswtj->bhwij",
        (down * seen[..., None]).reshape(*split, tokens_y),
        across.reshape(*split, tokens_x),
        optimize=True,
    ).reshape(len(grid), height * width, -1)
    share = seen.reshape(split).mean(axis=(2, 4)).reshape(len(grid), -1)
    weights, weight = normalise_weights(by_cell, share, grid)
    cells = torch.bmm(weights, grid.float().flatten(1, 2))
    shape = (len(grid), height, width)
    return Transported(cells.reshape(*shape, -1), weight.reshape(shape))


def cell_points(cells: int, tokens: int) -> NDArray[np.float64]:
    """Sample points along one axis of the student's view, `ceil(tokens / cells)` in each cell, float64 [points]."""
    count = cells * max(1, -(-tokens // cells))
    return (np.arange(count) + 0.5) / count


def hat_weights(position: NDArray[np.float64], tokens: int) -> NDArray[np.float64]:
    """Linear interpolation between token centres, [...] in [0, 1] → [..., tokens]; flat beyond the outer ones."""
    place = np.clip(position * tokens - 0.5, 0, tokens - 1)
    return np.maximum(0.0, 1.0 - np.abs(place[..., None] - np.arange(tokens)))


def content_tokens(geometry: Geometry, axis: int, tokens: int) -> NDArray[np.float64]:
    """[B, tokens]: 1 where a token's centre shows the image, 0 where it shows letterbox padding."""
    # The teacher's view never turns: source = slope · teacher + start along each axis on its own.
    teacher, source = geometry
    to_source = source[:, :, :2] @ np.linalg.inv(teacher[:, :, :2])
    start = source[:, :, 2] - np.einsum("bij,bj->bi", to_source, teacher[:, :, 2])
    centres = (np.arange(tokens) + 0.5) / tokens
    return is_inside(to_source[:, axis, axis, None] * centres + start[:, axis, None]).astype(np.float64)


def is_inside(position: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Within [0, 1], forgiving rounding: a view's own border belongs to it."""
    return (position >= -1e-9) & (position <= 1 + 1e-9)


def normalise_weights(
    weights: NDArray[np.float64], share: NDArray[np.float64], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows that sum to 1, as float32 on the grid's device; a cell without any token gets weight 0."""
    total = weights.sum(axis=-1)
    share = np.where(total > 0, share, 0.0)
    rows = weights / np.where(total > 0, total, 1.0)[..., None]
    return as_float32(rows, like), as_float32(share, like)


def as_float32(values: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(like.device, non_blocking=True)


def region_mean(transported: Transported) -> tuple[Tensor, Tensor]:
    """The mean over the view's region: float32 [B, D], and [B] how much of the view the teacher saw."""
    weight = transported.weight.flatten(1)
    total = weight.sum(1)
    cells = transported.cells.flatten(1, 2)
    mean = torch.bmm(weight.unsqueeze(1), cells).squeeze(1) / total.clamp_min(1e-12).unsqueeze(1)
    return mean, total / weight.shape[1]
