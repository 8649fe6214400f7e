"""Killed at any moment, resumed, and not one bit differs."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_writer import build
from store_samples import files_of, small_arrays, small_block, small_manifest, write_rows

from store import finalize
from store.create import create_store, extend_store
from store.errors import StoreError
from store.finalize import finalize_store
from store.job import Job
from store.keys import Plan
from store.reader import open_store
from store.verify import verify_store
from store.writer import StoreWriter

KILLED = 9


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_same_store(path: Path, undisturbed: dict[str, bytes], what: Any) -> None:
    found = files_of(path)
    assert sorted(found) == sorted(undisturbed), what
    assert [name for name in found if found[name] != undisturbed[name]] == [], what


def die_at_call(number: int) -> None:
    """Make this process end, as kill -9 would, just before its n-th write, sync, rename, link or removal."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("write", "writev", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("codec", "step", "kills"), [("none", 23, 19), ("zstd", 67, 6)])
def test_killed_at_system_calls_all_over(tmp_path: Path, codec: str, step: int, kills: int) -> None:
    """Kill one run at its first call, the next at call 1 + step, … until a run ends by itself.

    These are the states that a killed process can leave, one after the other; all of them with CRASH_STEP=1.
    """
    build(tmp_path / "undisturbed.zarr", codec=codec)
    undisturbed = files_of(tmp_path / "undisturbed.zarr")
    step = int(os.environ.get("CRASH_STEP", step))
    number, killed = 1, 0
    while True:
        path = tmp_path / f"killed{number}.zarr"

        def run(path: Path = path, number: int = number) -> None:
            die_at_call(number)
            build(path, codec=codec)

        code = exit_code(in_child(run))
        assert code in (0, -KILLED)
        build(path, codec=codec)
        assert_same_store(path, undisturbed, f"killed at call {number}")
        assert not list(tmp_path.glob(".killed*")), number
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
        if code == 0:
            break
        killed += 1
        number += step
    assert killed >= kills


