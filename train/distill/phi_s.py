"""PHI-S: teacher features rotated and scaled so that every dimension has variance 1 and all errors count alike.

Ranzinger, Barker, Heinrich, Molchanov, Catanzaro, Tao: "PHI-S: Distribution Balancing for Label-Free Multi-Teacher
Distillation", 2024 (arXiv:2410.01680). With the covariance Σ = U Λ Uᵀ of a teacher's features, the target is

    y = (1/φ) · H · Uᵀ · (x − μ),    φ² = trace(Σ) / D,

where H is a Hadamard matrix, made orthonormal. Uᵀ turns the principal axes onto the dimensions; each dimension of H mixes
all of them in equal parts (|H_ij|² = 1/D), so that its variance is the mean of the eigenvalues. The whole map is a rotation
and one scale: an error of the student keeps its size relative to every other one, as it does not when each channel is
divided by its own deviation, and no direction counts more than another, as channels of large variance do without scaling.

`D` width of the features, `N` vectors.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from files.writing import replace_file
from store.reader import Split
from train.errors import TrainError

Floats = NDArray[np.float64]

#: Vectors that a covariance is taken from: of rows that are evenly spread over the split.
MOST_VECTORS = 1 << 18
BLOCK_BYTES = 16 << 20


def rotation_of(split: Split, array: str, folder: Path | None = None) -> NDArray[np.float32]:
    """The map (1/φ) H Uᵀ [D, D] of a feature array, for vectors in true units around their mean.

    folder: where it is kept once it is known: a resumed run must not depend on the last digits of an eigenvector.
    Raises TrainError for a width without a known Hadamard matrix, and for an array without valid rows.
    """
    file = None if folder is None else folder / f"{split.stored_name(array).replace('/', '-')}.npy"
    if file is not None and file.exists():
        kept: NDArray[np.float32] = np.load(file, allow_pickle=False)
        return kept
    found = rotate_and_scale(covariance_of(split, array)).astype(np.float32)
    if file is not None:
        buffer = io.BytesIO()
        np.save(buffer, found, allow_pickle=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, buffer.getvalue())
    return found


def rotate_and_scale(covariance: Floats) -> Floats:
    """(1/φ) H Uᵀ for a covariance [D, D]; zeros where nothing varies."""
    values, axes = np.linalg.eigh(covariance)
    axes = axes[:, ::-1]
    # An eigenvector's sign is arbitrary: the largest entry is made positive, so that equal data give equal targets.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(len(axes))])
    scale = np.sqrt(max(float(values.sum()) / len(values), 0.0))
    rotation = hadamard(len(covariance)) @ axes.T
    return rotation / scale if scale > 0 else np.zeros_like(rotation)


def covariance_of(split: Split, array: str) -> Floats:
    """Covariance [D, D] of an array's vectors in true units, in one pass over at most MOST_VECTORS of them.

    Vectors are centered at the mean of all (`Split.statistics`), as the targets are.
    """
    spec = split.specs[array]
    width = spec.row_shape[-1]
    mean = split.statistics[array].mean.astype(np.float64)
    rows = np.flatnonzero(split.valid_for(array))
    if not len(rows):
        raise TrainError(f"{split.where}: {array} has no valid rows to take a covariance from")
    total, count = np.zeros((width, width)), 0
    per_row = int(np.prod(spec.row_shape[:-1], dtype=np.int64))
    most = max(1, MOST_VECTORS // per_row)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64))]
    step = max(1, BLOCK_BYTES // (8 * width * per_row))
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        if spec.ragged:
            values = np.concatenate(split.ragged(some, array)).astype(np.float64) * split.scale[array]
        else:
            values = split.true_values(some, array).astype(np.float64)
        vectors = values.reshape(-1, width) - mean
        total += vectors.T @ vectors
        count += len(vectors)
    return total / count


# -- Hadamard matrices -------------------------------------------------------------------------------------------------
#
# A Hadamard matrix of order n has entries ±1 and orthogonal rows; n is 1, 2 or a multiple of 4. Orders are multiplied by the
# Kronecker product, so Sylvester's powers of two times one of Paley's two constructions (from a prime q: order q + 1 for
# q ≡ 3 mod 4, order 2 (q + 1) for q ≡ 1 mod 4) reach the widths of all common encoders: 384 = 32 · 12, 1152 = 32 · 36,
# 1280 = 64 · 20, 1536 = 128 · 12, 1792 = 64 · 28.


@cache
def hadamard(order: int) -> Floats:
    """A Hadamard matrix [D, D], made orthonormal: entries ±1/√D.

    Raises TrainError for an order that these constructions do not reach.
    """
    doublings, rest = 0, order
    while True:
        core = core_of(rest)
        if core is not None:
            break
        if rest % 2:
            raise TrainError(
                f"--standardize phi-s: no Hadamard matrix of order {order} (the teacher's width) is known here: use "
                "--standardize channel"
            )
        doublings, rest = doublings + 1, rest // 2
    matrix = core
    for _ in range(doublings):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(order)


def core_of(order: int) -> Floats | None:
    """A Hadamard matrix of this order that is not made by doubling; None where there is none here."""
    if order == 1:
        return np.ones((1, 1))
    if order % 4:
        return None
    if is_prime(order - 1) and (order - 1) % 4 == 3:
        return np.eye(order) + conference(order - 1)
    half = order // 2
    if is_prime(half - 1) and (half - 1) % 4 == 1:
        on_diagonal, elsewhere = np.array([[1.0, -1.0], [-1.0, -1.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
        return np.kron(conference(half - 1), elsewhere) + np.kron(np.eye(half), on_diagonal)
    return None


def conference(prime: int) -> Floats:
    """Paley's matrix [q + 1, q + 1]: 0 on the diagonal, ±1 elsewhere, C Cᵀ = q I.

    Symmetric for q ≡ 1 mod 4, skew-symmetric for q ≡ 3 mod 4.
    """
    squares = np.zeros(prime, dtype=bool)
    squares[np.arange(1, prime) ** 2 % prime] = True
    character = np.where(squares, 1.0, -1.0)
    character[0] = 0.0
    residues = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[1:, 1:] = character[(residues[:, None] - residues[None, :]) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0 if prime % 4 == 1 else -1.0
    return matrix


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
