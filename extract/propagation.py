"""Class probabilities of rows without a label, averaged over the rows whose features resemble theirs.

Zhou et al., "Learning with Local and Global Consistency", NeurIPS 2003, on the graph of Iscen et al., "Label Propagation
for Deep Semi-supervised Learning", CVPR 2019. A probe that is fitted on few labels knows little of where the other rows
lie; their neighbors tell: benchmarks/propagation.py measures what it adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from store.quality import nearest_rows, standardization, unit_rows

NEIGHBORS = 5
# The share that a row takes from its neighbors; the rest is its own label or the probe's answer.
SHARE = 0.8
ITERATIONS = 25  # SHARE ** 25 is 0.4 %
# Neighbors are looked for among so many rows: the time grows with its product with the number of rows.
GROUP_ROWS = 32_768
COLUMN_VALUES = 1 << 26  # probabilities that are averaged at once, which bounds the memory
LEAST = 1e-6

Floats = npt.NDArray[np.float32]


def neighbor_graph(
    rows: npt.NDArray[np.int64], read: Callable[[npt.NDArray[np.int64]], Floats], total: int, seed: int
) -> Any:
    """The rows' `NEIGHBORS` nearest by cosine similarity, both ways, as a normalized scipy.sparse CSR matrix [total, total].

    rows: which of the `total` rows; others have no neighbors. read: features float32 [n, D] of chosen rows, finite.
    Beyond `GROUP_ROWS` rows each finds its neighbors in a random group of them.
    """
    from scipy import sparse

    shuffled = np.random.default_rng(seed).permutation(rows)
    weights = sparse.csr_matrix((total, total), dtype=np.float32)
    for group in np.array_split(shuffled, -(-len(rows) // GROUP_ROWS)):
        group = np.sort(group)
        features = read(group)
        mean, std = standardization(features)
        unit = unit_rows((features - mean) / std)
        count = min(NEIGHBORS, len(group) - 1)
        if count < 1:
            continue
        nearest, similar = zip(*nearest_rows(unit, unit, count, itself=True), strict=True)
        values = np.maximum(np.concatenate(similar), 0.0).ravel() ** 3
        places = (np.repeat(group, count), group[np.concatenate(nearest).ravel()])
        weights += sparse.csr_matrix((values, places), shape=weights.shape)
    weights = weights + weights.T
    degrees = np.asarray(weights.sum(axis=1)).ravel()
    scale = sparse.diags_array(1 / np.sqrt(np.maximum(degrees, 1e-12)), dtype=np.float32)
    return (scale @ weights @ scale).tocsr()


def propagate(graph: Any, probabilities: Floats) -> Floats:
    """Probabilities [N, C], of which labeled rows' are 0 and 1, averaged along the graph; rows sum to 1."""
    result = np.empty_like(probabilities)
    step = max(1, COLUMN_VALUES // max(1, len(probabilities)))
    for first in range(0, probabilities.shape[1], step):
        own = probabilities[:, first : first + step]
        part = own
        for _ in range(ITERATIONS):
            part = SHARE * (graph @ part) + (1 - SHARE) * own
        result[:, first : first + step] = part
    result /= result.sum(axis=1, keepdims=True)
    return result


def log_probabilities(probabilities: Floats) -> Floats:
    """Logits whose softmax they are, finite."""
    return np.log(np.maximum(probabilities, LEAST)).astype(np.float32, copy=False)