def test_killed_between_the_new_arrays_names_and_the_end_of_their_job(tmp_path: Path) -> None:
    build(tmp_path / "undisturbed.zarr")
    path = tmp_path / "killed.zarr"

    def run() -> None:
        def published(store: Path, job: Job) -> None:
            publish_manifest(store, job)
            if not job.owns_rows:
                os.kill(os.getpid(), signal.SIGKILL)

        publish_manifest = finalize.publish_manifest
        finalize.publish_manifest = published
        build(path)

    # The first logits are dropped with their job when rows are added; of the second, only the end is missing.
    assert [exit_code(in_child(run)) for _ in range(2)] == [-KILLED, -KILLED]
    assert (path / ".work" / "logits-probe").exists()
    build(path)
    assert_same_store(path, files_of(tmp_path / "undisturbed.zarr"), "killed")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9 from outside, 60 times or more, at moments spread over the whole run."""
    began = time.monotonic()
    build(tmp_path / "undisturbed.zarr")
    duration = time.monotonic() - began
    undisturbed = files_of(tmp_path / "undisturbed.zarr")
    generator = np.random.default_rng(int(os.environ.get("CRASH_SEED", "0")))
    kills = 0
    for trial in range(500):
        path = tmp_path / f"trial{trial}.zarr"
        while True:
            pid = in_child(lambda path=path: build(path))  # type: ignore[misc]
            time.sleep(generator.uniform(0, 1.2 * duration))
            os.kill(pid, signal.SIGKILL)
            code = exit_code(pid)
            assert code in (0, -KILLED)
            if code == 0:
                break
            kills += 1
        assert_same_store(path, undisturbed, f"trial {trial}")
        if kills >= 60:
            break
    assert kills >= 60
    assert verify_store(path) == []


def test_killed_as_a_process_of_its_own(tmp_path: Path) -> None:
    """The same through a fresh interpreter, as a user's run would be."""
    build(tmp_path / "undisturbed.zarr")
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder.parent.parent}"}
    path = tmp_path / "killed.zarr"
    command = [sys.executable, str(folder / "crash_writer.py"), str(path)]
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(path.glob("train/features/grid/c/1/*/*/*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
    subprocess.run(command, env=environment, check=True)
    assert_same_store(path, files_of(tmp_path / "undisturbed.zarr"), "killed")


def limited_file_size(path: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_rows(path, "train")
    except StoreError as error:
        os._exit(42 if "the limit on file size is reached" in str(error) else 43)


@pytest.mark.parametrize("limit", [1, 5_000, 9_000])
def test_limit_on_file_size_fails_cleanly_and_resumes(make_store: Any, limit: int) -> None:
    undisturbed = make_store("one.zarr", shard_rows=256, train=300)
    path = make_store("two.zarr", complete=False, shard_rows=256, train=300)
    assert exit_code(in_child(lambda: limited_file_size(path, limit))) == 42
    write_rows(path, "train")
    finalize_store(path)
    assert_same_store(path, files_of(undisturbed), limit)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("megabytes", [1, 2])
def test_full_disk_fails_cleanly_and_resumes(make_store: Any, tmp_path: Path, megabytes: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        keys = {"train": [f"train/{row:05d}.jpg" for row in range(16_000)]}
        path = disk / "full.zarr"
        with pytest.raises(
            StoreError, match=r"the disk is full: free some space, then run the same command again"
        ):
            fill(path, keys)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        fill(path, keys)
        finalize_store(path)
        assert verify_store(path) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_read_only_folder_is_read_and_refused_for_writing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path, keys = disk / "s.zarr", {"train": [str(row) for row in range(100)]}
        create_store(path, small_manifest(), Plan(keys, shard_rows=64), small_arrays())
        create_store(disk / "half.zarr", small_manifest(), Plan(keys, shard_rows=64), small_arrays())
        write_rows(path, "train")
        finalize_store(path)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert verify_store(path) == []
        assert open_store(path)["train"].gather([5], ["features/grid"])["features/grid"].shape == (
            1,
            2,
            2,
            16,
        )
        with pytest.raises(StoreError, match="the file system is read-only: choose another folder"):
            StoreWriter(disk / "half.zarr", "train")
        with pytest.raises(StoreError, match="the file system is read-only: choose another folder"):
            create_store(disk / "new.zarr", small_manifest(), Plan(keys), small_arrays())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path, keys: dict[str, list[str]]) -> None:
    if not path.exists():
        create_store(path, small_manifest(), Plan(keys, batch_rows=512, shard_rows=1024), small_arrays())
    block = small_block(0, 512)
    with StoreWriter(path, "train") as writer:
        for start, stop in writer.batches():
            writer.append({name: values[: stop - start] for name, values in block.items()})


def test_an_error_in_the_middle_leaves_a_writer_that_refuses(
    make_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer does not go on after a failed write: it cannot know what is on disk."""
    path = make_store(complete=False, train=100)
    undisturbed = make_store("other.zarr", train=100)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with StoreWriter(path, "train", commit_rows=16) as writer:
        writer.append(small_block(0, 16))
        writer.commit()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            writer.append(small_block(16, 24))
            with pytest.raises(StoreError, match="the disk is full"):
                writer.commit()
        with pytest.raises(StoreError, match="an earlier write failed; open a new writer"):
            writer.append(small_block(24, 32))
    with StoreWriter(path, "train") as writer:
        assert writer.next_row == 24  # recorded, and their data turned out to be there
    write_rows(path, "train")
    finalize_store(path)
    assert_same_store(path, files_of(undisturbed), "after a full disk")


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize(
    ("kept_bytes", "resumes_at"),
    [(None, 96), (0, 64), (1, 64), (16 * 32, 80), (16 * 32 + 5, 80), (17 * 32, 80)],
)
def test_a_power_failure_may_keep_records_and_lose_their_data(
    make_store: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    codec: str,
    kept_bytes: int | None,
    resumes_at: int,
) -> None:
    """Resuming goes back to the last record whose data are there. Here the second shard's pooled file lost some."""
    arrays = [spec.model_copy(update={"codec": codec if spec.direct else "none"}) for spec in small_arrays()]
    keys = {"train": [str(row) for row in range(150)]}
    stores = [tmp_path / name for name in ("one.zarr", "two.zarr")]
    for path in stores:
        create_store(path, small_manifest(), Plan(keys, batch_rows=8, shard_rows=64), arrays)
    write_rows(stores[0], "train")
    finalize_store(stores[0])
    with StoreWriter(stores[1], "train", commit_rows=16) as writer:
        for start in range(0, 96, 8):
            writer.append(small_block(start, start + 8))
    partial = stores[1] / "train/features/pooled/c/1/0.partial"
    data = partial.read_bytes()
    assert len(data) == 32 * 32
    if kept_bytes is not None:
        partial.write_bytes(data[:kept_bytes] + (bytes(len(data) - kept_bytes) if kept_bytes % 2 else b""))
    with StoreWriter(stores[1], "train") as writer:
        assert writer.next_row == resumes_at
    assert ("are written again" in caplog.text) == (resumes_at < 96)
    write_rows(stores[1], "train")
    finalize_store(stores[1])
    assert_same_store(stores[1], files_of(stores[0]), kept_bytes)


def test_rows_of_an_earlier_job_are_not_written_again(make_store: Any) -> None:
    """An extension cannot make rows anew that it was not given: damage to them is an error."""
    path = make_store(train=100)
    extend_store(path, {"train": ["new"]})
    partial = path / "train/features/pooled/c/1/0.partial"
    partial.write_bytes(bytes(len(partial.read_bytes())))
    with pytest.raises(StoreError, match=r"rows 64:100 were stored before and are damaged now"):
        StoreWriter(path, "train")
    assert list((path / ".work/features/locks").iterdir()) == []  # the refused writer holds nothing


def test_a_killed_writer_loses_no_commit(make_store: Any, tmp_path: Path) -> None:
    """However far the disk is behind: rows appended as fast as they can be, then kill -9."""
    path = make_store(complete=False, shard_rows=65_536, train=60_000)
    block = small_block(0, 64)
    appended = tmp_path / "appended"

    def run() -> None:
        with StoreWriter(path, "train") as writer:
            for start in range(0, 40_000, 64):
                writer.append(block)
                if start > 20_000:
                    appended.write_text(str(start + 64))
                    os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(in_child(run)) == -KILLED
    with StoreWriter(path, "train") as writer:
        assert 0 <= int(appended.read_text()) - writer.next_row < 1024
