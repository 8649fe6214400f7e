"""`cli copy`: a store as it is, between folders and buckets, on a real S3 server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from store_samples import files_of
from test_store_backends import write_store

from files.writing import PARTIAL_PREFIX
from store import remote
from store.errors import StoreError
from store.reader import open_store
from store.replicate import MARKER, LocalFiles, replicate_store
from store.verify import verify_store
from tests.s3_servers import SERVERS, use_endpoint

ROOT = Path(__file__).parents[2]
POOLED, GRID = "features/pooled", "features/grid"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.01,))
    path = write_store(tmp_path / "a.zarr", shard_rows=64)
    (path / ".extract").mkdir()
    (path / ".extract/measured.json").write_text("{}")
    return path


@pytest.fixture(scope="module", params=list(SERVERS))
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty bucket of each server."""
    with SERVERS[request.param]() as endpoint, pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, endpoint)
        fsspec.filesystem("s3").mkdir("stores")
        yield "s3://stores"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_store_goes_to_a_bucket_and_back(source: Path, bucket: str, tmp_path: Path) -> None:
    """The same files, byte for byte, and no others."""
    copied = replicate_store(str(source), f"{bucket}/a.zarr")
    assert copied is not None
    assert copied.files == len(files_of(source))
    assert copied.bytes + (source / "zarr.json").stat().st_size == sum(map(len, files_of(source).values()))
    files = fsspec.filesystem("s3")
    names = {name.removeprefix("stores/a.zarr/") for name in files.find("stores/a.zarr")}
    assert names == set(files_of(source))
    np.testing.assert_array_equal(
        open_store(f"{bucket}/a.zarr")["train"].read(POOLED), open_store(source)["train"].read(POOLED)
    )
    replicate_store(f"{bucket}/a.zarr", str(tmp_path / "back.zarr"))
    assert files_of(tmp_path / "back.zarr") == files_of(source)
    assert verify_store(tmp_path / "back.zarr") == []
    again = replicate_store(f"{bucket}/a.zarr", str(tmp_path / "back.zarr"))
    assert again is not None
    assert (again.files, again.bytes) == (0, 0)


def test_only_some_arrays(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.zarr"
    replicate_store(str(source), str(target), [POOLED, "targets/label"])
    small, whole = open_store(target), open_store(source)
    assert small.fingerprint == whole.fingerprint
    assert {"features/pooled", "targets/label", "valid", "sizes"} <= set(small["train"].names)
    assert not {GRID, "targets/boxes/values"} & set(small["train"].names)
    np.testing.assert_array_equal(small["train"].read(POOLED), whole["train"].read(POOLED))
    assert small["train"].keys[3] == whole["train"].keys[3]
    assert verify_store(target) == []
    with pytest.raises(
        StoreError, match="no array 'features/poled'; valid: content, features/grid, features/pooled,"
    ):
        replicate_store(str(source), str(tmp_path / "b.zarr"), ["features/poled"])


def test_an_interrupted_copy_continues(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.zarr"
    calls = iter([False] * 7 + [True])
    assert replicate_store(str(source), str(target), stopped=lambda: next(calls)) is None
    with pytest.raises(StoreError, match="not a store"):
        open_store(target)
    other = write_store(tmp_path / "other.zarr", shard_rows=128)
    with pytest.raises(StoreError, match="holds a part of a copy of another store"):
        replicate_store(str(other), str(target))
    done = replicate_store(str(source), str(target))
    assert done is not None
    assert done.skipped == 7
    assert files_of(target) == files_of(source)


def test_nothing_else_is_overwritten(source: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other.zarr", shard_rows=128)
    before = files_of(other)
    with pytest.raises(StoreError, match=r"other.zarr: another store: choose another place"):
        replicate_store(str(source), str(other))
    assert files_of(other) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("x")
    with pytest.raises(StoreError, match="notes: exists and is no store"):
        replicate_store(str(source), str(tmp_path / "notes"))
    assert list((tmp_path / "notes").iterdir()) == [tmp_path / "notes/mine.txt"]


def test_a_damaged_source_is_not_copied(source: Path, tmp_path: Path) -> None:
    shard = source / "train" / POOLED / "c/1/0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(bytes(data))
    target = tmp_path / "b.zarr"
    with pytest.raises(StoreError, match=r"pooled/c/1/0: is damaged: .* run cli verify on the source"):
        replicate_store(str(source), str(target))
    shard.unlink()
    with pytest.raises(StoreError, match=r"pooled/c/1/0: is missing"):
        replicate_store(str(source), str(target))
    assert not (target / "zarr.json").exists()


def test_what_cannot_be_copied_is_named(source: Path, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.zarr: no such store"):
        replicate_store(str(tmp_path / "none.zarr"), str(tmp_path / "b.zarr"))
    with pytest.raises(StoreError, match="is there such a bucket"):
        replicate_store(str(source), "s3://absent/b.zarr")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        replicate_store(str(source), str(tmp_path / "file/b.zarr"))


def test_what_does_not_arrive_is_sent_again(
    source: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost byte on the way to the bucket."""
    files = fsspec.filesystem("s3")
    plain, sent = type(files)._pipe_file, []

    async def lossy(self: Any, path: str, data: bytes, **options: Any) -> None:
        sent.append(path)
        await plain(self, path, data if sent.count(path) > 1 else data[:-1], **options)

    monkeypatch.setattr(type(files), "_pipe_file", lossy)
    files.clear_instance_cache()
    replicate_store(str(source), f"{bucket}/lossy.zarr")
    monkeypatch.undo()
    assert sent.count("stores/lossy.zarr/zarr.json") == 2
    assert files.cat_file("stores/lossy.zarr/zarr.json") == (source / "zarr.json").read_bytes()


def test_a_copy_killed_before_its_marker_had_a_name_continues(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.zarr"
    target.mkdir()
    (target / f"{PARTIAL_PREFIX}{MARKER}").write_text("{")
    assert replicate_store(str(source), str(target)) is not None
    assert files_of(target) == files_of(source)


def whole_files(folder: Path) -> list[str]:
    return [name for name in LocalFiles(folder).names("") if PARTIAL_PREFIX not in name]


@pytest.mark.slow
def test_a_killed_copy_continues(source: Path, tmp_path: Path) -> None:
    """kill -9 and Ctrl-C at any moment leave no store that is not whole."""
    target = tmp_path / "b.zarr"
    command = [sys.executable, "-m", "cli", "copy", str(source), str(target)]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        count = len(whole_files(target))
        while process.poll() is None and len(whole_files(target)) <= count:
            time.sleep(0.001)
        os.kill(process.pid, number)
        _, told = process.communicate(timeout=60)
        assert process.returncode in (-number, 128 + number), told
        assert not (target / "zarr.json").exists()
        assert (target / MARKER).exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "files were there" in done.stdout
    assert files_of(target) == files_of(source)
