"""The cores of this process: affinity and a container's CPU quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from console.devices import available_cores


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def test_affinity_counts_without_a_quota(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 16


@pytest.mark.parametrize(
    ("text", "cores"),
    [("400000 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 16)],
)
def test_quota_of_cgroup_v2(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize("text", ["max 100000", "", "nonsense"])
def test_no_quota_of_cgroup_v2(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert available_cores(tmp_path) == 16
