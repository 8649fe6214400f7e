"""Ranks that `--device A,B` and the platform start: their environment, their signals, their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from console.devices import core_share
from processes import ranks
from processes.ranks import run_ranks, shared_environment, visible_devices
from processes.stop import StopRequest

ROOT = Path(__file__).parents[2]
SCRIPT = "import os; open(os.environ['RANK'] + '.txt', 'w').write(os.environ['OMP_NUM_THREADS'])"


@pytest.mark.parametrize("chosen", [None, "3"])
def test_ranks_share_the_cores_unless_the_user_set_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert run_ranks(["-c", SCRIPT], ["cpu", "cpu"], StopRequest()).exit_code == 0
    expected = chosen or str(core_share({"LOCAL_WORLD_SIZE": "2"}))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [expected, expected]


def test_threads_of_three_ranks_on_twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("console.devices.available_cores", lambda: 12)
    assert shared_environment(["cpu"] * 3)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert shared_environment(["cpu"] * 3)["OMP_NUM_THREADS"] == "2"


def test_devices_count_within_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(["cuda:1", "cuda:0"]) == "1,0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3c")
    assert visible_devices(["cuda:1", "cuda:0"]) == "GPU-3c,5"


def test_a_failing_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys, time\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    monkeypatch.setattr(ranks, "FAILURE_GRACE_S", 0.2)
    exits = run_ranks(["-c", code], ["cpu", "cpu"], StopRequest())
    assert (exits.exit_code, exits.codes) == (7, [-9, 7])


def test_a_rank_that_a_signal_ended_counts_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)"
    monkeypatch.setattr(ranks, "FAILURE_GRACE_S", 0.2)
    assert run_ranks(["-c", code], ["cpu", "cpu"], StopRequest()).exit_code == 137


def test_input_reaches_every_rank_and_descriptors_rank_zero_alone(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "text = os.environ['RANK'] + sys.stdin.read() + os.environ.get('PIPE', '-')\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(text)\n"
        "os.write(int(os.environ['PIPE']), b'zero') if 'PIPE' in os.environ else None"
    )
    reading, writing = os.pipe()
    run_ranks(
        ["-c", code],
        ["cpu", "cpu"],
        StopRequest(),
        stdin=b" configuration ",
        of_rank_zero={"PIPE": str(writing)},
        descriptors_of_rank_zero=[writing],
    )
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        assert stream.read() == b"zero"
    assert (tmp_path / "0").read_text() == f"0 configuration {writing}"
    assert (tmp_path / "1").read_text() == "1 configuration -"


def test_a_signal_reaches_every_rank_and_gives_the_exit_code(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"Path({str(tmp_path)!r}, os.environ['RANK']).touch()\ntime.sleep(60)"
    )
    outer = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from processes.stop import StopRequest\nfrom processes.ranks import run_ranks\n"
        "with StopRequest() as stop:\n"
        "    sys.exit(run_ranks(['-c', sys.argv[1]], ['cpu', 'cpu'], stop).exit_code)"
    )
    process = subprocess.Popen([sys.executable, "-c", outer, script])
    while not all((tmp_path / name).exists() for name in "01"):
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 143
