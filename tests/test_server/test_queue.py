"""Which waiting tasks start: first come first, within slots and GPUs."""

from __future__ import annotations

import pytest

from backend.server.processes import Waiting, choose, visible_gpus


def chosen(waiting: str, running: str = "", slots: int = 1, gpus: str = "") -> str:
    """`a:0 b:cpu c` as tasks with devices; the answer in the same form."""
    tasks = [
        Waiting(name, devices or None)
        for name, _, devices in (word.partition(":") for word in waiting.split())
    ]
    return " ".join(
        f"{task}:{devices}" for task, devices in choose(tasks, running.split(), slots, list(gpus))
    )


@pytest.mark.parametrize(
    ("waiting", "running", "slots", "gpus", "expected"),
    [
        ("", "", 1, "", ""),
        ("a b c", "", 2, "", "a:cpu b:cpu"),
        ("a b", "cpu", 1, "", ""),
        ("a:0 b:0", "", 2, "01", "a:0"),  # one task per GPU …
        ("a:0 b:0 c:0", "", 2, "0", "a:0 b:0"),  # … unless there are more slots
        ("a b c", "", 2, "01", "a:0 b:1"),
        ("a b", "0", 3, "012", "a:1 b:2"),
        ("a:0,1 b:1 c:2 d", "0", 4, "0123", "c:2 d:3"),  # a keeps 0 and 1 from b; c and d may start
        ("a:0,1 b", "", 2, "01", "a:0,1"),
        ("a b:cpu", "0 1", 4, "01", "a:0 b:cpu"),
        ("a b:cpu", "0 1", 2, "01", ""),
        ("a:cpu b:cpu c", "", 3, "012", "a:cpu b:cpu c:0"),
        ("a:7", "", 1, "0", "a:7"),  # not there: the training process says so
    ],
)
def test_choose(waiting: str, running: str, slots: int, gpus: str, expected: str) -> None:
    assert chosen(waiting, running, slots, gpus) == expected


def test_gpus_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
