"""k-NN, linear probe and out-of-fold logits on real digits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits

from store import quality
from store.errors import StoreError
from store.quality import assign_folds, fit_probe, knn_accuracy, out_of_fold_logits, probe_accuracy


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


def test_out_of_fold_logits_never_saw_their_row() -> None:
    """Random labels cannot be learned, so out-of-fold logits must be at chance; in-fold ones would not be."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((200, 300)).astype(np.float32)
    labels = generator.integers(0, 4, 200)
    logits = out_of_fold_logits(features, labels, 4)
    assert (logits.argmax(1) == labels).mean() < 0.4
    assert (fit_probe(features, labels, 4).logits(features).argmax(1) == labels).mean() > 0.95


def test_copies_share_a_fold() -> None:
    generator = np.random.default_rng(0)
    once = generator.standard_normal((100, 300)).astype(np.float32)
    features, labels = np.repeat(once, 2, axis=0), np.repeat(generator.integers(0, 4, 100), 2)
    groups = np.repeat(np.arange(100), 2)
    logits = out_of_fold_logits(features, labels, 4, groups=groups)
    assert (logits.argmax(1) == labels).mean() < 0.45
    leaked = out_of_fold_logits(features, labels, 4)
    assert (leaked.argmax(1) == labels).mean() > 0.7


def test_folds_spread_classes(digits: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = digits
    fold = assign_folds(labels, np.ones(len(labels), bool), None, 5, seed=0)
    for number in range(5):
        counts = np.bincount(labels[fold == number], minlength=10)
        assert counts.min() > 30


def test_unlabelled_bad_and_rare_rows(digits: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = digits[0][:300].copy(), digits[1][:300].copy()
    labels[:5], features[7] = -1, np.nan
    labels[8] = 10  # the only sample of its class
    logits = out_of_fold_logits(features, labels, 12)
    assert np.isfinite(np.delete(logits, 7, axis=0)).all()
    assert np.isnan(logits[7]).all()
    assert logits[8].argmax() != 10  # its own fold had no sample of class 10
    assert (logits[:, 11] < logits[:, :10].min(axis=1) + 1e-6)[np.arange(300) != 7].all()


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


def test_nothing_labelled_is_an_error() -> None:
    features, labels = np.zeros((4, 2), np.float32), np.full(4, -1)
    with pytest.raises(StoreError, match="0 labelled rows"):
        out_of_fold_logits(features, labels, 2)
    with pytest.raises(StoreError, match="no labelled row with finite features in train"):
        knn_accuracy(features, labels, features, np.zeros(4, int))


def test_unlabeled_copies_are_judged_by_a_probe_that_did_not_see_the_labeled_one() -> None:
    generator = np.random.default_rng(0)
    once, labels = generator.standard_normal((100, 300)).astype(np.float32), generator.integers(0, 4, 100)
    features, known = np.concatenate([once, once]), np.concatenate([labels, np.full(100, -1)])
    logits = out_of_fold_logits(features, known, 4, groups=np.tile(np.arange(100), 2))
    assert (logits[100:].argmax(1) == labels).mean() < 0.45
