"""`cli extract --out s3://…`: interrupted, by several hosts, with faults. Into a bucket of moto's S3 server where the
protocol matters, into fsspec's `memory://` where it does not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Self

import fsspec
import numpy as np
import pytest
from PIL import Image

from extract import cells
from extract.config import ConfigError, load_config
from extract.plan import DifferentStore
from extract.run import run_extraction
from store import remote, remote_locks, staging, upload
from store.errors import LockedError, StoreError
from store.format import LEDGER
from store.reader import open_store
from store.remote import RemoteFiles
from store.remote_locks import RemoteLock
from store.replicate import replicate_store
from store.staging import open_staging
from tests.fault_proxy import (
    ACCESS_DENIED,
    EXPIRED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    Fault,
    Request,
    Rule,
    dropped,
    fault_proxy,
    lost,
    wrong_upload,
)
from tests.s3_servers import SECRET, SERVERS, moto_server, use_endpoint
from tests.test_extract.extractions import extract

SHARDS = 4 + 1  # of `options`: 49 training rows, 11 validation rows


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The URL of moto's S3 server."""
    with moto_server() as address:
        yield address


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01))
    for module in (staging, upload):
        monkeypatch.setattr(module, "LONG_PAUSES_S", (0.01, 0.01, 0.01))
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket of this test's own; s3:// is moto's server."""
    use_endpoint(monkeypatch, endpoint)
    name = f"bucket-{abs(hash(str(tmp_path)))}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def options(extract_options: dict[str, Any]) -> dict[str, Any]:
    """An extraction of five shards."""
    return {**extract_options, "out": "memory://bucket/a.zarr", "grid": 2, "shard_rows": 16}


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL but the times that were measured and those of the data set's files."""
    files, path = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {
        name[len(path) :].lstrip("/"): files.cat_file(name)
        for name in files.find(path)
        if not name.endswith("measured.json")
    }


class Crashed(Exception):
    """What ends an extraction in the middle."""


class CrashAfter:
    """An observer that ends the extraction once `rows` rows are encoded."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def progress(self, done: int, total: int, message: str) -> None:
        if done >= self.rows:
            raise Crashed


def crash(options: dict[str, Any], rows: int) -> None:
    """An extraction that ends so; with so little room, all shards before the last one have been sent by then."""
    options = {**options, "staging_gb": 1e-9}
    with pytest.raises(Crashed):
        run_extraction(load_config(options), [CrashAfter(rows)])


def files_below(folder: Path) -> dict[str, bytes]:
    """The same of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "measured.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def local_store(options: dict[str, Any], folder: Path, **changes: Any) -> dict[str, bytes]:
    """The files of the store that the same extraction makes on this disk."""
    options = {name: value for name, value in options.items() if name != "staging_gb"}
    extract(options, out=folder, **changes)
    return files_below(folder)


