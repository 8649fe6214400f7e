"""Remote stores: which requests are made, what is kept on this machine, and what goes wrong on the way."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from test_store_backends import write_store

from store import mirror, remote
from store.errors import StoreError
from store.mirror import cached_files
from store.reader import Split, open_store
from tests.fault_proxy import (
    ACCESS_DENIED,
    CLOCK_SKEW,
    EXPIRED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    Fault,
    Proxy,
    Request,
    Rule,
    cut,
    dropped,
    fault_proxy,
    lost,
    slow,
    wrong_bytes,
)
from tests.s3_servers import SECRET, localbucket_server, upload, use_endpoint

POOLED, GRID = "features/pooled", "features/grid"
BUCKET = "bucket"
URL = f"s3://{BUCKET}/plain.zarr"
Serve = Callable[..., Proxy]


@pytest.fixture(scope="module")
def folder(memory_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket: shards of 128 rows of 150 (one map) in plain.zarr, compressed ones in zstd.zarr."""
    folder = tmp_path_factory.mktemp("bucket")
    write_store(folder / "plain.zarr", shard_rows=128)
    write_store(folder / "zstd.zarr", shard_rows=64, codec="zstd")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(mirror, "FIRST_PAUSES_S", (0.01,))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """An S3 server with the folder's files in a bucket."""
    with localbucket_server() as endpoint:
        upload(endpoint, folder, BUCKET)
        yield endpoint


