"""float16 with a power-of-two scale per channel: stored = true / scale, exactly undone by a product.

A few channels of Qwen's vision tower reach far beyond float16. A power of two shifts the exponent and
changes no digit, so the relative error stays at most 2^-11 (float16's rounding) for every stored value
of at least 2^-14 (its smallest normal number), that is 2^-29 of 2^15, the scaled maximum.
"""

from __future__ import annotations

import numpy as np

# The calibration batch's largest value lands in (2^11, 2^12]: 16 times as much still fits below 65504.
CALIBRATED_EXPONENT = 12


def channel_scale(values: np.ndarray) -> np.ndarray:
    """Scale [D] float32 (powers of two) for features whose calibration batch is `values` [..., D].

    A channel is taken to be at least as large as the mean channel, so that one which happened to be
    silent in the calibration batch has room. Values that are not finite are left out.
    """
    flat = np.abs(values.reshape(-1, values.shape[-1]).astype(np.float64))
    largest = np.where(np.isfinite(flat), flat, 0.0).max(axis=0, initial=0.0)
    largest = np.maximum(largest, largest.mean())
    exponent = np.ceil(np.log2(np.where(largest > 0, largest, 2.0**CALIBRATED_EXPONENT)))
    exponent = np.clip(exponent - CALIBRATED_EXPONENT, -100, 100)
    scale: np.ndarray = np.exp2(exponent).astype(np.float32)
    return scale


def to_stored(values: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """values [..., D] / scale [D] in the stored dtype, C-contiguous. What does not fit becomes inf."""
    if scale is not None and not np.all(scale == 1):
        values = values.astype(np.float32, copy=False) * (1 / scale)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=dtype)
