"""Stored teacher grids carried to the student's cells, with the geometry of the view that the student sees.

`B` samples; the student's map has `h × w` cells, the stored grid `g × g` tokens of width `D`. A cell's target is
the mean over sample points inside it of the bilinearly interpolated grid: with as many points a side as tokens
fall into a cell, whole-number ratios give the exact mean of the tokens, equal sizes the tokens themselves.
Points outside the source image, or outside the teacher's view, do not count; `weight` gives the share that does.

The mean is linear in the tokens, so a view becomes a matrix of weights. It is made on the host, where the view is known,
and multiplied with the grid on the device. Crops, flips and resizes treat the axes separately (`axis_parallel_weights`:
`rows · grid · columnsᵀ`, two matrices of a few kB); a view that rotates or shears needs weights over all tokens for each
cell (`rotated_weights`). Both exist because the first is what nearly every training uses: for 64 samples, 16 × 16 tokens
and 16 × 16 cells on one core, 1.1 ms and 0.13 MB to copy instead of 44 ms and 17 MB. YOLO's mosaics put several images
into one view, with perspective; `train.yolo.targets` looks points up one by one for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from imaging.geometry import View, resize_view

Matrices = NDArray[np.float64]

#: Tensors by name: `weight` float32 [B, h, w] as in `Transported`, and either `rows` [B, h, g] with `columns` [B, w, g]
#: or `tokens` [B, h·w, g·g]. B is 1 where all samples have the same.
TransportWeights = Mapping[str, Tensor]


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
    # Data sets have few distinct sizes; each is resolved once.
    distinct, index = np.unique(np.asarray(sizes).reshape(-1, 2), axis=0, return_inverse=True)
    views = [resize_view(policy, (int(width), int(height)), view_size).matrix for width, height in distinct]
    return np.stack(views)[index.reshape(-1)]


def relate_views(student: Matrices, teacher: Matrices) -> Geometry:
    """Student view → teacher view, `inverse(teacher) ∘ student`, for each pair of matrices [B, 2, 3]."""
    inverse = np.linalg.inv(teacher[:, :, :2])
    linear = inverse @ student[:, :, :2]
    offset = inverse @ (student[:, :, 2:] - teacher[:, :, 2:])
    return Geometry(np.concatenate([linear, offset], axis=2), student)


def mirrored_views(views: Matrices, flipped: NDArray[np.bool_]) -> Matrices:
    """The views [B, 2, 3], those of `flipped` samples mirrored left to right: what a flipped image's features show."""
    mirrored = views.copy()
    mirrored[:, :, 2] += mirrored[:, :, 0]  # view ∘ (x → 1 − x)
    mirrored[:, :, 0] *= -1
    return np.where(flipped[:, None, None], mirrored, views)


def transport_weights(
    geometry: Geometry | None, height: int, width: int, tokens: tuple[int, int]
) -> TransportWeights:
    """How grids of `tokens` (rows, columns) are carried to `height` × `width` cells; tensors on the host.

    `geometry` None: the student sees exactly what the teacher saw.
    """
    if geometry is None:
        identity = np.eye(2, 3)[None]
        geometry = Geometry(identity, identity)
    rotates = any(matrix[:, [0, 1], [1, 0]].any() for matrix in geometry)
    return (rotated_weights if rotates else axis_parallel_weights)(geometry, height, width, tokens)


def apply_transport(grid: Tensor, weights: TransportWeights) -> Transported:
    """Carry `grid` [B, g, g, D] (any float type) on the device of both."""
    values, weight = grid.float(), weights["weight"].expand(len(grid), -1, -1)
    if "tokens" in weights:
        cells = torch.matmul(weights["tokens"], values.flatten(1, 2))
        return Transported(cells.unflatten(1, weight.shape[1:]), weight)  # type: ignore[no-untyped-call]
    tall = torch.matmul(weights["rows"], values.flatten(2)).unflatten(2, values.shape[2:])  # type: ignore[no-untyped-call]
    return Transported(torch.matmul(weights["columns"].unsqueeze(1), tall), weight)


def axis_parallel_weights(
    geometry: Geometry, height: int, width: int, tokens: tuple[int, int]
) -> TransportWeights:
    """Crops, flips and resizes: one small matrix per axis and sample."""
    rows, row_share = axis_weights(geometry, axis=1, cells=height, tokens=tokens[0])
    columns, column_share = axis_weights(geometry, axis=0, cells=width, tokens=tokens[1])
    return {
        "rows": rows,
        "columns": columns,
        "weight": row_share.unsqueeze(2) * column_share.unsqueeze(1),
    }


