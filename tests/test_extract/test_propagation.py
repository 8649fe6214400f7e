"""What unlabeled rows learn from rows with similar features, see extract/propagation.py."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from extract import propagation
from extract.logits import add_probe, answers_of, fit_on, usable_labels
from extract.propagation import log_probabilities, neighbor_graph, propagate
from store import quality
from store.create import create_store
from store.finalize import finalize_store
from store.format import Manifest, Preprocessing, TeacherSpec, feature_arrays, target_arrays
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter

CLUSTERS, WIDTH = 4, 16


def clusters(rows: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Features of `CLUSTERS` Gaussian clusters, and the cluster of each row."""
    generator = np.random.default_rng(0)
    own = np.arange(rows) % CLUSTERS
    middles = np.random.default_rng(7).normal(size=(CLUSTERS, WIDTH))
    return (middles[own] + generator.normal(scale=noise, size=(rows, WIDTH))).astype(np.float32), own


def few_labels(own: np.ndarray, each: int) -> np.ndarray:
    labels = np.full(len(own), -1, np.int32)
    for cluster in range(CLUSTERS):
        labels[np.flatnonzero(own == cluster)[:each]] = cluster
    return labels


class TestGraph:
    def test_neighbors_are_of_the_same_cluster_and_weights_are_normalized(self) -> None:
        features, own = clusters(200)
        graph = neighbor_graph(np.arange(200), lambda rows: features[rows], 200, 0)
        first, second = graph.nonzero()
        assert (own[first] == own[second]).mean() > 0.98
        assert (np.diff(graph.indptr) >= propagation.NEIGHBORS).all()
        assert (first != second).all()
        assert abs(graph - graph.T).max() < 1e-6
        assert np.linalg.eigvalsh(graph.toarray()).max() <= 1 + 1e-5  # propagation ends somewhere

    def test_other_rows_have_no_neighbors(self) -> None:
        features, _ = clusters(40)
        features[5] = np.nan
        rows = np.delete(np.arange(40), 5)
        graph = neighbor_graph(rows, lambda chosen: features[chosen], 40, 0)
        assert graph[[5]].nnz == graph[:, [5]].nnz == 0
        assert np.isfinite(graph.data).all()

    def test_many_rows_look_among_some(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(propagation, "GROUP_ROWS", 60)
        monkeypatch.setattr(quality, "QUERY_BLOCK", 7)
        features, own = clusters(200)
        sizes = []

        def read(rows: np.ndarray) -> np.ndarray:
            sizes.append(len(rows))
            return features[rows]

        graph = neighbor_graph(np.arange(200), read, 200, 0)
        assert sizes == [50, 50, 50, 50]
        first, second = graph.nonzero()
        assert (own[first] == own[second]).mean() > 0.9
        assert (np.diff(graph.indptr) >= propagation.NEIGHBORS).all()

    def test_one_row(self) -> None:
        graph = neighbor_graph(np.array([1]), lambda rows: np.ones((len(rows), 3), np.float32), 3, 0)
        answer = propagate(graph, np.full((3, 2), 0.5, np.float32))
        np.testing.assert_allclose(answer, 0.5)


def test_probabilities_sum_to_one_and_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = clusters(100)
    graph = neighbor_graph(np.arange(100), lambda rows: features[rows], 100, 0)
    given = np.random.default_rng(0).dirichlet(np.ones(5), 100).astype(np.float32)
    whole = propagate(graph, given)
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
    monkeypatch.setattr(propagation, "COLUMN_VALUES", 200)
    np.testing.assert_allclose(propagate(graph, given), whole, rtol=1e-6)
    finite = log_probabilities(np.array([[0.0, 1.0]], np.float32))
    assert np.isfinite(finite.astype(np.float16)).all()


def write_store(path: Path, features: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> Path:
    width = features.shape[1]
    arrays = feature_arrays(width) + target_arrays(label=True)
    manifest = Manifest(
        teacher=TeacherSpec(name="synthetic", fingerprint="0", layer="", width=width),
        preprocessing=Preprocessing(image_size=32),
        class_names=tuple(f"class{number}" for number in range(CLUSTERS)),
    )
    keys = {"train": [f"{row:03d}" for row in range(len(features))]}
    create_store(path, manifest, Plan(keys, batch_rows=8, shard_rows=64), arrays)
    with StoreWriter(path, "train") as writer:
        rows = {
            "features/pooled": features,
            "content": np.random.default_rng(0).integers(0, 255, (len(features), 16), np.uint8),
            "sizes": np.full((len(features), 2), 32, np.int32),
            "targets/label": labels,
        }
        writer.append(rows, valid=valid)
    finalize_store(path)
    return path


class TestStore:
    def test_unlabeled_rows_are_labeled_better_than_by_the_probe(self, tmp_path: Path) -> None:
        features, own = clusters(400, noise=1.0)
        labels, valid = few_labels(own, 2), np.ones(400, bool)
        valid[[17, 300]] = False
        path = write_store(tmp_path / "a.zarr", features, labels, valid)
        assert add_probe(path).propagated
        train = open_store(path)["train"]
        logits = train.read("logits/probe").astype(np.float32)
        assert np.isnan(logits[~valid]).all()
        assert np.isfinite(logits[valid]).all()
        known, usable = usable_labels(open_store(path))
        probe = answers_of(fit_on(train, np.flatnonzero(usable), known, CLUSTERS, 0), train)
        unlabeled = valid & (labels < 0)
        right, before = ((x[unlabeled].argmax(1) == own[unlabeled]).mean() for x in (logits, probe))
        assert right > before + 0.03

    def test_no_labeled_row_learns_its_label_from_its_neighbors(self, tmp_path: Path) -> None:
        """Labels drawn at random: a pass that saw a row's own label would give it back."""
        features, _ = clusters(240)
        labels = np.random.default_rng(3).integers(0, 2, 240).astype(np.int32)
        labels[120:] = -1
        path = write_store(tmp_path / "a.zarr", features, labels, np.ones(240, bool))
        result = add_probe(path)
        logits = open_store(path)["train"].read("logits/probe")[:120].astype(np.float32)
        assert result.out_of_fold_top1 == (logits.argmax(1) == labels[:120]).mean() < 0.65

    def test_more_than_memory_allows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        features, own = clusters(100)
        path = write_store(tmp_path / "a.zarr", features, few_labels(own, 2), np.ones(100, bool))
        monkeypatch.setattr("extract.logits.MOST_AVERAGED", 399)
        with caplog.at_level(logging.INFO):
            assert not add_probe(path).propagated
        assert "left out: 100 rows of 4 classes would take too much memory" in caplog.text

    def test_all_rows_labeled(self, tmp_path: Path) -> None:
        features, own = clusters(100)
        path = write_store(tmp_path / "a.zarr", features, own.astype(np.int32), np.ones(100, bool))
        assert not add_probe(path).propagated

    def test_neighbors_of_other_classes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The sign of a small channel decides, and the nearest rows are of the other class: the probe alone is right."""
        generator = np.random.default_rng(0)
        twins = generator.normal(size=(150, 96)).repeat(2, axis=0)
        classes = np.arange(300) % 2
        twins[:, 0] = 0.5 * (2 * classes - 1)
        labels = np.where(np.arange(300) < 200, classes, -1).astype(np.int32)
        path = write_store(tmp_path / "a.zarr", twins.astype(np.float32), labels, np.ones(300, bool))
        with caplog.at_level(logging.INFO):
            result = add_probe(path)
        assert not result.propagated
        assert result.out_of_fold_top1 > 0.9
        assert "averaging over similar images is left out: held-out images" in caplog.text
        logits = open_store(path)["train"].read("logits/probe")[200:]
        assert (logits.argmax(1) == classes[200:]).mean() > 0.9
