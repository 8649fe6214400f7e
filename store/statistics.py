"""Mean and standard deviation of every channel of an array, put together from its shards.

Each shard's part depends on that shard alone, so that it can be computed by whoever has the shard, at any time: after the
last row for a local store, before the shard leaves this machine for a store that is written to a bucket.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.arrays import RowArray
from store.shards import blocks

BLOCK_BYTES = 8 * 1024 * 1024  # four times as much in float64


@dataclass(frozen=True)
class Moments:
    """Of some vectors [D] in stored units: their number, mean [D] and summed squared deviation [D], float64."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def none(cls, width: int) -> Moments:
        return cls(0, np.zeros(width), np.zeros(width))

    def to_json(self) -> dict[str, Any]:
        """Exact to the last bit."""
        mean, squares = (
            base64.b64encode(values.astype("<f8").tobytes()).decode() for values in (self.mean, self.squares)
        )
        return {"count": self.count, "mean": mean, "squares": squares}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Moments:
        mean, squares = (
            np.frombuffer(base64.b64decode(values[name]), "<f8").astype(np.float64)
            for name in ("mean", "squares")
        )
        return cls(int(values["count"]), mean, squares)


def moments_of(array: RowArray, start: int, stop: int, valid: np.ndarray | None) -> Moments:
    """The moments of rows [start, stop) of an array.

    valid: bool [stop - start], which rows count; None for ragged arrays, whose invalid entries are NaN.
    Sums run in float64 around the first vector, so that a large mean costs no digits.
    """
    width = array.layout.row_shape[-1]
    shift, total, squares, count = np.zeros(width), np.zeros(width), np.zeros(width), 0
    for first, end in blocks(start, stop, array.layout.row_bytes, BLOCK_BYTES):
        rows = array.slice(first, end)
        if valid is not None:
            rows = rows[valid[first - start : end - start]]
        vectors = rows.reshape(-1, width).astype(np.float64)
        if valid is None:
            vectors = vectors[np.isfinite(vectors).all(axis=1)]
        if not len(vectors):
            continue
        if count == 0:
            shift = vectors[0].copy()
        vectors -= shift
        total += vectors.sum(axis=0)
        squares += np.einsum("nd,nd->d", vectors, vectors)
        count += len(vectors)
    if count == 0:
        return Moments.none(width)
    return Moments(count, total / count + shift, np.maximum(squares - total**2 / count, 0.0))


def combine(parts: Iterable[Moments], width: int) -> Moments:
    """The moments of all parts' vectors together, by Chan's formula; the order of the parts counts in the last bits."""
    known = [part for part in parts if part.count]
    count = sum(part.count for part in known)
    if not count:
        return Moments.none(width)
    origin = known[0].mean
    mean = sum((part.count / count * (part.mean - origin) for part in known), np.zeros(width))
    between = sum((part.count * (part.mean - origin - mean) ** 2 for part in known), np.zeros(width))
    within = sum((part.squares for part in known), np.zeros(width))
    return Moments(count, mean + origin, within + between)


def mean_and_std(moments: Moments, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [D] float32 in true units; 0 and 1 without any vector. scale: [D], None for 1."""
    if not moments.count:
        width = len(moments.mean)
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    factor = np.ones_like(moments.mean) if scale is None else scale.astype(np.float64)
    std = np.sqrt(moments.squares / moments.count) * factor
    return (moments.mean * factor).astype(np.float32), std.astype(np.float32)


def statistics_json(mean: np.ndarray, std: np.ndarray, count: int) -> dict[str, Any]:
    return {"mean": mean.astype(float).tolist(), "std": std.astype(float).tolist(), "count": count}
