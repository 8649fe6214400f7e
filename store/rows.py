"""Rows on their way into a store: checked, scaled to float16, and bad ones marked invalid.

Every error in a block is found here, before a byte is written.

float16 has a power-of-two scale per channel: stored = true / scale, exactly undone by a product. A few channels of
Qwen's vision tower reach far beyond float16. A power of two shifts the exponent and changes no digit, so the relative
error stays at most 2^-11 (float16's rounding) for every stored value of at least 2^-14 (its smallest normal number),
that is 2^-29 of 2^15, the scaled maximum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.errors import StoreError
from store.format import OWN_ARRAYS, REASONS, VALID, ArraySpec, ragged_groups
from store.job import Job

Values = np.ndarray | Sequence[Any]
FLOAT16_INFINITY = 0x7C00  # the bits of +inf; those of NaN are larger; the sign is the bit above
FLOAT16_MINUS_INFINITY = 0xFC00
CACHED = 64 * 1024  # values that stay in the processor's cache between two passes
NO_BYTES = np.empty(0, np.uint8)


@dataclass
class Block:
    """Rows ready to be written. fixed: name → [b, ...]; ragged: name → list of b arrays."""

    rows: int
    fixed: dict[str, np.ndarray]
    ragged: dict[str, list[np.ndarray]]

    def part(self, start: int, stop: int) -> Block:
        return Block(
            stop - start,
            {name: array[start:stop] for name, array in self.fixed.items()},
            {name: entries[start:stop] for name, entries in self.ragged.items()},
        )


def prepare_block(
    job: Job,
    arrays: Mapping[str, Values],
    valid: np.ndarray | None,
    reasons: Sequence[str] | None,
    stored: bool | Collection[str],
    finite: Collection[str] = (),
) -> Block:
    """Check a block and bring it into stored form; arguments as of `StoreWriter.append`.

    Raises StoreError for what does not fit.
    """
    specs = {spec.name: spec for spec in job.arrays if spec.name not in OWN_ARRAYS}
    check_names(specs, arrays)
    rows = len(next(iter(arrays.values()))) if arrays else len(valid if valid is not None else ())
    flags = np.ones(rows, dtype=bool) if valid is None else np.array(valid, dtype=bool)
    texts = list(reasons) if reasons is not None else [""] * rows
    if flags.shape != (rows,) or len(texts) != rows:
        raise StoreError(f"append: {rows} rows, but valid has shape {flags.shape} and {len(texts)} reasons")
    fixed: dict[str, np.ndarray] = {}
    ragged: dict[str, list[np.ndarray]] = {}
    for name, spec in specs.items():
        as_it_is = stored if isinstance(stored, bool) else name in stored
        if spec.ragged:
            ragged[name] = check_ragged(spec, arrays[name], rows, job, as_it_is)
        else:
            fixed[name] = check_fixed(spec, arrays[name], rows, job, as_it_is)
    unknown = {name: spec for name, spec in specs.items() if name not in finite}
    mark_overflow(unknown, fixed, ragged, flags, texts)
    blank_invalid(specs, fixed, ragged, flags)
    if job.owns_rows:
        fixed[VALID] = flags
        ragged[REASONS] = [np.frombuffer(text.encode(), np.uint8) if text else NO_BYTES for text in texts]
    check_lengths(job, ragged)
    return Block(rows, fixed, ragged)


def check_names(specs: Mapping[str, ArraySpec], arrays: Mapping[str, Values]) -> None:
    missing, unknown = sorted(set(specs) - set(arrays)), sorted(set(arrays) - set(specs))
    if missing or unknown:
        raise StoreError(
            f"append: missing arrays {missing}, unknown arrays {unknown}; expected {sorted(specs)}"
        )


def check_fixed(spec: ArraySpec, values: Values, rows: int, job: Job, stored: bool) -> np.ndarray:
    """[b, ...] in the stored dtype, C-contiguous."""
    array = np.asarray(values)
    if array.shape != (rows, *spec.row_shape):
        raise StoreError(f"append {spec.name}: shape {array.shape}, expected {(rows, *spec.row_shape)}")
    return in_stored_dtype(spec, array, job, stored)


def check_ragged(spec: ArraySpec, values: Values, rows: int, job: Job, stored: bool) -> list[np.ndarray]:
    """b arrays [n, ...] in the stored dtype."""
    if len(values) != rows:
        raise StoreError(f"append {spec.name}: {len(values)} entries, expected one for each of {rows} rows")
    entries = []
    for entry in values:
        array = np.frombuffer(entry, np.uint8) if isinstance(entry, bytes) else np.asarray(entry)
        if array.size == 0:
            array = array.reshape(0, *spec.row_shape)
        if array.shape[1:] != spec.row_shape:
            raise StoreError(
                f"append {spec.name}: entry shape {array.shape}, expected (n, *{spec.row_shape})"
            )
        entries.append(in_stored_dtype(spec, array, job, stored))
    return entries


def in_stored_dtype(spec: ArraySpec, array: np.ndarray, job: Job, stored: bool) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    scale = None if stored else job.scale_of(spec.name)
    if scale is not None or dtype == np.float16:
        return to_stored(array, scale, dtype)
    if array.size and not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise StoreError(f"append {spec.name}: dtype {array.dtype}, expected {dtype}")
    return np.ascontiguousarray(array, dtype=dtype)


def is_feature(spec: ArraySpec) -> bool:
    return np.dtype(spec.dtype).kind == "f" and (spec.scaled or spec.name.startswith(("features/", "views/")))


def mark_overflow(
    specs: Mapping[str, ArraySpec],
    fixed: Mapping[str, np.ndarray],
    ragged: Mapping[str, list[np.ndarray]],
    flags: np.ndarray,
    texts: list[str],
) -> None:
    """Make rows invalid whose float values are not finite in stored form."""
    for name, spec in specs.items():
        if np.dtype(spec.dtype).kind != "f" or (not spec.ragged and all_finite(fixed[name])):
            continue
        entries = ragged[name] if spec.ragged else list(fixed[name])
        for row in np.flatnonzero(flags).tolist():
            bad = ~np.isfinite(entries[row])
            if not bad.any():
                continue
            if not is_feature(spec):
                raise StoreError(f"append {name}: row {row} of the block is not finite")
            channel = int(np.argwhere(bad)[0][-1])
            flags[row] = False
            texts[row] = f"{name}: channel {channel} is not finite or too large for float16 at its scale"


def all_finite(array: np.ndarray) -> bool:
    """Like `np.isfinite(array).all()`, many times as fast for float16, whose isfinite numpy does one by one."""
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    signed, bits = (np.ascontiguousarray(array).reshape(-1).view(kind) for kind in (np.int16, np.uint16))
    return all(
        signed[start : start + CACHED].max() < FLOAT16_INFINITY
        and bits[start : start + CACHED].max() < FLOAT16_MINUS_INFINITY
        for start in range(0, len(bits), CACHED)
    )


def blank_invalid(
    specs: Mapping[str, ArraySpec],
    fixed: dict[str, np.ndarray],
    ragged: dict[str, list[np.ndarray]],
    flags: np.ndarray,
) -> None:
    """NaN for the features of invalid rows."""
    if flags.all():
        return
    for name, spec in specs.items():
        if not is_feature(spec):
            continue
        if spec.ragged:
            ragged[name] = [
                entry if ok else np.full_like(entry, np.nan)
                for entry, ok in zip(ragged[name], flags, strict=True)
            ]
        else:
            fixed[name] = fixed[name].copy()
            fixed[name][~flags] = np.nan


def check_lengths(job: Job, ragged: Mapping[str, list[np.ndarray]]) -> None:
    """Ragged arrays that share offsets have equal lengths, row by row."""
    for specs in ragged_groups(job.arrays).values():
        lengths = [list(map(len, ragged[spec.name])) for spec in specs]
        if any(other != lengths[0] for other in lengths[1:]):
            raise StoreError(f"append: {[spec.name for spec in specs]} differ in entries of a row")


# -- the scale of a channel ----------------------------------------------------------------------------------------

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