def axis_weights(geometry: Geometry, *, axis: int, cells: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Weights [B, cells, tokens] (each row sums to 1, or 0 outside) and the share inside [B, cells]."""
    points = cell_points(cells, tokens)
    teacher, source = (matrix[:, axis, axis, None] * points + matrix[:, axis, 2, None] for matrix in geometry)
    seen = is_inside(teacher) & is_inside(source)
    hats = hat_weights(teacher, tokens) * content_tokens(geometry, axis, tokens)[:, None, :] * seen[..., None]
    by_cell = hats.reshape(len(hats), cells, -1, tokens).sum(axis=2)
    share = seen.reshape(len(seen), cells, -1).mean(axis=2)
    return normalize_weights(by_cell, share)


def rotated_weights(geometry: Geometry, height: int, width: int, tokens: tuple[int, int]) -> TransportWeights:
    """Any affine view: weights over all tokens for each cell.

    A point's weights are the outer product of its row and its column weights. Summed over the points of a cell, that is
    one matrix product per cell and sample: `downᵀ [tokens_y, points] · across [points, tokens_x]`.
    """
    tokens_y, tokens_x = tokens
    points = np.stack(np.meshgrid(cell_points(width, tokens_x), cell_points(height, tokens_y)), axis=-1)
    teacher, source = (
        np.einsum("yxc,bkc->byxk", points, matrix[:, :, :2]) + matrix[:, None, None, :, 2]
        for matrix in geometry
    )
    seen = np.all(is_inside(teacher) & is_inside(source), axis=-1)
    across = hat_weights(teacher[..., 0], tokens_x) * content_tokens(geometry, 0, tokens_x)[:, None, None, :]
    down = hat_weights(teacher[..., 1], tokens_y) * content_tokens(geometry, 1, tokens_y)[:, None, None, :]
    batch, tall, wide = len(teacher), points.shape[0] // height, points.shape[1] // width

    def by_cell(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[B, h·tall, w·wide, tokens] → [B, h·w, tall·wide, tokens]: the points of each cell together."""
        apart = values.reshape(batch, height, tall, width, wide, -1)
        return apart.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * width, tall * wide, -1)

    products = np.matmul(by_cell(down * seen[..., None]).swapaxes(-1, -2), by_cell(across))
    share = by_cell(seen[..., None].astype(np.float64)).mean(axis=(2, 3))
    weights, weight = normalize_weights(products.reshape(batch, height * width, -1), share)
    return {"tokens": weights, "weight": weight.reshape(batch, height, width)}


def cell_points(cells: int, tokens: int) -> NDArray[np.float64]:
    """Sample points along one axis of the student's view, `ceil(tokens / cells)` in each cell, float64 [points]."""
    count = cells * max(1, -(-tokens // cells))
    return (np.arange(count) + 0.5) / count


def hat_weights(position: NDArray[np.float64], tokens: int) -> NDArray[np.float64]:
    """Linear interpolation between token centers, [...] in [0, 1] → [..., tokens]; flat beyond the outer ones."""
    place = np.clip(position * tokens - 0.5, 0, tokens - 1)
    return np.maximum(0.0, 1.0 - np.abs(place[..., None] - np.arange(tokens)))


def content_tokens(geometry: Geometry, axis: int, tokens: int) -> NDArray[np.float64]:
    """[B, tokens]: 1 where a token's center shows the image, 0 where it shows letterbox padding."""
    # The teacher's view never rotates: source = slope · teacher + start for each axis separately.
    teacher, source = geometry
    to_source = source[:, :, :2] @ np.linalg.inv(teacher[:, :, :2])
    start = source[:, :, 2] - np.einsum("bij,bj->bi", to_source, teacher[:, :, 2])
    centers = (np.arange(tokens) + 0.5) / tokens
    return is_inside(to_source[:, axis, axis, None] * centers + start[:, axis, None]).astype(np.float64)


def is_inside(position: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Within [0, 1], with a tolerance for rounding: a view's own border belongs to it."""
    return (position >= -1e-9) & (position <= 1 + 1e-9)


def normalize_weights(weights: NDArray[np.float64], share: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Rows that sum to 1, as float32; a cell without any token gets weight 0."""
    total = weights.sum(axis=-1)
    rows = weights / np.where(total > 0, total, 1.0)[..., None]
    share = np.where(total > 0, share, 0.0)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(share.astype(np.float32))


def region_mean(transported: Transported) -> tuple[Tensor, Tensor]:
    """The mean over the view's region: float32 [B, D], and [B] how much of the view the teacher saw."""
    weight = transported.weight.flatten(1)
    total = weight.sum(1)
    cells = transported.cells.flatten(1, 2)
    mean = torch.bmm(weight.unsqueeze(1), cells).squeeze(1) / total.clamp_min(1e-12).unsqueeze(1)
    return mean, total / weight.shape[1]
