"""`cli verify` of a store in a bucket and behind a web server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import typer
from test_store_backends import write_store
from typer.testing import CliRunner

from commands.store import verify
from store import mirror, remote
from store.errors import RemoteError, StoreError
from store.verify import verify_store
from tests.fault_proxy import ACCESS_DENIED, Proxy, fault_proxy, wrong_bytes
from tests.s3_servers import moto_server, upload, use_endpoint

URL = "s3://bucket/plain.zarr"
SHARD = "bucket/plain.zarr/train/features/pooled/c/0/0"


@pytest.fixture(scope="module")
def server(memory_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's S3 server with a store."""
    folder = tmp_path_factory.mktemp("bucket")
    write_store(folder / "plain.zarr", shard_rows=128)
    with moto_server() as endpoint:
        upload(endpoint, folder, "bucket")
        yield endpoint


@pytest.fixture
def proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("QWEN_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.01,))
    monkeypatch.setattr(mirror, "FIRST_PAUSES_S", ())
    with fault_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield proxy


def run_verify(*words: str) -> Any:
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, list(words))


def test_every_shard_is_read_at_its_address_once(proxy: Proxy) -> None:
    for _ in range(2):  # the second time all shards are in the cache
        proxy.counts.clear()
        report = json.loads(run_verify(URL, "--json").stdout)
        assert (report["ok"], report["findings"]) == (True, [])
        assert report["data"]["compared"] is False
        shards = {
            path: count for (method, path), count in proxy.counts.items() if "/c/" in path and method == "GET"
        }
        assert len(shards) > 20
        assert set(shards.values()) == {1}


def test_what_is_wrong_is_found(proxy: Proxy, server: str) -> None:
    assert verify_store(URL) == []  # now in the cache, undamaged
    files = fsspec.filesystem("s3")
    good = files.cat_file(SHARD)
    try:
        files.pipe_file(SHARD, good[:100] + b"?" + good[101:])
        files.pipe_file("bucket/plain.zarr/train/features/pooled/c/7/0", b"")
        found = verify_store(URL)
        problems = {item.path.removeprefix(f"{URL}/train/features/pooled/c/"): item.problem for item in found}
        assert set(problems) == {"0/0", "7/0"}
        assert problems["7/0"] == "file does not belong to the array"
        assert problems["0/0"].startswith("the shard is damaged: got ")
        files.rm_file(SHARD)
        assert any(found.problem.startswith("shard is missing") for found in verify_store(URL))
    finally:
        files.pipe_file(SHARD, good)
        files.rm_file("bucket/plain.zarr/train/features/pooled/c/7/0")
    proxy.rule = lambda request: wrong_bytes if request.path == SHARD and request.count % 2 else None
    assert verify_store(URL) == []  # only the way to here was at fault


def test_an_address_that_fails_is_no_finding(proxy: Proxy) -> None:
    proxy.rule = lambda request: ACCESS_DENIED if request.path == SHARD else None
    with pytest.raises(RemoteError, match="no permission"):
        verify_store(URL)


def test_options_of_local_stores_are_refused(proxy: Proxy) -> None:
    for options in (["--repair"], ["--teacher-path", "x"], ["--data", os.devnull]):
        error = run_verify(URL, *options).exception
        assert isinstance(error, StoreError)
        assert "work on local stores: copy it with cli copy" in str(error)
