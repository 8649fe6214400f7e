"""Other shapes of a store: HDF5 and back, zstd, int8, PCA."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from store_samples import WIDTH, files_of, small_arrays, small_block, small_manifest, write_rows

from store.create import add_arrays, create_store, extend_store
from store.errors import StoreError
from store.finalize import finalize_store
from store.format import feature_arrays, image_arrays, logits_array, target_arrays
from store.hdf5 import hdf5_to_store, store_to_hdf5
from store.keys import Plan
from store.reader import open_store
from store.shards import BLOCK_BYTES
from store.transfer import StoreRows, pack_store, row_ranges
from store.writer import StoreWriter


def full_store(path: Path, rows: int = 150) -> Path:
    """Every kind of array, an invalid row, scales that are not 1, logits added later."""
    arrays = (
        feature_arrays(WIDTH, grid=2, frames=True, views=3)
        + target_arrays(label=True, boxes=True, mask=True)
        + image_arrays("jpeg", 28)
    )
    plan = Plan({"train": [f"ключ/{row} 🎈.jpg" for row in range(rows)], "val": ["v"]}, shard_rows=64)
    scales = {"features/pooled": np.exp2(np.arange(WIDTH) - 8)}
    create_store(path, small_manifest(class_names=("a", "ß")), plan, arrays, scales=scales)
    for split, count in (("train", rows), ("val", 1)):
        with StoreWriter(path, split) as writer:
            for start, stop in writer.batches():
                block = {**small_block(start, stop), **more_columns(start, stop)}
                valid = np.array([row % 11 != 3 for row in range(start, stop)])
                writer.append(block, valid=valid, reasons=["" if ok else "zero bytes" for ok in valid])
        assert writer.next_row == count
    finalize_store(path)
    job = add_arrays(path, [logits_array("probe", 9)])
    for split, count in (("train", rows), ("val", 1)):
        with StoreWriter(path, split, job=job) as writer:
            writer.append({"logits/probe": np.ones((count, 9), np.float32)})
    finalize_store(path, job=job)
    return path


def more_columns(start: int, stop: int) -> dict[str, Any]:
    generators = [np.random.default_rng([9, row]) for row in range(start, stop)]
    return {
        "features/frames/values": [
            g.standard_normal((row % 3, WIDTH)) for row, g in enumerate(generators, start)
        ],
        "views/geometry": np.stack([g.random((3, 2, 3)) for g in generators]),
        "views/pooled": np.stack([g.standard_normal((3, WIDTH)) for g in generators]),
        "views/grid": np.stack([g.standard_normal((3, 2, 2, WIDTH)) for g in generators]),
        "targets/mask/values": [g.bytes(row % 7) for row, g in enumerate(generators, start)],
        "images/encoded/values": [g.bytes(100 + row) for row, g in enumerate(generators, start)],
    }


def test_hdf5_and_back_is_lossless(tmp_path: Path) -> None:
    """Not one file of the store differs after the way there and back."""
    path = full_store(tmp_path / "s.zarr")
    store_to_hdf5(path, tmp_path / "s.h5")
    hdf5_to_store(tmp_path / "s.h5", tmp_path / "back.zarr")
    before, after = files_of(path), files_of(tmp_path / "back.zarr")
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back.zarr", "s.h5", "s.zarr"]


def test_hdf5_is_readable_by_plain_h5py(tmp_path: Path) -> None:
    path = full_store(tmp_path / "s.zarr", rows=70)
    store_to_hdf5(path, tmp_path / "s.h5")
    split = open_store(path)["train"]
    with h5py.File(tmp_path / "s.h5") as file:
        assert '"format_version":1' in file.attrs["manifest"]
        np.testing.assert_array_equal(file["train/features/grid"][:], split.read("features/grid"))
        np.testing.assert_array_equal(
            file["train/features/pooled"].attrs["scale"], split.scale["features/pooled"]
        )
        values, offsets = file["train/keys/values"][:], file["train/keys/offsets"][:]
        assert bytes(values[offsets[7] : offsets[8]]).decode() == "ключ/7 🎈.jpg"


def test_hdf5_errors(tmp_path: Path, make_store: Any) -> None:
    path = make_store(train=3)
    with pytest.raises(StoreError, match="no such file"):
        hdf5_to_store(tmp_path / "none.h5", tmp_path / "x.zarr")
    (tmp_path / "bad.h5").write_bytes(b"not hdf5")
    with pytest.raises(StoreError, match="not a readable HDF5 file"):
        hdf5_to_store(tmp_path / "bad.h5", tmp_path / "x.zarr")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="no manifest in it"):
        hdf5_to_store(tmp_path / "other.h5", tmp_path / "x.zarr")
    with pytest.raises(StoreError, match="exists; choose another name"):
        store_to_hdf5(path, tmp_path / "bad.h5")
    store_to_hdf5(path, tmp_path / "ok.h5")
    with pytest.raises(StoreError, match="exists and is not empty"):
        hdf5_to_store(tmp_path / "ok.h5", path)


def test_an_error_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full_store(tmp_path / "s.zarr", rows=70)
    store_to_hdf5(path, tmp_path / "s.h5")

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for convert in (
            lambda: store_to_hdf5(path, tmp_path / "t.h5"),
            lambda: hdf5_to_store(tmp_path / "s.h5", tmp_path / "t.zarr"),
            lambda: pack_store(path, tmp_path / "t.zarr", int8=True),
        ):
            with pytest.raises(StoreError, match="the disk is full"):
                convert()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.h5", "s.zarr"]


def test_a_row_that_the_new_form_cannot_hold_is_an_error(tmp_path: Path) -> None:
    path = full_store(tmp_path / "s.zarr", rows=70)
    store_to_hdf5(path, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file["train/features/pooled"][8, 3] = np.inf
    with pytest.raises(StoreError, match="train: row 8 has features that are not finite"):
        hdf5_to_store(tmp_path / "s.h5", tmp_path / "t.zarr")


def test_row_ranges_are_bounded_by_the_ragged_arrays(tmp_path: Path) -> None:
    """Photographs of several megabytes: not a thousand of them at once."""
    path = tmp_path / "s.zarr"
    create_store(
        path,
        small_manifest(),
        Plan({"train": map(str, range(20))}),
        [*image_arrays("jpeg", 28), *target_arrays()],
    )
    images = [bytes(10 * 2**20 if row in (3, 4, 5, 6, 12) else 100) for row in range(20)]
    block = small_block(0, 20)
    with StoreWriter(path, "train") as writer:
        writer.append({"images/encoded/values": images, "sizes": block["sizes"], "content": block["content"]})
    finalize_store(path)
    cuts = list(row_ranges(StoreRows(open_store(path)), "train"))
    assert [start for start, _ in cuts] == [0, *[stop for _, stop in cuts[:-1]]]
    assert cuts[-1][1] == 20
    assert max(sum(len(image) for image in images[start:stop]) for start, stop in cuts) <= BLOCK_BYTES
    assert len(cuts) == 2


def test_conversion_takes_bounded_memory(tmp_path: Path) -> None:
    """A store of 300 MB to HDF5 and back in a process that grows by less than half of that."""
    rows, width = 150_000, 1024
    specs = [spec.model_copy(update={"row_shape": (width,)}) for spec in feature_arrays(width)]
    create_store(tmp_path / "s.zarr", small_manifest(), Plan({"train": map(str, range(rows))}), specs)
    block = np.random.default_rng(0).standard_normal((5000, width)).astype(np.float16)
    with StoreWriter(tmp_path / "s.zarr", "train") as writer:
        for _ in range(0, rows, len(block)):
            writer.append({"features/pooled": block}, stored=True)
    finalize_store(tmp_path / "s.zarr", statistics=False)
    command = [sys.executable, "-c", CONVERT, str(Path(__file__).parent.parent.parent), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 150
    one, two = (
        open_store(tmp_path / name)["train"].array("features/pooled") for name in ("s.zarr", "t.zarr")
    )
    np.testing.assert_array_equal(one.slice(rows - 99, rows), two.slice(rows - 99, rows))


CONVERT = """
import sys
sys.path.insert(0, sys.argv[1])
from store.hdf5 import hdf5_to_store, store_to_hdf5
def private_peak_mb():  # mapped pages of the store belong to the system's page cache
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
import threading, time, h5py, zarr
before = peak = private_peak_mb()
def watch():
    global peak
    while True:
        peak = max(peak, private_peak_mb())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
