"""Ranks that `--device A,B` starts: their environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from console.cores import core_share
from train.loop.launch import launch_ranks

SCRIPT = "import os; open(os.environ['RANK'] + '.txt', 'w').write(os.environ['OMP_NUM_THREADS'])"


@pytest.mark.parametrize("chosen", [None, "3"])
def test_ranks_share_the_cores_unless_the_user_set_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert launch_ranks(["-c", SCRIPT], ["cpu", "cpu"]) == 0
    expected = chosen or str(core_share({"LOCAL_WORLD_SIZE": "2"}))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [expected, expected]


def test_platform_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from backend.ranks import shared_environment

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("console.cores.available_cores", lambda: 12)
    assert shared_environment(["cpu"] * 3)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert shared_environment(["cpu"] * 3)["OMP_NUM_THREADS"] == "2"
