"""Lock files: one holder at a time, released when its process ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from files.locking import locked
from tests.paths import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from files.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class GivenUpError(Exception):
    pass


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waited: list[float] = []

    def wait(waited_s: float) -> None:
        waited.append(waited_s)
        if len(waited) == 2:
            holder.send_signal(signal.SIGKILL)
        if len(waited) > 500:
            raise GivenUpError
        time.sleep(0.05)

    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with locked(path, wait) as file:
            file.write(b"ours")
    assert len(waited) >= 2
    assert waited[0] == 0.0
    assert waited == sorted(waited)
    assert path.read_bytes() == b"ours"


def test_what_wait_raises_gives_up_and_threads_exclude_each_other(tmp_path: Path) -> None:
    def refuse(waited_s: float) -> None:
        raise GivenUpError

    with locked(tmp_path / "lock"):
        with pytest.raises(GivenUpError), locked(tmp_path / "lock", refuse):
            pass
        entered = threading.Event()

        def enter() -> None:
            with locked(tmp_path / "lock"):
                entered.set()

        other = threading.Thread(target=enter)
        other.start()
        assert not entered.wait(0.2)
    other.join(10)
    assert entered.is_set()