store_to_hdf5(sys.argv[2] + "/s.zarr", sys.argv[2] + "/s.h5")
hdf5_to_store(sys.argv[2] + "/s.h5", sys.argv[2] + "/t.zarr")
print(peak - before)
"""


def test_zstd_is_lossless_and_zarr_reads_it(tmp_path: Path) -> None:
    path, packed = full_store(tmp_path / "s.zarr"), tmp_path / "z.zarr"
    costs = pack_store(path, packed, zstd=True)
    one, two = open_store(path)["train"], open_store(packed)["train"]
    rows = np.array([149, 3, 3, 0, 64, 63, 128])
    for name in ("features/pooled", "features/grid", "views/grid", "views/geometry"):
        np.testing.assert_array_equal(one.gather(rows, [name])[name], two.gather(rows, [name])[name])
        plain = zarr.open_array(packed / "train" / name, mode="r")
        np.testing.assert_array_equal(plain[:], one.read(name))
    assert {cost.array: cost.cosine_mean for cost in costs}["features/grid"] == pytest.approx(1, abs=1e-6)
    assert two.statistics["features/grid"].count == one.statistics["features/grid"].count


def correlated_store(path: Path, rows: int = 400, width: int = 32) -> Path:
    """Features of rank 6 plus noise, one channel 10,000 times larger than the rest, one far off zero."""
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((6, width))
    gain = np.where(np.arange(width) == 5, 1e4, 1.0)
    create_store(
        path,
        small_manifest(),
        Plan({"train": [str(row) for row in range(rows)]}, shard_rows=128),
        feature_arrays(width, grid=2),
        scales={name: np.full(width, 2.0**-2) for name in ("features/pooled", "features/grid")},
    )
    with StoreWriter(path, "train") as writer:
        for start, stop in writer.batches():
            grid = generator.standard_normal((stop - start, 2, 2, 6)) @ mix
            grid = (grid + 0.01 * generator.standard_normal(grid.shape) + 50 * (np.arange(width) == 9)) * gain
            grid = np.clip(grid, -16000, 16000)
            writer.append({"features/grid": grid, "features/pooled": grid.mean(axis=(1, 2))})
    finalize_store(path)
    return path


def test_int8_keeps_standardised_cosine(tmp_path: Path) -> None:
    path = correlated_store(tmp_path / "s.zarr")
    costs = {cost.array: cost for cost in pack_store(path, tmp_path / "i.zarr", int8=True)}
    assert costs["features/grid"].cosine_mean > 0.9998
    assert costs["features/grid"].cosine_p1 > 0.9995
    assert 0.3 < costs["features/grid"].saved < 0.5
    split = open_store(tmp_path / "i.zarr")["train"]
    assert split.gather([1], ["features/grid"])["features/grid"].dtype == np.int8


def test_pca_keeps_what_its_rank_allows(tmp_path: Path) -> None:
    path = correlated_store(tmp_path / "s.zarr")
    enough = {cost.array: cost for cost in pack_store(path, tmp_path / "p6.zarr", pca=6)}
    short = {cost.array: cost for cost in pack_store(path, tmp_path / "p2.zarr", pca=2)}
    assert enough["features/grid"].cosine_mean > 0.99  # float16 noise and clipping are not of rank 6
    assert short["features/grid"].cosine_mean < 0.9
    split = open_store(tmp_path / "p6.zarr")["train"]
    assert split.gather([1], ["features/grid"])["features/grid"].shape == (1, 2, 2, 6)
    assert split.true_values([1], "features/grid").shape == (1, 2, 2, 32)
    assert split.read("features/grid.components").shape == (6, 32)
    again = pack_store(path, tmp_path / "again.zarr", pca=6)
    assert files_of(tmp_path / "p6.zarr") == files_of(tmp_path / "again.zarr")
    assert again[0].bytes_after == enough[again[0].array].bytes_after


def test_packing_keeps_invalid_rows_invalid(tmp_path: Path) -> None:
    path = full_store(tmp_path / "s.zarr")
    for options in ({"int8": True}, {"pca": 4}):
        target = tmp_path / f"{next(iter(options))}.zarr"
        pack_store(path, target, **options)  # type: ignore[arg-type]
        split = open_store(target)["train"]
        assert not split.valid[3]
        assert np.isnan(split.true_values([3], "features/grid")).all()
        assert np.isfinite(split.true_values([4], "features/grid")).all()


def test_features_of_a_packed_store_mean_the_same_to_training(tmp_path: Path) -> None:
    """What is gathered × scale is the true value, packed or not; so training need not know."""
    path = full_store(tmp_path / "s.zarr")
    pack_store(path, tmp_path / "i.zarr", int8=True)
    rows, names = [5, 0, 149], ["features/pooled", "features/grid"]
    plain, packed = (open_store(tmp_path / name)["train"] for name in ("s.zarr", "i.zarr"))
    assert "features/grid" not in packed.scale
    one, two = plain.gather_features(rows, names), packed.gather_features(rows, names)
    buffers = {name: np.empty_like(values) for name, values in two.items()}
    packed.gather_features(rows, names, out=buffers)
    for name in names:
        true = one[name] * plain.scale[name]
        assert two[name].dtype == np.float32
        error = np.abs(two[name] - true) / plain.statistics[name].std
        assert error.max() < 0.02
        np.testing.assert_array_equal(buffers[name], two[name])


def test_packing_errors(tmp_path: Path, make_store: Any) -> None:
    path = make_store(train=10)
    with pytest.raises(StoreError, match="exclude each other"):
        pack_store(path, tmp_path / "x", int8=True, pca=3)
    with pytest.raises(StoreError, match="17 PCA components of features/grid, which is 16 wide"):
        pack_store(path, tmp_path / "x", pca=17)
    pack_store(path, tmp_path / "i.zarr", int8=True)
    for purpose, refused in (
        ("packing", lambda: pack_store(tmp_path / "i.zarr", tmp_path / "x", zstd=True)),
        ("conversion to HDF5", lambda: store_to_hdf5(tmp_path / "i.zarr", tmp_path / "i.h5")),
        ("appending rows", lambda: extend_store(tmp_path / "i.zarr", {"train": ["new"]})),
    ):
        with pytest.raises(StoreError, match=f"are packed; {purpose} needs the original store"):
            refused()


def test_zstd_written_directly_resumes(tmp_path: Path) -> None:
    """The extractor may compress too; a half-written shard stays resumable."""
    arrays = [spec.model_copy(update={"codec": "zstd"}) if spec.direct else spec for spec in small_arrays()]
    keys = [str(row) for row in range(150)]
    for name in ("a.zarr", "b.zarr"):
        create_store(
            tmp_path / name, small_manifest(), Plan({"train": keys}, batch_rows=8, shard_rows=64), arrays
        )
    write_rows(tmp_path / "a.zarr", "train")
    finalize_store(tmp_path / "a.zarr")
    with StoreWriter(tmp_path / "b.zarr", "train") as writer:
        for start, stop in ((0, 8), (8, 80)):
            writer.append(small_block(start, stop))
    write_rows(tmp_path / "b.zarr", "train")
    finalize_store(tmp_path / "b.zarr")
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")


def hostile_hdf5(path: Path, kind: str, secret: Path) -> None:
    """Replace `train/sizes` of a file of a store by what would read another file, or too much memory."""
    with h5py.File(path, "r+") as file:
        shape, dtype, name = file["train/sizes"].shape, file["train/sizes"].dtype, "train/sizes"
        del file[name]
        if kind == "external storage":
            file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        elif kind == "external link":
            file[name] = h5py.ExternalLink(str(secret), "/train/sizes")
        elif kind == "soft link to an external link":
            file["elsewhere"] = h5py.ExternalLink(str(secret), "/")
            file[name] = h5py.SoftLink("/elsewhere/train/sizes")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(secret), "train/sizes", shape=shape)
            file.create_virtual_dataset(name, layout)
        elif kind == "never written":
            file.create_dataset(name, shape, dtype, chunks=(8, 2))
        elif kind == "other shape":
            file[name] = np.zeros((shape[0] + 1, 2), dtype)
        else:
            file.create_dataset(name, (shape[0], 60_000, 60_000), dtype, chunks=(1, 64, 64))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("external storage", "train/sizes has its values in another file"),
        ("external link", "train/sizes is an external link to .*: other files are not read"),
        ("soft link to an external link", "is an external link to .*: other files are not read"),
        ("virtual", "train/sizes is a virtual data set"),
        ("never written", "of which at most 0 were ever written"),
        ("other shape", r"train/sizes is int32 \[71, 2\], its manifest has int32 \[70, 2\]"),
        ("huge rows", "has rows of 14,400,000,000 bytes"),
    ],
)
def test_hdf5_of_other_files_and_impossible_sizes_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = full_store(tmp_path / "s.zarr", rows=70)
    store_to_hdf5(path, tmp_path / "s.h5")
    secret = tmp_path / "secret.h5"
    secret.write_bytes((tmp_path / "s.h5").read_bytes())
    hostile_hdf5(tmp_path / "s.h5", kind, secret)
    with pytest.raises(StoreError, match=message) as raised:
        hdf5_to_store(tmp_path / "s.h5", tmp_path / "t.zarr")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "t.zarr").exists()


def test_hdf5_soft_links_inside_the_file_are_followed(tmp_path: Path) -> None:
    path = full_store(tmp_path / "s.zarr", rows=70)
    store_to_hdf5(path, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.move("train/sizes", "moved/sizes")
        file["train/sizes"] = h5py.SoftLink("/moved/sizes")
    hdf5_to_store(tmp_path / "s.h5", tmp_path / "t.zarr")
    assert open_store(tmp_path / "t.zarr").fingerprint == open_store(path).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "no JSON", "manifest is damaged"),
        (lambda m: "[1]", "manifest is damaged"),
        (lambda m: json.dumps(m | {"shard_rows": 2**50}), "manifest is damaged: shards of"),
        (
            lambda m: json.dumps(m | {"arrays": [{"name": "../../outside", "dtype": "uint8"}, *m["arrays"]]}),
            "manifest is damaged: .*outside",
        ),
    ],
)
def test_hdf5_with_a_damaged_manifest(tmp_path: Path, change: Any, message: str) -> None:
    store_to_hdf5(full_store(tmp_path / "s.zarr", rows=70), tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs["manifest"] = change(json.loads(file.attrs["manifest"]))
    with pytest.raises(StoreError, match=message) as raised:
        hdf5_to_store(tmp_path / "s.h5", tmp_path / "t.zarr")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "t.zarr").exists()


def test_hdf5_with_offsets_that_do_not_fit(tmp_path: Path) -> None:
    store_to_hdf5(full_store(tmp_path / "s.zarr", rows=70), tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file["train/reasons/offsets"][5] = 2**40
    with pytest.raises(StoreError, match="train/reasons/offsets does not divide the"):
        hdf5_to_store(tmp_path / "s.h5", tmp_path / "t.zarr")