@pytest.mark.parametrize(
    "changes",
    [{}, {"views": 2, "images": "jpeg"}, {"logits": "probe"}],
    ids=["plain", "views", "logits"],
)
def test_the_bucket_has_the_bytes_of_a_local_store(
    options: dict[str, Any], bucket: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """With a bad image, so that there is a ledger; and what `cli copy` makes of a local store is the same."""
    shutil.copytree(options["data"], tmp_path / "data")
    next(iter(sorted((tmp_path / "data").rglob("*.png")))).write_bytes(b"no image")
    options |= {"out": f"{bucket}/a.zarr", "data": str(tmp_path / "data")}
    result = extract(options, **changes)
    assert (result.complete, result.encoded, result.bad, result.store) == (True, 60, 1, options["out"])
    local = tmp_path / "local.zarr"
    assert objects(options["out"]) == local_store(options, local, **changes)
    assert (local / LEDGER).exists()
    replicate_store(str(local), "memory://copy.zarr")
    assert objects(options["out"]) == objects("memory://copy.zarr")
    assert not list((tmp_path / "cache/qwen-distill/staging").glob("*/*"))
    assert open_store(options["out"]).fingerprint == result.fingerprint
    again = extract(options, **changes)
    assert (again.complete, again.encoded, again.rows) == (True, 0, 60)


@pytest.mark.parametrize("other_host", [False, True])
def test_an_interrupted_extraction_continues_here_and_on_another_host(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_host: bool
) -> None:
    crash(options, 40)
    sent = [key for key in objects(options["out"]) if key.endswith(".log")]
    assert len(sent) < SHARDS
    with pytest.raises(StoreError, match="incomplete"):
        open_store(options["out"])
    if other_host:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    result = extract(options)
    assert result.complete
    assert result.encoded <= 60 - 16 * len(sent)
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


def test_logits_come_with_the_store_or_not_at_all(
    options: dict[str, Any], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that is killed between the logits and the last upload, too; a complete store is not changed."""
    options |= {"out": f"{bucket}/a.zarr", "logits": "probe"}
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "publish", raise_crashed)
        with pytest.raises(Crashed):
            extract(options)
    assert not any("logits" in key for key in objects(options["out"]))
    result = extract(options)
    assert (result.complete, result.encoded) == (True, 0)
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")
    without = {**options, "out": f"{bucket}/b.zarr", "logits": "none"}
    extract(without)
    before = objects(without["out"])
    with pytest.raises(DifferentStore, match=r"complete, without logits/probe.*copy it to a folder"):
        extract(without, logits="probe")
    assert objects(without["out"]) == before


def raise_crashed(*_: object) -> None:
    raise Crashed


def test_damaged_features_are_not_probed(
    options: dict[str, Any], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"out": f"{bucket}/a.zarr", "logits": "probe"}
    fetch = staging.Staging.fetch

    def fetch_damaged(stage: staging.Staging, arrays: list[str]) -> None:
        key = "train/features/pooled/c/1/0"
        stage.remote.write(key, bytes(len(stage.remote.read(key))))
        fetch(stage, arrays)

    monkeypatch.setattr(staging.Staging, "fetch", fetch_damaged)
    with pytest.raises(StoreError, match=r"pooled/c/1/0: is damaged.*--overwrite"):
        extract(options)


def test_a_probe_of_masks_reads_the_grids_of_the_bucket(
    options: dict[str, Any], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maps are uploaded with the rest; without space for the grids, the error is one line."""
    monkeypatch.setattr(cells, "STEPS", 5)
    data = str(write_masks(tmp_path / "data", 24))
    options |= {"data": data, "source": "masks", "out": f"{bucket}/a.zarr", "logits": "probe"}
    with monkeypatch.context() as patch:
        full = SimpleNamespace(rmtree=shutil.rmtree, disk_usage=lambda _: SimpleNamespace(free=0))
        patch.setattr(staging, "shutil", full)
        with pytest.raises(StoreError, match=r"features are to be read again, 0\.00 GB are free"):
            extract(options)
    result = extract(options)
    assert result.probe is not None
    assert (result.complete, result.encoded, result.probe["array"]) == (True, 0, "maps/probe")
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


def write_masks(root: Path, count: int) -> Path:
    """Gray images whose left part, of another width each, is white and of class 1."""
    for number in range(count):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, : 1 + number] = 1
        for folder, values in (("images", mask * 200), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / folder / f"{number:02d}.png")
    return root


def test_a_dry_run_looks_at_the_bucket(options: dict[str, Any], bucket: str, tmp_path: Path) -> None:
    """What it finds is what the run does, and nothing is changed: not there, not here."""
    options |= {"out": f"{bucket}/a.zarr", "images": "jpeg"}

    def dry(**changes: Any) -> tuple[str, int]:
        before = objects(options["out"])
        estimate = extract(options, dry_run=True, **changes).estimate
        assert objects(options["out"]) == before
        assert estimate is not None
        return estimate["state"], estimate["to_encode"]

    assert dry() == ("starts", 60)
    assert not list(tmp_path.glob("cache/qwen-distill/staging/*"))
    crash(options, 40)
    there = 16 * len([key for key in objects(options["out"]) if key.endswith(".log")])
    state, left = dry()
    assert (state, dry(overwrite=True)) == ("resumes", ("starts", 60))
    assert left <= 60 - there
    assert dry(staging_dir=tmp_path / "other") == ("resumes", 60 - there)
    with pytest.raises(
        DifferentStore, match=r"s3://.*a\.zarr was made with other options: grid is 2, asked for 4"
    ):
        dry(grid=4)
    assert extract(options).encoded == left
    assert dry() == ("complete", 0)
    changed = tmp_path / "data"
    shutil.copytree(options["data"], changed)
    next(iter(sorted(changed.rglob("*.png")))).unlink()
    with pytest.raises(DifferentStore, match=r"1 removed.*not updated in place"):
        dry(data=str(changed))


def test_a_dry_run_ends_with_the_line_of_the_run(
    options: dict[str, Any], bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/other/notes.txt".removeprefix("s3://"), b"x")

    def lines(**changes: Any) -> list[str]:
        found = []
        for dry_run in (False, True):
            with pytest.raises(StoreError) as error:
                extract(options, **changes, dry_run=dry_run)
            found.append(re.sub(r"\.work/\S*", "KEY", str(error.value)))
        return found

    for changes, line in (
        ({"out": "s3://absent/a.zarr"}, "is there such a bucket"),
        ({"out": f"{bucket}/other"}, "exists and is no store"),
        ({"out": f"{bucket}/other", "overwrite": True}, "deletes stores only"),
        ({"out": "https://example.org/a.zarr"}, "a web server cannot be written to"),
    ):
        real, dry = lines(**changes)
        assert real == dry
        assert line in dry

    def read_only(request: Request) -> Fault | None:
        return ACCESS_DENIED if request.method == "PUT" else None

    with fault_proxy(endpoint, read_only) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        real, dry = lines(out=f"{bucket}/a.zarr")
        assert real == dry
        assert "no permission: check the credentials" in dry


def test_hosts_with_ranges_of_shards_make_one_store(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for number, part in enumerate(["2:4", "0:2", "4:"]):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{number}"))
        results.append(extract(options, shard_range=part))
    assert [result.encoded for result in results] == [17, 32, 11]
    assert [result.complete for result in results] == [False, False, True]
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


@pytest.mark.slow
def test_several_devices_fill_one_staging_folder(options: dict[str, Any], tmp_path: Path) -> None:
    """With room for one shard and with room for all; a killed run's shards are not encoded again."""
    expected = local_store(options, tmp_path / "local.zarr")
    crash(options, 40)
    there = 16 * len([key for key in objects(options["out"]) if key.endswith(".log")])
    result = extract(options, device="cpu,cpu", staging_gb=1e-9)
    assert (result.complete, result.encoded <= 60 - there) == (True, True)
    assert objects(options["out"]) == expected
    result = extract(options, device="cpu,cpu", overwrite=True)
    assert (result.complete, result.encoded) == (True, 60)
    assert objects(options["out"]) == expected


def test_staging_is_bounded(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow line, encoding waits until a shard has left."""
    seen = []
    folder = load_config(options).folder
    plain = RemoteFiles.write

    def slow(self: RemoteFiles, key: str, data: Any) -> str:
        if "/c/" in key:
            time.sleep(0.2)
            seen.append(len(list(folder.glob("*/features/pooled/c/*/0*"))))
        return plain(self, key, data)

    monkeypatch.setattr(RemoteFiles, "write", slow)
    extract(options, staging_gb=1e-9)
    assert len(seen) > 2 * SHARDS  # files of shards, and of small arrays
    assert max(seen) == 1
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


def test_what_changed_in_the_bucket_is_encoded_again(options: dict[str, Any], tmp_path: Path) -> None:
    """A shard that was deleted, and one that is another than the one that was sent."""
    crash(options, 56)
    files = fsspec.filesystem("memory")
    sent = sorted(key for key in objects(options["out"]) if key.endswith(".log"))
    first, second = (int(key.rpartition("/")[2].removesuffix(".log")) for key in sent[:2])
    place = "/bucket/a.zarr/train/features/pooled/c"
    files.rm_file(f"{place}/{first}/0")
    files.pipe_file(f"{place}/{second}/0", files.cat_file(f"{place}/{second}/0")[:-1])
    assert extract(options).complete
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


def test_overwrite_changed_data_and_other_options(options: dict[str, Any], tmp_path: Path) -> None:
    extract(options)
    with pytest.raises(DifferentStore, match=r"a\.zarr was made with other options: grid is 2, asked for 4"):
        extract(options, grid=4)
    changed = {**options, "data": str(tmp_path / "data")}
    shutil.copytree(options["data"], changed["data"])
    next(iter(sorted(Path(changed["data"]).rglob("*.png")))).unlink()
    with pytest.raises(DifferentStore, match=r"1 removed.*not updated in place: copy it to a folder"):
        extract(changed)
    assert extract(changed, overwrite=True).rows == 59
    assert objects(options["out"]) == local_store(changed, tmp_path / "local.zarr")


def test_no_credential_is_stored(options: dict[str, Any], bucket: str) -> None:
    options["out"] = f"{bucket}/a.zarr"
    crash(options, 40)
    assert not [key for key, data in objects(options["out"]).items() if SECRET.encode() in data]
    extract(options)
    assert not [key for key, data in objects(options["out"]).items() if SECRET.encode() in data]


def test_what_cannot_be_written_is_one_line(
    options: dict[str, Any], bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"s3://absent/a\.zarr.*is there such a bucket"):
        extract(options, out="s3://absent/a.zarr")
    options["out"] = f"{bucket}/a.zarr"
    fsspec.filesystem("s3").pipe_file(f"{bucket}/other/notes.txt".removeprefix("s3://"), b"x")
    with pytest.raises(StoreError, match=r"other: exists and is no store"):
        extract(options, out=f"{bucket}/other")
    with pytest.raises(StoreError, match="a web server cannot be written to"):
        extract(options, out="https://example.org/a.zarr")
    with pytest.raises(ConfigError, match="takes no scheduler"):
        extract(options, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ConfigError, match="--staging-dir and --staging-gb are for a URL"):
        load_config({**options, "out": "a.zarr", "staging_gb": 3})
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"does not work.*check address and network") as error:
        extract(options)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("server", SERVERS)
def test_a_file_is_created_once_on_every_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers word the refusal of a conditional put differently."""
    with SERVERS[server]() as endpoint:
        use_endpoint(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("created")
        files = RemoteFiles("s3://created/a.zarr")
        assert [files.create("lock", data) for data in (b"one", b"two", b"one")] == [True, False, True]
        assert files.read("lock") == b"one"
        lock = RemoteLock(files, "shards", 0, 4)
        with pytest.raises(LockedError, match="already being written"):
            RemoteLock(files, "shards", 0, 4)
        lock.release()


class TestLocks:
    def test_one_of_two_gets_it(self, bucket: str) -> None:
        files = RemoteFiles(f"{bucket}/locks.zarr")
        lock = RemoteLock(files, "shards", 0, 4)
        with pytest.raises(
            LockedError, match=r"already being written: shards 0:4, process \d+ on .*--break-lock"
        ):
            RemoteLock(files, "shards", 0, 4)
        with pytest.raises(LockedError):
            RemoteLock(files, "shards", 3, 8)
        RemoteLock(files, "shards", 4, 8).release()
        lock.check()
        lock.release()
        RemoteLock(files, "shards", 3, 8).release()
        assert not files.listing()

    def test_of_many_that_begin_together_one_gets_it(self, bucket: str) -> None:
        files = RemoteFiles(f"{bucket}/locks.zarr")
        got: list[RemoteLock] = []

        def begin() -> None:
            with contextlib.suppress(LockedError):
                got.append(RemoteLock(files, "store", 0, 1))

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()

    def test_a_stale_one_is_taken_over_once_and_its_owner_notices(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = RemoteFiles(f"{bucket}/locks.zarr")
        monkeypatch.setattr(
            remote_locks, "ended_here", lambda owner: None
        )  # as for a process of another host
        old = RemoteLock(files, "shards", 0, 4)
        with pytest.raises(LockedError):
            RemoteLock(files, "shards", 0, 4)
        monkeypatch.setattr(remote_locks, "STALE_AFTER_S", -1)
        new = RemoteLock(files, "shards", 0, 4)
        with pytest.raises(StoreError, match="taken over by another process"):
            old.check()
        new.check()
        old.release()
        new.check()
        new.release()

    def test_a_file_system_without_conditional_put(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(remote_locks, "SETTLE_S", 0.05)
        monkeypatch.setattr(remote, "CREATE_WORKS", set())
        plain = fsspec.get_filesystem_class("memory").pipe_file
        monkeypatch.setattr(
            fsspec.get_filesystem_class("memory"),
            "pipe_file",
            lambda self, path, value, mode="overwrite", **rest: plain(self, path, value),
        )
        files = RemoteFiles("memory://locks.zarr")
        lock = RemoteLock(files, "shards", 0, 4)
        assert "cannot create a file only if there is none" in caplog.text
        with pytest.raises(LockedError):
            RemoteLock(files, "shards", 0, 4)
        lock.release()


def test_one_process_in_a_staging_folder(tmp_path: Path) -> None:
    url = "memory://bucket/a.zarr"
    with (
        open_staging(url, tmp_path, 0),
        pytest.raises(LockedError, match=r"another process of this machine is writing it.*--shard-range"),
        open_staging(url, tmp_path, 0),
    ):
        pass
    with open_staging(url, tmp_path, 0):
        pass


def test_the_writer_of_a_lost_lock_commits_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: RemoteLock) -> None:
        raise StoreError("this writer's lock was taken over")

    monkeypatch.setattr(RemoteLock, "check", lost)
    with pytest.raises(StoreError, match="taken over"):
        extract(options)
    assert not [key for key in objects(options["out"]) if key.endswith(".log")]


def test_a_folder_behind_a_url(options: dict[str, Any], tmp_path: Path) -> None:
    options["out"] = f"file://{tmp_path}/bucket/a.zarr"
    crash(options, 40)
    assert extract(options).complete
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


@pytest.mark.slow
def test_throttling_lost_answers_and_wrong_bytes(
    options: dict[str, Any], endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file meets another fault at its first request; the bytes in the bucket are those of a local store."""
    faults = (SLOW_DOWN, lost, INTERNAL_ERROR, dropped, wrong_upload)

    def rule(request: Request) -> Fault | None:
        fault = faults[zlib.crc32(request.path.encode()) % len(faults)]
        return fault if request.method == "PUT" and request.count == 1 and "a.zarr" in request.path else None

    with fault_proxy(endpoint, rule) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        fsspec.filesystem("s3").mkdir("faults")
        options["out"] = "s3://faults/a.zarr"
        assert extract(options).complete
        assert len({path for method, path in proxy.requests if method == "PUT"}) > 60
    use_endpoint(monkeypatch, endpoint)
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


@pytest.mark.slow
def test_an_outage_and_expired_credentials_end_with_a_line_and_continue(
    options: dict[str, Any], endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_a_shard(fault: Fault) -> Rule:
        def rule(request: Request) -> Fault | None:
            over = any(path.endswith(".log") for method, path in proxy.requests if method == "PUT")
            # The lock can be released: otherwise it is that of a living process, this one.
            return (
                fault if over and request.method != "DELETE" and not request.path.endswith(".log") else None
            )

        return rule

    with fault_proxy(endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        fsspec.filesystem("s3").mkdir("outage")
        options |= {"out": "s3://outage/a.zarr", "staging_gb": 1e-9}
        for fault, line in {
            EXPIRED: r"s3://outage/a.zarr/.*: the credentials have expired: renew them, then run the same command again",
            ACCESS_DENIED: r"s3://outage/a.zarr/.*: no permission: check the credentials",
            dropped: r"s3://outage/a.zarr/.*: does not work: .* then run the same command again",
        }.items():
            proxy.requests.clear()
            proxy.rule = after_a_shard(fault)
            with pytest.raises(StoreError, match=line) as error:
                extract(options)
            assert SECRET not in str(error.value)
        proxy.rule = None
        result = extract(options)
    assert result.complete
    assert result.encoded <= 60 - 2 * 16
    use_endpoint(monkeypatch, endpoint)
    assert objects(options["out"]) == local_store(options, tmp_path / "local.zarr")


def test_no_credentials(
    options: dict[str, Any], bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    use_endpoint(monkeypatch, endpoint, key=None, secret=None)
    with pytest.raises(StoreError, match="no credentials: set them as for the provider's own tools"):
        extract(options, out=f"{bucket}/a.zarr")


KILLS = int(os.environ.get("CRASH_KILLS", "15"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_random_moments(options: dict[str, Any], bucket: str, tmp_path: Path) -> None:
    """Every store that is finished in spite of the kills has the bytes of a local one; sometimes the host changes."""
    expected = local_store(options, tmp_path / "local.zarr")
    random = Random(0)
    folder = tmp_path / "staging"
    killed, moments, finished, hosts, seconds = 0, [], 0, 0, 0.0

    with Extractions(tmp_path / "output.txt") as extractions:
        while killed < KILLS or finished < 2:
            url = f"{bucket}/{finished}.zarr"
            started = time.monotonic()
            extractions.start(command({**options, "out": url, "staging_dir": folder}))
            code = extractions.wait(random.uniform(0, seconds) if seconds and killed < KILLS else None)
            if code == -signal.SIGKILL:
                killed += 1
                moments.append(time.monotonic() - started)
                if random.random() < 0.3:
                    hosts += 1
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            assert code == 0, extractions.output.read_text()
            seconds = seconds or time.monotonic() - started
            assert objects(url) == expected
            fsspec.filesystem("s3").rm(url, recursive=True)
            finished += 1
    print(
        f"{killed} kills after {min(moments):.2f} to {max(moments):.2f} s, {finished} stores, {hosts} changes of host"
    )


@pytest.mark.slow
def test_two_hosts_at_the_very_same_time(options: dict[str, Any], bucket: str, tmp_path: Path) -> None:
    """They share nothing but the bucket: both want to plan, and both may find that all shards are there."""
    expected = local_store(options, tmp_path / "local.zarr")
    with Extractions(tmp_path / "one.txt") as one, Extractions(tmp_path / "two.txt") as two:
        for number in range(3):
            url = f"{bucket}/{number}.zarr"
            for host, part in ((one, "0:2"), (two, "2:")):
                staging_dir = tmp_path / host.output.stem
                changes = {"out": url, "staging_dir": staging_dir, "shard_range": part}
                host.start(command({**options, **changes}))
            codes = [one.wait(), two.wait()]
            assert codes == [0, 0], one.output.read_text() + two.output.read_text()
            assert objects(url) == expected


def test_another_host_begins_between_two_requests_of_a_listing(
    bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs asks a second time where it found nothing: is the address itself a file?"""
    address = f"{bucket}/a.zarr".removeprefix("s3://")
    other = fsspec.filesystem("s3", skip_instance_cache=True, endpoint_url=endpoint, use_listings_cache=False)
    begun = []

    def begins(request: Request) -> Fault | None:
        if (request.method, request.path) == ("HEAD", address) and not begun:
            begun.append(request)
            other.pipe_file(f"{address}/{staging.PLAN}", b"{}")
        return None

    with fault_proxy(endpoint, begins) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        assert RemoteFiles(f"{bucket}/a.zarr").listing() == {}
        assert begun
        assert list(RemoteFiles(f"{bucket}/a.zarr").listing()) == [staging.PLAN]


def command(options: dict[str, Any]) -> list[str]:
    """The words of `cli extract` with these options."""
    given = {name: value for name, value in options.items() if name != "data"}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["extract", str(options["data"]), *words]


class Extractions:
    """Runs `cli extract` in forks of one process, see bucket_kills.py."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bucket_kills.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        assert self.line() == "ready"
        return self

    def __exit__(self, *details: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def start(self, arguments: list[str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(self.output), *arguments]).encode() + b"\n")
        self.child = int(self.line())

    def wait(self, kill_after_s: float | None = None) -> int:
        """The command's exit code, -9 when it was killed."""
        assert self.process.stdout is not None
        if kill_after_s is not None and not select.select([self.process.stdout], [], [], kill_after_s)[0]:
            os.kill(self.child, signal.SIGKILL)
        return int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()
