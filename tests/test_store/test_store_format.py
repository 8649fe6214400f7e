"""The files are plain Zarr v3: zarr-python and tensorstore read them with no code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from store_samples import WIDTH, small_arrays, small_block, small_manifest, write_rows

from store.create import create_store
from store.errors import StoreError
from store.format import FORMAT_VERSION, ArraySpec, Preprocessing, TeacherSpec, feature_arrays
from store.keys import KeyTable, Plan
from store.reader import open_store
from store.shards import Layout, choose_shard_rows
from store.writer import StoreWriter, channel_scale, to_stored


def expected_arrays(store: Path) -> dict[str, np.ndarray]:
    return {
        f"{name}/{array}": split.read(array)
        for name, split in open_store(store).items()
        for array in [*split.names, "keys/values", "keys/offsets", "keys/hashes", "keys/rows"]
    }


def test_zarr_reads_every_array(make_store: Any) -> None:
    path = make_store(train=200, val=3, empty=0)
    group = zarr.open(path, mode="r")
    found = {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    expected = expected_arrays(path)
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name][:], array)
        assert found[name].dtype == array.dtype
    assert group.attrs["format_version"] == FORMAT_VERSION
    block = small_block(0, 200)
    np.testing.assert_array_equal(group["train/features/grid"][:], block["features/grid"].astype(np.float16))


def test_zarr_reads_without_consolidated_metadata(make_store: Any) -> None:
    path = make_store(train=70)
    group = zarr.open_group(path, mode="r", use_consolidated=False)
    np.testing.assert_array_equal(group["train/targets/label"][:], small_block(0, 70)["targets/label"])


def test_tensorstore_reads_every_array(make_store: Any) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    path = make_store(train=200, val=3)
    for name, array in expected_arrays(path).items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
        opened = tensorstore.open(spec, open=True, read=True).result()
        np.testing.assert_array_equal(opened.read().result(), array)
        assert opened.dtype.numpy_dtype == array.dtype


def test_chunks_are_uncompressed_and_shards_page_aligned() -> None:
    for specs in (feature_arrays(1280), feature_arrays(1280, grid=16), feature_arrays(1280, grid=7)):
        shard_rows = choose_shard_rows(specs)
        for spec in specs:
            layout = Layout.of(spec, 10_000_000, shard_rows)
            assert layout.shard_bytes % 4096 == 0
            assert layout.shard_rows % layout.chunk_rows == 0
            codecs = layout.metadata({})["codecs"][0]["configuration"]["codecs"]
            assert codecs == [{"name": "bytes", "configuration": {"endian": "little"}}]
    assert choose_shard_rows(feature_arrays(1280)) == 65_536
    assert choose_shard_rows(feature_arrays(1280, grid=16)) == 1024


def test_other_format_version_is_refused(make_store: Any) -> None:
    path = make_store(train=3)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["format_version"] = 2
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match="format version 2, this program reads version 1"):
        open_store(path)
    del root["attributes"]["format_version"]
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match="not a store of this program"):
        open_store(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        open_store(path)


def test_paths_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such store; make one with `cli extract"):
        open_store(tmp_path / "none.zarr")
    with pytest.raises(StoreError, match=r"not a store \(no zarr.json in it\)"):
        open_store(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file, not a store"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreError, match="is a file; a store is a folder"):
        create_store(tmp_path / "file", small_manifest(), Plan({}), small_arrays())
    with pytest.raises(StoreError, match="exists and is not empty"):
        create_store(tmp_path, small_manifest(), Plan({}), small_arrays())
    with pytest.raises(StoreError, match="no such store"):
        open_store("memory://nothing.zarr")
    with pytest.raises(StoreError, match="Protocol not known: nonsense: expected s3:"):
        open_store("nonsense://nothing.zarr")


def test_other_teacher_or_preprocessing_is_refused_with_both_values(make_store: Any) -> None:
    path = make_store(train=3)
    manifest = open_store(path).manifest
    open_store(path, teacher=manifest.teacher, preprocessing=manifest.preprocessing)
    other = TeacherSpec(name="test", fingerprint="1" * 32, layer="first", width=WIDTH)
    with pytest.raises(
        StoreError, match=r"another teacher: fingerprint: store has '0+', asked for '1+'; layer:"
    ):
        open_store(path, teacher=other)
    with pytest.raises(StoreError, match="another preprocessing: image_size: store has 28, asked for 56"):
        open_store(path, preprocessing=Preprocessing(image_size=56))


def test_keys_are_unique_and_any_unicode() -> None:
    keys = ["a", "", "ключ", "日本/🎈.jpg", "a\u0301", "á", "\x00", "x" * 5000]
    table = KeyTable.build(keys)
    assert list(table) == keys
    assert table == keys
    assert table.rows_of(reversed(keys)).tolist() == list(range(len(keys) - 1, -1, -1))
    assert table[2:4] == keys[2:4]
    with pytest.raises(StoreError, match=r"key 'b' stands for rows \[1, 3\]"):
        KeyTable.build(["a", "b", "c", "b"])
    with pytest.raises(StoreError, match="not valid Unicode"):
        KeyTable.build(["ok", "\udcff.jpg"])
    with pytest.raises(IndexError):
        table[len(keys)]


def test_equal_hashes_of_different_keys_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"key {number}" for number in range(50)]
    table = KeyTable.build(keys)
    clash = KeyTable(table.values, table.offsets, np.full(50, 7, np.uint64), np.arange(50))
    monkeypatch.setattr("store.keys.key_hash", lambda key: 7)
    clash.check_unique("test")
    assert clash.rows_of(keys).tolist() == list(range(50))
    assert clash.find("other") is None


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4, 1e7])
def test_scale_bounds_the_relative_error(magnitude: float) -> None:
    """At most 2^-11 for everything from 2^-29 of the scaled maximum on; 16 times the calibration fits."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((1000, 64)) * magnitude * np.exp2(generator.integers(-6, 6, 64))
    scale = channel_scale(values[:100])
    assert (np.frexp(scale)[0] == 0.5).all()
    stored = to_stored(values, scale, np.dtype(np.float16))
    assert np.isfinite(to_stored(values * 15.9 / 4, scale, np.dtype(np.float16))).all()
    back = stored.astype(np.float64) * scale
    scaled_maximum = 2.0**15 * scale.astype(np.float64)
    counts = np.abs(values) >= 2.0**-29 * scaled_maximum
    assert counts.mean() > 0.999
    assert (np.abs(back - values) <= 2.0**-11 * np.abs(values))[counts].all()


