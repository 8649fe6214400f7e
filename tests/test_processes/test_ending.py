"""Processes end in time after a stop, and with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from processes.children import block_stop_signals, ignore_sigint, stop_group

ROOT = Path(__file__).parents[2]
STUCK = """
import hashlib, multiprocessing, sys, time
from processes.stop import StopRequest
from processes.stop import StopDeadline

def main():
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    reported = lambda stopped: print("reported", stopped.exit_code, flush=True)
    with StopRequest() as stop, StopDeadline(stop, lambda: "saved", orderly_s=0.2, report=reported):
        print(child.pid, flush=True)
        if sys.argv[1] == "set":
            stop.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one operation of minutes: no signal handler runs

if __name__ == "__main__":
    main()
"""
ORDERLY = """
import time
from processes.stop import StopRequest
from processes.stop import StopDeadline

def save():
    raise AssertionError("the work had stopped by itself")

with StopRequest() as stop:
    with StopDeadline(stop, save, orderly_s=0.3) as deadline:
        print("ready", flush=True)
        stop.wait(30)
        {stopping}
    time.sleep(0.6)
print("end")
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = """
import signal, sys, time
from processes.children import end_with_parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent(int(sys.argv[1]), signal.SIGKILL)
time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


@pytest.mark.parametrize("way", ["signal", "set"])
def test_a_process_inside_one_long_operation_saves_and_ends_in_time(way: str, tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    process = subprocess.Popen(
        [sys.executable, str(script), way],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child = int(line_of(process))
    if way == "signal":
        process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), err.strip()) == (143, "reported 143", "saved")
    wait_gone(child)


@pytest.mark.parametrize("stopping", ["", "deadline.acknowledge(); time.sleep(0.6)"])
def test_work_that_stops_by_itself_is_left_alone(stopping: str) -> None:
    process = start(ORDERLY.format(stopping=stopping))
    assert line_of(process) == "ready"
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), err) == (0, "end", "")


def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = start(PARENT, CHILD)
    child = int(line_of(parent))
    parent.kill()
    wait_gone(child)
    parent.communicate()


def test_a_group_that_ignores_sigterm_is_killed() -> None:
    code = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    process = start(code)
    child = int(line_of(process))
    stop_group(process, grace_s=0.2)  # type: ignore[arg-type]
    assert process.returncode == -signal.SIGKILL
    wait_gone(child)


def test_signals_that_started_processes_do_not_get() -> None:
    code = "import time; print('ready', flush=True); time.sleep(60)"
    with ignore_sigint():
        deaf = start(code)
    with block_stop_signals():
        blocked = start(code)
    for process in (deaf, blocked):
        assert line_of(process) == "ready"
        process.send_signal(signal.SIGINT)
    blocked.terminate()
    time.sleep(0.2)
    assert (deaf.poll(), blocked.poll()) == (None, None)
    for process in (deaf, blocked):
        process.kill()
        process.communicate()