@pytest.fixture
def serve(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """serve(rule) → the proxy before the server of s3://bucket, whose faults the rule makes."""
    with ExitStack() as stack:

        def start(rule: Rule | None = None) -> Proxy:
            proxy = stack.enter_context(fault_proxy(server, rule))
            use_endpoint(monkeypatch, proxy.url)
            return proxy

        yield start


def gets(proxy: Proxy) -> Counter[str]:
    """How often each object was asked for."""
    return Counter(path for method, path in proxy.requests if method == "GET" and "/" in path)


def shard(array: str, number: int = 0) -> str:
    return f"{BUCKET}/plain.zarr/train/{array}/c/{number}/" + "/".join("0" * (3 if array == GRID else 1))


def test_each_shard_is_fetched_once_and_only_what_is_read(serve: Serve) -> None:
    proxy = serve()
    train = open_store(URL)["train"]
    assert not [key for key in gets(proxy) if "/c/" in key]
    for _ in range(3):
        train.gather([1, 2, 100], [POOLED])
    assert gets(proxy)[shard(POOLED, 0)] == 1
    assert gets(proxy)[shard(POOLED, 1)] == 0  # rows 128:150 were not asked for
    train.gather([149], [POOLED])
    again = open_store(URL)["train"]  # another reader, or the next training
    again.gather(range(150), [POOLED])
    assert gets(proxy)[shard(POOLED, 0)] == gets(proxy)[shard(POOLED, 1)] == 1
    assert not any(GRID in key for key in gets(proxy))


def test_a_mirrored_array_has_the_speed_of_a_map(serve: Serve, folder: Path) -> None:
    serve()
    train = open_store(URL)["train"]
    train.gather(range(150), [POOLED])
    maps = train.array(POOLED).local.maps  # type: ignore[attr-defined]
    assert type(maps).__name__ == "_OneMap"
    np.testing.assert_array_equal(maps.array, open_store(folder / "plain.zarr")["train"].read(POOLED))


def gather_all(split: Split, results: Any) -> None:
    results.put(split.gather(range(150), [POOLED, GRID])[GRID].tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_one_download(serve: Serve, folder: Path, method: str) -> None:
    proxy = serve()
    train = open_store(URL)["train"]
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [context.Process(target=gather_all, args=(train, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    want = open_store(folder / "plain.zarr")["train"].gather(range(150), [GRID])[GRID].tobytes()
    assert [results.get(timeout=60) for _ in workers] == [want] * 3
    for worker in workers:
        worker.join()
    assert gets(proxy)[shard(GRID, 0)] == 1


def test_threads_share_one_download(serve: Serve) -> None:
    proxy = serve()
    train = open_store(URL)["train"]
    failed: list[BaseException] = []

    def gather() -> None:
        try:
            train.gather(range(150), [POOLED, GRID])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=gather) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert gets(proxy)[shard(GRID, 1)] == 1


def test_a_fork_while_another_thread_downloads(serve: Serve) -> None:
    """The child does not wait for a lock of a thread that it does not have."""
    holding, done = threading.Event(), threading.Event()

    def hold(request: Request) -> None:
        if request.path == shard(POOLED, 0) and request.count == 1:
            holding.set()
            done.wait(20)

    serve(hold)
    train = open_store(URL)["train"]
    thread = threading.Thread(target=lambda: train.gather([0], [POOLED]))
    thread.start()
    assert holding.wait(20)
    context: Any = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(train.gather([149], [POOLED])[POOLED].shape))
    child.start()
    assert results.get(timeout=30) == (1, 16)
    done.set()
    thread.join()
    child.join()


def test_what_a_training_needs_is_downloaded_in_its_order(serve: Serve) -> None:
    proxy = serve()
    train = open_store(URL)["train"]
    names = [POOLED, "targets/boxes/values"]
    mirror.download_ahead(train, names, np.array([149, 0, 3, 130]), 128)
    (thread,) = [item for item in threading.enumerate() if item.name == "store-download-ahead"]
    thread.join(20)
    got = [key for key in gets(proxy) if "/c/" in key]
    pooled = [shard(POOLED, 1), shard(POOLED, 0)]
    assert [key for key in got if "pooled" in key] == pooled
    assert got.index(f"{BUCKET}/plain.zarr/train/targets/boxes/offsets/c/0") < got.index(
        f"{BUCKET}/plain.zarr/train/targets/boxes/values/c/0/0"
    )
    before = len(proxy.requests)
    train.gather([0, 149], [POOLED])
    train.ragged([0, 149], "targets/boxes/values")
    assert len(proxy.requests) == before


# -- room ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain.zarr", "zstd.zarr"])
def test_a_cache_that_is_smaller_than_the_store(
    serve: Serve, folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Shards come and go; the limit holds, and every value is right."""
    limit = 12_000
    monkeypatch.setenv("QWEN_DISTILL_CACHE_GB", str(limit / 1e9))
    serve()
    train = open_store(f"s3://{BUCKET}/{name}")["train"]
    want = open_store(folder / name)["train"].gather(range(150), [POOLED])[POOLED]
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.integers(0, 64, 4) + rng.integers(0, 86)
        np.testing.assert_array_equal(train.gather(rows, [POOLED])[POOLED], want[rows])
        assert sum(size for _, size, _ in cached_files(own_cache)) <= limit


def test_what_was_not_used_for_longest_goes_first(
    serve: Serve, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    train = open_store(URL)["train"]
    for name in (POOLED, "targets/label", "sizes"):
        train.gather(range(150), [name])
    for age, (_, _, path) in enumerate(sorted(cached_files(own_cache), key=lambda item: str(item[2]))):
        os.utime(path, (1e9 + age, 1e9 + age))
    train.gather([149], [POOLED])  # a shard that is mapped is not noted as used each time
    oldest, *_, newest = sorted(cached_files(own_cache))
    used = sum(size for _, size, _ in cached_files(own_cache))
    monkeypatch.setenv("QWEN_DISTILL_CACHE_GB", str((used + 1) / 1e9))
    open_store(URL)["val"].gather([0], ["targets/label"])
    assert not oldest[2].exists()
    assert newest[2].exists()
    np.testing.assert_array_equal(
        train.gather([0], [POOLED])[POOLED].shape, (1, 16)
    )  # its map outlives the file


@pytest.mark.parametrize("value", ["0", "-1", "much"])
def test_a_limit_that_is_no_size(serve: Serve, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    serve()
    monkeypatch.setenv("QWEN_DISTILL_CACHE_GB", value)
    with pytest.raises(StoreError, match=f"QWEN_DISTILL_CACHE_GB: expected a number .* got '{value}'"):
        open_store(URL)["train"].gather([0], [POOLED])


def test_the_cache_can_be_chosen(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    for name in ("QWEN_DISTILL_CACHE", "QWEN_DISTILL_CACHE_GB"):
        monkeypatch.setenv(name, "")  # restored afterwards
    monkeypatch.chdir(tmp_path)
    mirror.use_cache(Path("mine"), 0.5)
    open_store(URL)["train"].gather([0], [POOLED])
    assert list(cached_files(tmp_path / "mine"))
    assert mirror.cache_limit(tmp_path) == 500_000_000


# -- faults ----------------------------------------------------------------------------------------------


def of_pooled(fault: Fault, times: int) -> Rule:
    """A fault of the first requests for each of the pooled features' shards."""
    return lambda request: fault if "pooled/c" in request.path and request.count <= times else None


@pytest.mark.parametrize("fault", [SLOW_DOWN, INTERNAL_ERROR, cut, dropped, lost, wrong_bytes, slow(0.3)])
def test_a_fault_that_passes_is_not_noticed(serve: Serve, folder: Path, fault: Fault) -> None:
    proxy = serve(of_pooled(fault, 2))
    got = open_store(URL)["train"].gather(range(150), [POOLED])
    want = open_store(folder / "plain.zarr")["train"].gather(range(150), [POOLED])
    np.testing.assert_array_equal(got[POOLED], want[POOLED])
    assert gets(proxy)[shard(POOLED, 0)] >= 1


def test_wrong_bytes_are_never_read(serve: Serve, own_cache: Path) -> None:
    serve(lambda request: wrong_bytes if request.method == "GET" and "pooled/c" in request.path else None)
    with pytest.raises(
        StoreError,
        match=r"pooled/c/0/0 \(rows 0:128\): the shard is damaged: .* crc32c .*copy the store again",
    ):
        open_store(URL)["train"].gather([0], [POOLED])
    assert not [path for _, _, path in cached_files(own_cache) if "pooled" in str(path)]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (ACCESS_DENIED, "no permission: check the credentials, whether"),
        (EXPIRED, "the credentials have expired: renew them"),
        (CLOCK_SKEW, "the server refuses requests because of this machine's clock: set the clock"),
        (SLOW_DOWN, "does not work: .*check address and network"),
        (INTERNAL_ERROR, "does not work: .*check address and network"),
        (dropped, "does not work: .*check address and network"),
        (cut, "does not work: .*check address and network"),
    ],
)
def test_a_fault_that_stays_is_one_line(
    serve: Serve, fault: Fault, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it begins with the first request or later."""
    for first in ("zarr.json", "/c/"):
        serve(lambda request, first=first: fault if first in request.path else None)
        with pytest.raises(StoreError, match=problem) as caught:
            open_store(URL)["train"].gather([0], [POOLED])
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value) + caplog.text


def test_what_is_no_store_is_one_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    for url, problem in [
        (f"s3://{BUCKET}/none.zarr", "no such store"),
        ("http://127.0.0.1:9/x.zarr", "does not work: .*check address and network"),
        ("nonsense://x.zarr", "Protocol not known: nonsense: expected s3://"),
        ("s3://user:***@bucket/x.zarr", "the password was left out"),
    ]:
        with pytest.raises(StoreError, match=problem) as caught:
            open_store(url)
        assert str(caught.value).startswith(url)
    monkeypatch.setattr(fsspec.config, "conf", {})
    for name in ("FSSPEC_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreError, match="no credentials: set them as for the provider's own tools"):
        open_store(URL)


def test_a_full_disk_is_one_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    train = open_store(URL)["train"]
    monkeypatch.setattr(mirror.os, "replace", full_disk)
    with pytest.raises(StoreError, match="the disk is full: free some space"):
        train.gather([0], [POOLED])


def full_disk(*arguments: Any) -> None:
    raise OSError(28, "No space left on device", str(arguments[1]))


# -- plain web servers -----------------------------------------------------------------------------------


@contextmanager
def web_server(folder: Path, hidden: bool) -> Iterator[str]:
    """Python's own: it ignores ranges. `hidden`: like many servers, it has no files whose names begin with a dot."""

    class Handler(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            if hidden and "/." in self.path:
                return self.send_error(404)
            return super().send_head()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_store_behind_a_plain_web_server(
    folder: Path, hidden: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)  # several blocks a shard
    with web_server(folder, hidden) as address:
        store = open_store(f"{address}/plain.zarr/")
        got = store["train"].gather(range(150), [POOLED, GRID])
    want = open_store(folder / "plain.zarr")["train"].gather(range(150), [POOLED, GRID])
    for name in (POOLED, GRID):
        np.testing.assert_array_equal(got[name], want[name])
    assert ("no checksums at .commits/train.json" in caplog.text) == hidden


def test_blocks_arrive_in_order(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests are under way at once."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    proxy = serve()
    got = open_store(URL)["train"].gather(range(150), [GRID])
    want = open_store(folder / "plain.zarr")["train"].gather(range(150), [GRID])
    np.testing.assert_array_equal(got[GRID], want[GRID])
    size = (folder / shard(GRID, 0).removeprefix(f"{BUCKET}/")).stat().st_size
    assert gets(proxy)[shard(GRID, 0)] == -(-size // 1000)
