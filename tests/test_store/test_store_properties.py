"""Round trips over shapes, dtypes, ragged lengths, batch sizes and gather orders, made up by hypothesis."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from store_samples import files_of, small_manifest

from store.create import create_store, extend_store
from store.finalize import finalize_store
from store.format import ArraySpec
from store.keys import KeyTable, Plan
from store.reader import open_store
from store.verify import verify_store
from store.writer import StoreWriter, batches

QUICK = settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
DTYPES = ("bool", "uint8", "int8", "int32", "int64", "uint64", "float16", "float32", "float64")
DIRECT = ("features/a", "views/b", "images/c")
NAMES = (
    "features/a",
    "views/b",
    "images/c",
    "targets/d",
    "plain",
    "deep/er/e",
    "features/f/values",
    "g/values",
)


@st.composite
def array_specs(draw: st.DrawFn) -> list[ArraySpec]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    return [
        ArraySpec(
            name=name,
            row_shape=tuple(draw(st.lists(st.integers(1, 5), max_size=3))),
            dtype=draw(st.sampled_from(DTYPES)),
            ragged=name.endswith("/values"),
            codec=draw(st.sampled_from(["none", "zstd"])) if name in DIRECT else "none",
        )
        for name in names
    ]


def random_values(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    return (
        random.integers(0, 2, shape).astype(dtype)
        if dtype == "bool"
        else random.integers(0, 100, shape).astype(dtype)
    )


def make_columns(specs: list[ArraySpec], rows: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        spec.name: [
            random_values(random, spec.dtype, (int(count), *spec.row_shape))
            for count in random.integers(0, 4, rows)
        ]
        if spec.ragged
        else random_values(random, spec.dtype, (rows, *spec.row_shape))
        for spec in specs
    }


def append_all(path: Path, columns: dict[str, Any], cuts: list[int], rows: int, commit_rows: int) -> None:
    """Append in blocks of the given sizes, over and over; each writer writes a part and is closed."""
    turn = 0
    while True:
        with StoreWriter(path, "train", commit_rows=commit_rows) as writer:
            for _ in range(3):
                start = writer.next_row
                stop = min(rows, start + cuts[turn % len(cuts)])
                turn += 1
                writer.append({name: values[start:stop] for name, values in columns.items()})
            if writer.next_row == rows:
                return


@QUICK
@given(
    specs=array_specs(),
    rows=st.integers(1, 90),
    before=st.integers(0, 90),
    shard_rows=st.sampled_from([1, 2, 8, 16, 64]),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    commit_rows=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_any_store_round_trips(
    memory_disk: Path,
    specs: list[ArraySpec],
    rows: int,
    before: int,
    shard_rows: int,
    cuts: list[int],
    commit_rows: int,
    seed: int,
) -> None:
    """In one go or in two (rows appended later), in any blocks: the same rows, and the same files."""
    columns = make_columns(specs, rows, seed)
    keys = [f"{seed}/{row}" for row in range(rows)]
    before = min(before, rows)
    with tempfile.TemporaryDirectory(dir=memory_disk) as folder:
        for name, first in (("one.zarr", rows), ("two.zarr", before)):
            path = Path(folder) / name
            create_store(path, small_manifest(), Plan({"train": keys[:first]}, shard_rows=shard_rows), specs)
            append_all(path, columns, cuts if name == "one.zarr" else [rows], first, commit_rows)
            finalize_store(path)
            if first < rows:
                extend_store(path, {"train": keys[first:]})
                append_all(path, columns, cuts[::-1], rows, commit_rows)
                finalize_store(path)
        check_store(Path(folder) / "one.zarr", specs, columns, rows, seed)
        assert files_of(Path(folder) / "one.zarr") == files_of(Path(folder) / "two.zarr")


def check_store(path: Path, specs: list[ArraySpec], columns: dict[str, Any], rows: int, seed: int) -> None:
    assert verify_store(path) == []
    split = open_store(path)["train"]
    order = np.random.default_rng(seed).integers(0, rows, 2 * rows)
    for spec in specs:
        want = columns[spec.name]
        if spec.ragged:
            for row, entry in zip(order, split.ragged(order, spec.name), strict=True):
                np.testing.assert_array_equal(entry, want[row])
        else:
            got = split.gather(order, [spec.name])[spec.name]
            np.testing.assert_array_equal(got, want[order])
            assert got.dtype == np.dtype(spec.dtype)


@given(st.lists(st.text(max_size=20), unique=True, max_size=50), st.text(max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_keys_are_found(keys: list[str], other: str) -> None:
    keys = [key for key in keys if key.isprintable() or key.encode(errors="ignore").decode() == key]
    table = KeyTable.build(keys)
    assert list(table) == keys
    assert table.rows_of(keys).tolist() == list(range(len(keys)))
    assert (table.find(other) is not None) == (other in keys)


@given(
    st.integers(0, 300), st.integers(0, 300), st.integers(1, 70), st.sampled_from([1, 16, 64, 128]), st.data()
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_batch_cuts_do_not_depend_on_where_one_resumes(
    first: int, count: int, batch: int, shard: int, data: st.DataObject
) -> None:
    start = first - first % shard
    cuts = list(batches(start, start + count, batch, shard))
    assert [row for a, b in cuts for row in range(a, b)] == list(range(start, start + count))
    assert all(b - a <= batch and a // shard == (b - 1) // shard for a, b in cuts)
    if cuts:
        resumed = data.draw(st.sampled_from(cuts))[0]
        assert list(batches(resumed, start + count, batch, shard)) == [
            cut for cut in cuts if cut[0] >= resumed
        ]