def test_a_channel_silent_in_calibration_has_room() -> None:
    values = np.random.default_rng(0).standard_normal((100, 8))
    values[:, 3] = 0
    scale = channel_scale(values)
    loud = np.full((1, 8), 10.0)
    assert np.isfinite(to_stored(loud, scale, np.dtype(np.float16))).all()
    assert (channel_scale(np.zeros((4, 8))) == 1).all()


def test_scales_are_recorded_before_the_first_shard(tmp_path: Path) -> None:
    path, scale = tmp_path / "s.zarr", np.exp2(np.arange(WIDTH) - 3)
    create_store(
        path, small_manifest(), Plan({"train": ["a"]}), small_arrays(), scales={"features/pooled": scale}
    )
    attributes = json.loads((path / "train/features/pooled/zarr.json").read_text())["attributes"]
    assert attributes["scale"] == scale.tolist()
    with pytest.raises(StoreError, match="expected 16 powers of two"):
        create_store(
            tmp_path / "t", small_manifest(), Plan({}), small_arrays(), scales={"features/pooled": scale * 3}
        )
    with pytest.raises(StoreError, match=r"scales given for \['sizes'\]"):
        create_store(tmp_path / "t", small_manifest(), Plan({}), small_arrays(), scales={"sizes": scale})


def test_importing_the_store_is_light() -> None:
    """No torch ever; no zarr either for opening and gathering from a local store."""
    code = (
        "import sys, store; assert 'numpy' not in sys.modules, 'numpy';"
        "store.open_store;"
        "import store.writer, store.create, store.verify, store.transfer, store.hdf5, store.summary, store.quality;"
        "found = {'torch', 'zarr', 'transformers', 'dask', 'sklearn', 'h5py', 'fsspec'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_empty_split_and_a_wide_range_of_names(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    create_store(path, small_manifest(), Plan({"train": [], "a.b-c_1": ["x"]}), small_arrays())
    write_rows(path, "a.b-c_1")
    from store.finalize import finalize_store

    finalize_store(path)
    store = open_store(path)
    assert len(store["train"]) == 0
    assert store["train"].gather([], ["features/pooled"])["features/pooled"].shape == (0, WIDTH)
    with pytest.raises(IndexError, match="row 0 is out of range: 0 rows"):
        store["train"].gather([0], ["features/pooled"])
    assert list(store["train"].keys) == []
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(StoreError, match="split name"):
            Plan({name: []})


def test_read_only_folder_and_full_disk_are_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root no folder refuses, so the errors come from a patched system call here; see also the crash tests."""
    import errno
    import os

    def refuse(code: int) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> int:
            raise OSError(code, os.strerror(code), "some/file")

        return replacement

    path = tmp_path / "s.zarr"
    create_store(path, small_manifest(), Plan({"train": ["a", "b"]}), small_arrays())
    for code, text in ((errno.ENOSPC, "the disk is full"), (errno.EROFS, "the file system is read-only")):
        with StoreWriter(path, "train") as writer, monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse(code))
            with pytest.raises(StoreError, match=f"some/file: cannot write, {text}.*committed rows are kept"):
                writer.append(small_block(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse(errno.EACCES))
        with pytest.raises(StoreError, match="no permission to write"):
            create_store(tmp_path / "t.zarr", small_manifest(), Plan({}), small_arrays())


@pytest.mark.parametrize(
    ("specs", "problem"),
    [
        ([("a", {}), ("a", {})], "given twice"),
        ([("features/a", {}), ("features/a/b", {})], "below another array"),
        ([("keys/values", {})], "names of the store's own"),
        ([("values", {"ragged": True})], "needs a folder"),
        ([("plain", {"codec": "zstd"})], "are compressed"),
    ],
)
def test_arrays_that_do_not_fit_each_other(tmp_path: Path, specs: list[Any], problem: str) -> None:
    arrays = [ArraySpec(name=name, dtype="uint8", **fields) for name, fields in specs]
    with pytest.raises(StoreError, match=problem):
        create_store(tmp_path / "s.zarr", small_manifest(), Plan({"train": []}), arrays)
    assert list(tmp_path.iterdir()) == []
