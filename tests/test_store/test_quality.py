"""k-NN, linear probe and folds, on real digits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits

from store import quality
from store.errors import StoreError
from store.quality import assign_folds, fit_probe, knn_accuracy, probe_accuracy


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data.astype(np.float32), data.target.astype(np.int32)


def test_accuracies_on_digits(digits: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = digits
    train, test = slice(0, 1200), slice(1200, None)
    assert knn_accuracy(features[train], labels[train], features[test], labels[test]) > 0.9
    assert probe_accuracy(features[train], labels[train], features[test], labels[test]) > 0.88


def test_accuracy_is_chance_on_shuffled_labels(digits: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = digits
    wrong = np.random.default_rng(0).permutation(labels)
    assert probe_accuracy(features[:1200], wrong[:1200], features[1200:], labels[1200:]) < 0.25
    assert knn_accuracy(features[:1200], wrong[:1200], features[1200:], labels[1200:]) < 0.25


def test_copies_share_a_fold_also_unlabeled_ones() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 100).repeat(2)
    groups, usable = np.arange(100).repeat(2), np.tile([True, False], 100)
    usable[-2:] = False  # a group without a labeled row has no fold
    fold = assign_folds(labels, usable, groups, 5, seed=0)
    assert (fold[::2] == fold[1::2]).all()
    assert set(fold[:-2]) == set(range(5))
    assert (fold[-2:] == -1).all()


def test_folds_spread_classes(digits: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = digits
    fold = assign_folds(labels, np.ones(len(labels), bool), None, 5, seed=0)
    for number in range(5):
        counts = np.bincount(labels[fold == number], minlength=10)
        assert counts.min() > 30


def test_unlabeled_and_bad_rows_are_left_out_and_unseen_classes_are_unlikely(
    digits: tuple[np.ndarray, np.ndarray],
) -> None:
    features, labels = digits[0][:300].copy(), digits[1][:300].copy()
    labels[:5], features[7] = -1, np.nan
    probe = fit_probe(features, labels, 12)
    assert probe.seen.tolist() == [True] * 10 + [False] * 2
    logits = probe.logits(digits[0][:300])
    assert np.isfinite(logits).all()
    assert (logits[:, 10:] < logits[:, :10].min(axis=1, keepdims=True) + 1e-6).all()


def test_two_classes() -> None:
    generator = np.random.default_rng(1)
    features = generator.standard_normal((100, 3)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int32)
    assert probe_accuracy(features[:60], labels[:60], features[60:], labels[60:]) > 0.85
    assert fit_probe(features, labels, 2).logits(features).shape == (100, 2)


def test_a_fit_that_does_not_converge_says_so_in_one_line(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quality, "MOST_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_probe(*digits, 10)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "probe: the fit ended before it converged (" in caplog.text


def test_nothing_labeled_is_an_error() -> None:
    features, labels = np.zeros((4, 2), np.float32), np.full(4, -1)
    with pytest.raises(StoreError, match="no labeled row with finite features in train"):
        knn_accuracy(features, labels, features, np.zeros(4, int))
