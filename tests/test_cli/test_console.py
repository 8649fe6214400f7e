"""Progress lines, stop signals, tables."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from console import progress
from console.output import print_json, print_table
from console.progress import clock, track_progress
from files.writing import PARTIAL_PREFIX, OutputError, replace_file, whole_file
from processes.stop import StopRequest

ROOT = Path(__file__).parents[2]


def test_progress_is_plain_lines_outside_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    stream = io.StringIO()
    with track_progress(4, "encoding", "images", stream=stream) as bar:
        bar.advance(1)
        bar.note("one bad image")
        bar.advance(3)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("encoding: 1/4 images (25%)")
    assert "left" in lines[0]
    assert lines[1] == "one bad image"
    assert lines[-1].startswith("encoding: 4/4 images (100%)")
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_progress_rate_leaves_out_what_was_done_before() -> None:
    stream = io.StringIO()
    bar = progress.PlainProgress(1000, "encoding", "images", 900, stream)
    bar.started -= 10.0
    bar.advance(10)
    assert "910/1000" in bar.line()
    assert ", 1.0 images/s, 1:30 left" in bar.line()


def test_clock_has_hours_when_needed() -> None:
    assert [clock(5), clock(65), clock(3725)] == ["0:05", "1:05", "1:02:05"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_requests_a_stop_and_handlers_come_back(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.wait(5.0)
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_second_signal_ends_at_once() -> None:
    script = """
import os, signal, time
from processes.stop import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50, check=False)
    assert done.returncode == 143


def test_table_is_aligned_plain_text_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        [{"name": "resnet18", "top1": 0.5}, {"name": "vit", "top1": None}],
        {"name": "student", "top1": "top-1"},
    )
    assert capsys.readouterr().out.splitlines() == ["student   top-1", "resnet18    0.5", "vit           -"]


def test_json_has_plain_values_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {"path": Path("a/b"), "loss": float("nan"), "count": np.int64(3), "mean": np.array([1.5, 2.5])}
    )
    assert json.loads(capsys.readouterr().out) == {
        "path": "a/b",
        "loss": None,
        "count": 3,
        "mean": [1.5, 2.5],
    }


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    with whole_file(path) as partial:
        partial.write_text("first")

    def fill_the_disk() -> None:
        with whole_file(path) as partial:
            partial.write_text("sec")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.html: cannot be written: No space left"):
        fill_the_disk()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    (tmp_path / f"{PARTIAL_PREFIX}summary.json").write_text("a longer text, of a process that was killed")
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_leads_to_content_that_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content first, then the name, then the folder: the order that survives a power failure."""
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    replace_file(tmp_path / "a.json", b"{}")
    assert steps == [f"{PARTIAL_PREFIX}a.json", "rename", tmp_path.name]
