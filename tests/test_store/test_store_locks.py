"""Who may write: live writers are left alone, dead ones replaced."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from store.errors import LockedError
from store.locks import STALE_AFTER_S, RowLock, is_abandoned, process_start, read_owner, this_process

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from store.locks import RowLock
lock = RowLock(Path(sys.argv[1]).parent, "train", 0, 64)
print("held", flush=True)
time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds rows 0:64."""
    root = str(Path(__file__).parent.parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), root], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_live_lock_is_refused_and_a_dead_one_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "locks"
    process = holder(folder)
    try:
        with pytest.raises(LockedError, match=rf"train rows 0:64, process {process.pid} on .* since 20"):
            RowLock(folder.parent, "train", 32, 128)
        RowLock(folder.parent, "train", 64, 128).release()
        RowLock(folder.parent, "val", 0, 64).release()
        assert len(list(folder.iterdir())) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with caplog.at_level(logging.WARNING):
        RowLock(folder.parent, "train", 32, 128).release()
    assert f"took over the lock of a dead writer: train rows 0:64, process {process.pid}" in caplog.text
    assert list(folder.iterdir()) == []


def write_owner(folder: Path, age: float, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    owner = asdict(this_process("train", 0, 64)) | fields
    path = folder / "other.lock"
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def abandoned(path: Path) -> bool:
    owner = read_owner(path)
    assert owner is not None
    return is_abandoned(path, owner)


def test_a_reused_process_id_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    assert abandoned(write_owner(folder, 0, process_start="1"))
    assert not abandoned(write_owner(folder, 10 * STALE_AFTER_S))  # alive, however long it was not heard of


@pytest.mark.parametrize("elsewhere", [{"boot": "another boot"}, {"namespace": "pid:[1]"}, {"host": "other"}])
def test_a_process_that_cannot_be_looked_up_is_judged_by_its_heartbeat(
    tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    """Another machine or container of the same name must not pass for a dead process of this one."""
    folder = tmp_path / "locks"
    assert not abandoned(write_owner(folder, 0, process_start="1", **elsewhere))
    assert abandoned(write_owner(folder, 1.5 * STALE_AFTER_S, **elsewhere))


def test_another_host_is_stale_when_its_heartbeat_stops(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    write_owner(folder, STALE_AFTER_S / 2, host="elsewhere")
    with pytest.raises(LockedError, match="on elsewhere"):
        RowLock(folder.parent, "train", 0, 10)
    write_owner(folder, STALE_AFTER_S * 1.5, host="elsewhere")
    RowLock(folder.parent, "train", 0, 10).release()
    assert list(folder.iterdir()) == []


def test_break_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "locks"
    write_owner(folder, 0, host="elsewhere")
    with caplog.at_level(logging.WARNING):
        RowLock(folder.parent, "train", 0, 10, break_lock=True).release()
    assert "broke the lock of train rows 0:64" in caplog.text


def test_heartbeat_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.locks.HEARTBEAT_S", 0.01)
    lock = RowLock(tmp_path, None, 0, 0)
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 60
    while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 0
    lock.release()
    assert not lock.path.exists()


def test_the_heart_beats_on_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network disk that is away for a moment must not make a live lock stale."""
    monkeypatch.setattr("store.locks.HEARTBEAT_S", 0.01)
    utime, beats = os.utime, []

    def away_at_first(path: Path) -> None:
        beats.append(path)
        if len(beats) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        utime(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", away_at_first)
        lock = RowLock(tmp_path, None, 0, 0)
        deadline = time.monotonic() + 60
        while len(beats) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        lock.release()
    assert len(beats) >= 5
    assert "Stale file handle" in caplog.text


def test_an_unreadable_lock_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "torn.lock").write_text('{"host"')
    RowLock(tmp_path, "train", 0, 1).release()


def test_a_forked_child_does_not_release(tmp_path: Path) -> None:
    lock = RowLock(tmp_path, "train", 0, 1)
    pid = os.fork()
    if pid == 0:
        lock.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert lock.path.exists()
    lock.release()


def test_process_start_of_nobody() -> None:
    assert process_start(2**22 + 1) is None
    assert process_start(os.getpid()) == process_start(os.getpid())
