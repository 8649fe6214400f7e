"""Channel statistics of stored features, block by block."""

from __future__ import annotations

import numpy as np

from store.location import RowArray

BLOCK_BYTES = 8 * 1024 * 1024  # four times as much in float64


def channel_statistics(
    array: RowArray, valid: RowArray | None, scale: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and std [D] float32 in true units over the vectors of valid rows, and their number.

    valid: the rows' flags; None for ragged arrays, whose invalid entries are NaN.
    Sums run in float64 around the first finite vector, so that a large mean costs no digits.
    Without any valid vector: mean 0, std 1.
    """
    width = array.layout.row_shape[-1]
    block = max(1, BLOCK_BYTES // max(1, array.layout.row_bytes))
    shift, total, squares, count = np.zeros(width), np.zeros(width), np.zeros(width), 0
    for start in range(0, len(array), block):
        rows = array.slice(start, start + block)
        if valid is not None:
            rows = rows[valid.slice(start, start + block)]
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
        return np.zeros(width, np.float32), np.ones(width, np.float32), 0
    factor = np.ones(width) if scale is None else scale.astype(np.float64)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return ((mean + shift) * factor).astype(np.float32), (std * factor).astype(np.float32), count
