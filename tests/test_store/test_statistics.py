"""Statistics from the parts of shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_store_backends import write_store

from store.arrays import MappedArray
from store.statistics import Moments, combine, mean_and_std, moments_of


@pytest.mark.parametrize("shard_rows", [64, 256])
def test_shards_together_have_the_statistics_of_all_valid_rows(tmp_path: Path, shard_rows: int) -> None:
    store = write_store(tmp_path / "a.zarr", shard_rows=shard_rows)
    array = MappedArray.open(store / "train", "features/pooled")
    valid = np.random.default_rng(0).random(len(array)) < 0.8
    parts = []
    for first in range(0, len(array), shard_rows):
        end = min(len(array), first + shard_rows)
        part = moments_of(array, first, end, valid[first:end])
        parts.append(Moments.from_json(json.loads(json.dumps(part.to_json()))))
        np.testing.assert_array_equal(parts[-1].squares, part.squares)
    parts.insert(1, Moments.none(len(parts[0].mean)))
    scale = np.full(len(parts[0].mean), 4.0, np.float32)
    values = np.asarray(array.slice(0, len(array)))[valid].astype(np.float64) * 4
    found = combine(parts, len(scale))
    mean, std = mean_and_std(found, scale)
    assert found.count == valid.sum()
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-6)


def test_a_large_mean_costs_no_digits() -> None:
    values = 1e8 + np.random.default_rng(0).normal(size=(1000, 3))
    parts = [
        Moments(len(part), part.mean(axis=0), ((part - part.mean(axis=0)) ** 2).sum(axis=0))
        for part in np.array_split(values, 7)
    ]
    _, std = mean_and_std(combine(parts, 3), None)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-6)


def test_nothing_valid() -> None:
    mean, std = mean_and_std(combine([Moments.none(2)], 2), None)
    assert (mean.tolist(), std.tolist()) == ([0, 0], [1, 1])
