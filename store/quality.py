"""How good stored features are: k-NN and linear-probe accuracy, and folds for a probe's logits.

All functions take plain arrays: features [N, D] in true units, labels [N] int with -1 for no label.
scikit-learn is imported here only.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.errors import StoreError
from store.format import NO_LABEL

KNN_NEIGHBORS = 20
KNN_TEMPERATURE = 0.07
QUERY_BLOCK = 1024
MISSING_CLASS_MARGIN = 10.0
MOST_ITERATIONS = 100

log = logging.getLogger(__name__)


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    neighbors: int = KNN_NEIGHBORS,
    temperature: float = KNN_TEMPERATURE,
    blocks: int = 1,
) -> float:
    """Top-1 accuracy (fraction) of a cosine k-NN vote weighted by exp(similarity / temperature).

    The protocol of Wu et al. 2018 (arXiv:1805.01978), as DINO uses it, on standardized features.
    Rows without a label are left out. blocks: see `standardization`. Raises StoreError when either side has none.
    """
    train, train_labels = labeled(train, train_labels, "train")
    test, test_labels = labeled(test, test_labels, "test")
    mean, std = standardization(train, blocks)
    bank = unit_rows((train - mean) / std)
    queries = unit_rows((test - mean) / std)
    classes = int(train_labels.max()) + 1
    k = min(neighbors, len(bank))
    right, start = 0, 0
    for nearest, similarity in nearest_rows(queries, bank, k):
        weights = np.exp((similarity - 1) / temperature)
        votes = np.zeros((len(nearest), classes), np.float32)
        for neighbor in range(k):
            np.add.at(
                votes,
                (np.arange(len(votes)), train_labels[nearest[:, neighbor]]),
                weights[:, neighbor],
            )
        right += int((votes.argmax(axis=1) == test_labels[start : start + len(votes)]).sum())
        start += len(votes)
    return right / len(queries)


def nearest_rows(
    queries: np.ndarray, bank: np.ndarray, count: int, *, itself: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The most similar rows of `bank` for blocks of `queries`, in their order: row numbers and cosine similarities [b, count].

    Both hold unit rows. itself: the queries are the bank, and no row is its own neighbor.
    """
    for start in range(0, len(queries), QUERY_BLOCK):
        similarity = queries[start : start + QUERY_BLOCK] @ bank.T
        if itself:
            own = np.arange(len(similarity))
            similarity[own, start + own] = -1.0
        # A copy: a view would keep all columns in memory.
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count].copy()
        yield nearest, np.take_along_axis(similarity, nearest, axis=1)


def probe_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    strength: float = 0.1,
) -> float:
    """Top-1 accuracy (fraction) of a linear probe fitted on train. See `fit_probe`."""
    test, test_labels = labeled(test, test_labels, "test")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    logits = fit_probe(train, train_labels, classes, strength=strength).logits(test)
    return float((logits.argmax(axis=1) == test_labels).mean())


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe: logits = (features - mean) / std @ weight.T + bias, weight [C, D]."""

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    seen: np.ndarray  # [C] bool: classes that had a training row

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[N, C] float32. A class never seen gets the row's smallest logit minus 10: unlikely, but finite."""
        logits: np.ndarray = ((features - self.mean) / self.std) @ self.weight.T + self.bias
        if not self.seen.all():
            logits[:, ~self.seen] = logits[:, self.seen].min(axis=1, keepdims=True) - MISSING_CLASS_MARGIN
        return logits.astype(np.float32, copy=False)


def fit_probe(
    features: np.ndarray, labels: np.ndarray, classes: int, *, strength: float = 0.1, blocks: int = 1
) -> Probe:
    """Multinomial logistic regression on standardized features of the labeled rows.

    strength: the inverse of the L2 penalty (scikit-learn's C). blocks: see `standardization`.
    Raises StoreError with no labeled row, or a label outside 0..classes-1.
    """
    features, labels = labeled(features, labels, "train")
    if labels.max() >= classes:
        raise StoreError(f"probe: label {int(labels.max())}, but only {classes} classes")
    mean, std = standardization(features, blocks)
    seen = np.zeros(classes, dtype=bool)
    present = np.unique(labels)
    seen[present] = True
    weight, bias = np.zeros((classes, features.shape[1]), np.float32), np.zeros(classes, np.float32)
    if len(present) > 1:
        weight[present], bias[present] = _fit((features - mean) / std, labels, strength)
    return Probe(mean, std, weight, bias, seen)


def assign_folds(
    labels: np.ndarray, usable: np.ndarray, groups: np.ndarray | None, folds: int, seed: int
) -> np.ndarray:
    """[N] int: the fold of each usable row; classes spread evenly, groups kept together.

    Other rows have the fold of the usable rows in their group, -1 without any.
    """
    units = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
    _, first = np.unique(units[usable], return_index=True)
    chosen = np.flatnonzero(usable)[first]  # one row stands for its group
    chosen = np.random.default_rng(seed).permutation(chosen)
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    number = np.full(units.max() + 1, -1)
    number[units[chosen]] = np.arange(len(chosen)) % min(folds, len(chosen))
    if len(chosen) < 2:
        raise StoreError("probe: all labeled rows are copies of one image; nothing to hold out")
    return np.asarray(number[units])


def labeled(features: np.ndarray, labels: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 features and labels of the rows that have a label and finite features."""
    keep = (labels != NO_LABEL) & np.isfinite(features).all(axis=1)
    if not keep.any():
        raise StoreError(f"probe: no labeled row with finite features in {what}")
    return features[keep].astype(np.float32), labels[keep].astype(np.int64)


def standardization(features: np.ndarray, blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [D] float32; a constant channel has std 1.

    blocks: of channels, of equal width. All have the deviations of the first: differences of what is in it keep their
    size, while with their own deviations small ones, which are mostly noise, would count as much as large ones.
    """
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    std = features.std(axis=0, dtype=np.float64).astype(np.float32)
    std = np.tile(std[: len(std) // blocks], blocks)
    return mean, np.where(std > 0, std, np.float32(1))


def unit_rows(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(norm, 1e-12)
    return unit


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight [P, D] and bias [P] for the P classes that are present, in ascending order."""
    from sklearn.linear_model import LogisticRegression

    # Newton's method: far faster than L-BFGS where there are more channels than images.
    model: Any = LogisticRegression(C=strength, solver="newton-cg", max_iter=MOST_ITERATIONS, tol=1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features, labels)
    if caught:
        log.warning(
            "probe: the fit ended before it converged (%s): the teacher's features may be slightly better than this "
            "accuracy",
            str(caught[0].message).splitlines()[0],
        )
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        weight, bias = model.coef_[0] / 2, model.intercept_[0] / 2
        return np.stack([-weight, weight]), np.array([-bias, bias])
    return model.coef_, model.intercept_
