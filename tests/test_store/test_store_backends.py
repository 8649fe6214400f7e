"""Every back end passes the conformance suite."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from store_conformance import ROWS, StoreConformance
from store_samples import small_arrays, small_block, small_manifest

from store.create import create_store
from store.errors import StoreError
from store.finalize import finalize_store
from store.keys import Plan
from store.reader import Split, open_store
from store.writer import StoreWriter
from tests.s3_servers import SERVERS, upload, use_endpoint


def write_store(path: Path, *, shard_rows: int, codec: str = "none") -> Path:
    arrays = [spec.model_copy(update={"codec": codec}) if spec.direct else spec for spec in small_arrays()]
    counts = {"train": ROWS, "val": 3}
    keys = {split: [f"{split}/{row} é🎈.jpg" for row in range(count)] for split, count in counts.items()}
    create_store(path, small_manifest(), Plan(keys, shard_rows=shard_rows), arrays)
    for split, count in counts.items():
        valid = np.array([split == "val" or row != 7 for row in range(count)])
        with StoreWriter(path, split) as writer:
            writer.append(
                small_block(0, count), valid=valid, reasons=["" if ok else "truncated: ü" for ok in valid]
            )
    finalize_store(path)
    return path


@pytest.fixture(scope="module")
def stores(memory_disk: Path) -> Iterator[dict[str, Any]]:
    """One store for each back end."""
    with tempfile.TemporaryDirectory(dir=memory_disk) as name:
        folder = Path(name)
        plain = write_store(folder / "plain.zarr", shard_rows=64)
        memory = fsspec.filesystem("memory")
        memory.put(str(plain), "/conformance.zarr", recursive=True)
        yield {
            # 128 rows × 32 bytes are one page.
            "one map": write_store(folder / "one.zarr", shard_rows=128),
            "many maps": write_store(folder / "many.zarr", shard_rows=16),
            "compressed": write_store(folder / "zstd.zarr", shard_rows=64, codec="zstd"),
            "memory": "memory://conformance.zarr",
            "url": f"file://{plain}",
        }
        memory.rm("/conformance.zarr", recursive=True)


class TestOneMap(StoreConformance):
    """Shards that are multiples of a page: one address range."""

    @pytest.fixture
    def location(self, stores: dict[str, Any]) -> Any:
        return stores["one map"]

    def test_it_is_one_map(self, train: Split) -> None:
        assert type(train.array("features/pooled").maps).__name__ == "_OneMap"  # type: ignore[union-attr]


class TestMapPerShard(StoreConformance):
    """Shards that end within a page."""

    @pytest.fixture
    def location(self, stores: dict[str, Any]) -> Any:
        return stores["many maps"]

    def test_it_is_many_maps(self, train: Split) -> None:
        assert type(train.array("features/pooled").maps).__name__ == "_ShardMaps"  # type: ignore[union-attr]


class TestCompressed(StoreConformance):
    """zstd, through zarr."""

    @pytest.fixture
    def location(self, stores: dict[str, Any]) -> Any:
        return stores["compressed"]


class TestRemote(StoreConformance):
    """A URL that fsspec knows, in a file system without files."""

    start_methods = ("fork",)  # A spawned process has a memory file system of its own.

    @pytest.fixture
    def location(self, stores: dict[str, Any]) -> Any:
        return stores["memory"]


class TestRemoteFolder(StoreConformance):
    """The same through file://, which other processes see too."""

    @pytest.fixture
    def location(self, stores: dict[str, Any]) -> Any:
        return stores["url"]


@pytest.fixture(scope="module", params=list(SERVERS))
def bucket(stores: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[str]:
    """The stores' folder as a bucket of each server."""
    with SERVERS[request.param]() as endpoint, pytest.MonkeyPatch.context() as patch:
        upload(endpoint, Path(stores["one map"]).parent, "bucket")
        use_endpoint(patch, endpoint)
        yield "s3://bucket"


class TestObjectStore(StoreConformance):
    """s3:// through s3fs, from a server that speaks S3's protocol."""

    @pytest.fixture
    def location(self, bucket: str) -> Any:
        return f"{bucket}/plain.zarr"

    def test_no_such_store(self, bucket: str) -> None:
        with pytest.raises(StoreError, match=r"s3://bucket/none.zarr: no such store"):
            open_store(f"{bucket}/none.zarr")


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_zarr_would_make_up_is_refused_by_name(tmp_path: Path, remote: bool) -> None:
    """zarr reads a missing shard as fill values; a damaged one fails somewhere in a codec."""
    path = write_store(tmp_path / "zstd.zarr", shard_rows=64, codec="zstd")
    location = f"file://{path}" if remote else str(path)
    names = ["features/pooled"]
    shard = path / "train/features/pooled/c/1/0"
    good = shard.read_bytes()
    shard.unlink()
    train = open_store(location)["train"]
    assert train.gather([0, 149], names)["features/pooled"].shape == (2, 16)
    with pytest.raises(StoreError, match=r"pooled/c/1/0 \(rows 64:128\): shard is missing"):
        train.gather([0, 70], names)
    with pytest.raises(StoreError, match=r"pooled/c/1/0 \(rows 64:128\): shard is missing"):
        train.read("features/pooled")
    for damaged in (good[:-9], good[: len(good) // 2], b"\xff" * 40 + good[40:]):
        shard.write_bytes(damaged)
        with pytest.raises(
            StoreError, match=r"pooled/c/1/0 \(rows 64:128\): (cannot be read|the shard is damaged)"
        ):
            open_store(location)["train"].gather([0, 70], names)
