"""The process that watches over the work: what it does when the work does not end, and what it says then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.task import main
from backend.task.call_queue import CallQueue
from backend.task.calls import read_calls
from backend.task.http_client import HttpClient
from backend.task.main import Supervisor, exit_code
from backend.task.request import read_request
from processes.stop import StopRequest
from tests.test_backend.platform_site import Site

ROOT = Path(__file__).resolve().parents[2]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
ORPHAN = """
import hashlib, os, signal, sys
from backend.task import worker

def stuck(request, sender, stop):
    print("up", flush=True)
    while True:  # one long operation after another
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

worker.ORPHAN_STOP_S, worker.work, worker.read_request = 0.1, stuck, lambda words: None
os.environ[worker.PIPE_VARIABLE] = str(os.open(os.devnull, os.O_WRONLY))
worker.main(["task", str(os.getppid()) if sys.argv[1] == "signal" else "1", "--task_id", "7"])
"""


def queue(folder: Path) -> CallQueue:
    """One that has nothing to send."""
    return CallQueue(HttpClient("http://localhost:1"), folder / "undelivered.jsonl")


def asked_to_stop() -> StopRequest:
    stop = StopRequest()
    stop.set()
    return stop


@pytest.mark.parametrize(
    ("returncode", "delivered", "stopped", "expected"),
    [
        (0, True, False, 0),
        (0, False, False, 0),  # the work is done; what was not delivered is in undelivered.jsonl
        (1, True, False, 1),
        (2, True, False, 2),
        (-9, True, False, 137),
        (143, True, True, 143),
        (-15, True, True, 143),
        (1, True, True, 143),
        (None, True, True, 143),
        (0, True, True, 0),  # it had ended before
        (0, False, True, 143),  # started again, it reports what is missing
    ],
)
def test_exit_codes(returncode: int | None, delivered: bool, stopped: bool, expected: int) -> None:
    assert exit_code(returncode, delivered, asked_to_stop() if stopped else StopRequest()) == expected


def test_work_that_does_not_end_by_itself_is_ended(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "WORK_STOP_S", 0.3)
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    watching = Supervisor(read_request(site.words()), [], queue(tmp_path), asked_to_stop(), 30)
    assert watching.wait(process) is None
    assert process.wait(30) == -9
    assert main.REPORT_LEAST_S <= watching.time_to_report() < main.STOP_S
    assert watching.sudden_end(None) == "stopped; start the task again to resume from the last checkpoint"


def test_without_a_stop_the_report_has_the_operators_time(site: Site, tmp_path: Path) -> None:
    assert (
        Supervisor(read_request(site.words()), [], queue(tmp_path), StopRequest(), 45.0).time_to_report()
        == 45.0
    )


@pytest.mark.parametrize("way", ["signal", "orphan"])
def test_work_without_a_supervisor_ends_in_any_case(way: str) -> None:
    """After a signal that nobody follows up, and when the parent is not the one that started it any more."""
    command = [sys.executable, "-c", ORPHAN, way]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    if way == "signal":
        process.terminate()
    assert process.wait(60) == -9


def test_a_call_that_a_kill_cut_off_is_no_call() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"kind": "complete", "method": "POST", "path": "/x"}\n{"kind": "err')
    os.close(writing)
    assert [call.kind for call in read_calls(reading)] == ["complete"]


def test_a_second_signal_is_left_to_the_supervisor() -> None:
    stop = StopRequest(patient=True)
    stop.handle(15, None)
    first = stop.requested_at
    stop.handle(15, None)
    assert (stop.exit_code, stop.requested_at) == (143, first)
