"""What every store back end must do. Subclass `StoreConformance`, give it `location`, inherit every test."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from store_samples import small_block

from store.errors import StoreError
from store.reader import Split, open_store

ROWS = 150
NAMES = ["features/pooled", "features/grid", "targets/label"]


def gather_elsewhere(split: Split, rows: np.ndarray, results: Any) -> None:
    results.put(split.gather(rows, NAMES))


class StoreConformance:
    """Rows 0..149 of `small_block` in split `train`, 3 rows in `val`, row 7 of train invalid."""

    start_methods: tuple[str, ...] = ("fork", "spawn")  # of processes that can read the same data

    @pytest.fixture
    def location(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def train(self, location: Any) -> Split:
        return open_store(location)["train"]

    @pytest.fixture
    def want(self) -> dict[str, Any]:
        block: dict[str, Any] = small_block(0, ROWS)
        for name in ("features/pooled", "features/grid"):
            block[name] = block[name].astype(np.float16)
            block[name][7] = np.nan
        return block

    @pytest.mark.parametrize("rows", [[], [0], [149], [149, 0, 7, 7, 64, 63, 127, 128], list(range(ROWS))])
    def test_gather(self, train: Split, want: dict[str, Any], rows: list[int]) -> None:
        batch = train.gather(rows, NAMES)
        assert list(batch) == NAMES
        for name, array in batch.items():
            np.testing.assert_array_equal(array, want[name][rows])
            assert array.dtype == want[name].dtype

    def test_gather_into_buffers(self, train: Split, want: dict[str, Any]) -> None:
        out = {name: np.empty((3, *want[name].shape[1:]), want[name].dtype) for name in NAMES}
        batch = train.gather(np.array([5, 100, 2]), NAMES, out=out)
        for name in NAMES:
            assert batch[name] is out[name]
            np.testing.assert_array_equal(out[name], want[name][[5, 100, 2]])
        with pytest.raises(StoreError, match=r"buffer is \(3, 16\) float16, expected \(2, 16\) float16"):
            train.gather([1, 2], ["features/pooled"], out=out)
        with pytest.raises(StoreError, match=r"gather valid: no buffer for it in out, which has \['features"):
            train.gather([1], ["valid"], out=out)
        wrong = {"features/pooled": np.empty((2, 16), np.float32)}
        with pytest.raises(StoreError, match="float32, expected"):
            train.gather([1, 2], ["features/pooled"], out=wrong)

    def test_ragged(self, train: Split, want: dict[str, Any]) -> None:
        rows = [149, 0, 0, 66, 3]
        for name in ("targets/boxes/values", "targets/boxes/classes"):
            for row, entry in zip(rows, train.ragged(rows, name), strict=True):
                np.testing.assert_array_equal(entry, want[name][row])
                assert entry.dtype == want[name][row].dtype

    def test_small_arrays_and_flags(self, train: Split, want: dict[str, Any]) -> None:
        np.testing.assert_array_equal(train.read("sizes"), want["sizes"])
        assert np.flatnonzero(~train.valid).tolist() == [7]
        assert train.reason(7) == "truncated: ü"
        assert len(train) == ROWS

    def test_keys(self, train: Split) -> None:
        assert len(train.keys) == ROWS
        assert train.keys[3] == "train/3 é🎈.jpg"
        assert train.keys[-1] == "train/149 é🎈.jpg"
        assert list(train.keys)[:2] == ["train/0 é🎈.jpg", "train/1 é🎈.jpg"]
        assert "train/9 é🎈.jpg" in train.keys
        assert train.rows_of(["train/149 é🎈.jpg", "train/0 é🎈.jpg"]).tolist() == [149, 0]
        with pytest.raises(KeyError, match="no key 'nothing' among 150 keys"):
            train.rows_of(["train/0 é🎈.jpg", "nothing"])

    def test_errors_name_what_is_valid(self, train: Split, location: Any) -> None:
        for row in (150, -1, 2**40):
            with pytest.raises(IndexError, match=f"row {row} is out of range: 150 rows"):
                train.gather([0, row], ["features/pooled"])
        with pytest.raises(IndexError, match="float64, expected a list of integers"):
            train.gather(np.array([0.5]), ["features/pooled"])
        with pytest.raises(KeyError, match=r"no array 'features/poled'; valid: .*features/pooled"):
            train.gather([0], ["features/poled"])
        with pytest.raises(KeyError, match="is ragged; read it with ragged"):
            train.gather([0], ["targets/boxes/values"])
        with pytest.raises(KeyError, match="is not ragged; read it with gather"):
            train.ragged([0], "targets/label")
        with pytest.raises(KeyError, match=r"no split 'test'; valid: \['train', 'val'\]"):
            open_store(location)["test"]

    def test_scale_and_statistics(self, train: Split, want: dict[str, Any]) -> None:
        good = np.delete(want["features/pooled"], 7, axis=0).astype(np.float64)
        statistics = train.statistics["features/pooled"]
        np.testing.assert_allclose(statistics.mean, good.mean(axis=0), atol=1e-3)
        np.testing.assert_allclose(statistics.std, good.std(axis=0), rtol=1e-3)
        assert train.scale["features/pooled"].shape == (16,)
        true = train.true_values([1, 2], "features/pooled")
        np.testing.assert_allclose(true, want["features/pooled"][[1, 2]], atol=1e-3)

    def test_prefetch_changes_nothing(self, train: Split, want: dict[str, Any]) -> None:
        train.prefetch([149, 3, 4, 5, 3], NAMES)
        train.prefetch([], NAMES)
        np.testing.assert_array_equal(train.gather([3], NAMES)["features/grid"], want["features/grid"][[3]])

    def test_pickled(self, train: Split, want: dict[str, Any]) -> None:
        train.gather(range(ROWS), NAMES)
        assert len(train.keys) == ROWS
        assert train.valid is not None
        data = pickle.dumps(train)
        assert len(data) < 60_000  # metadata only, no features
        again = pickle.loads(data)  # noqa: S301
        np.testing.assert_array_equal(
            again.gather([9, 1], NAMES)["features/grid"], want["features/grid"][[9, 1]]
        )

    def test_threads(self, train: Split, want: dict[str, Any]) -> None:
        def read(seed: int) -> None:
            rows = np.random.default_rng(seed).integers(0, ROWS, 32)
            np.testing.assert_array_equal(
                train.gather(rows, NAMES)["features/grid"], want["features/grid"][rows]
            )

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(64)))

    def test_other_processes(self, train: Split, want: dict[str, Any]) -> None:
        """After use in the parent, which is what breaks readers with threads or event loops."""
        train.gather(range(ROWS), NAMES)
        rows = np.array([77, 3, 149])
        for method in self.start_methods:
            context: Any = multiprocessing.get_context(method)
            results = context.Queue()
            child = context.Process(target=gather_elsewhere, args=(train, rows, results))
            child.start()
            batch = results.get(timeout=120)
            np.testing.assert_array_equal(batch["features/grid"], want["features/grid"][rows])
            child.join(timeout=60)
            assert child.exitcode == 0
