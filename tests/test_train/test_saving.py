"""Checkpoints are written now and then from copies, and best.pt and last.pt always belong together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import BEST, FORMAT, LAST, CheckpointError, load_checkpoint
from train.events import CheckpointSaved
from train.loop import loop, saving
from train.loop.saving import NEXT_BEST, CheckpointWriter, adopt_best
from train.run import run_training

ROOT = Path(__file__).parents[2]


def content(epoch: int, value: float = 0.0) -> dict[str, Any]:
    weights = {"w": torch.full((3,), value)}
    return {"format": FORMAT, "student": {}, "epoch": epoch, "model_state_dict": weights}


def count_saves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    plain = saving.save_checkpoint

    def save(path: Path, values: Any) -> None:
        names.append(path.name)
        plain(path, values)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    return names


def test_a_short_run_saves_after_its_first_epoch_and_at_its_end(make_store, make_config, monkeypatch):
    saved = count_saves(monkeypatch)
    config = make_config(make_store(), epochs=6)
    run_training(config)
    assert saved.count(LAST) == 2
    assert load_checkpoint(config.out / LAST)["epoch"] == 6


def test_every_epoch_is_saved_when_asked_for(make_store, make_config, monkeypatch):
    saved = count_saves(monkeypatch)
    run_training(make_config(make_store(), epochs=4, checkpoint_minutes=0))
    assert saved.count(LAST) >= 4


def test_best_is_that_of_its_epoch_however_late_it_is_written(make_store, make_config, monkeypatch):
    """The weights go on while the best ones wait to be written."""
    plain, tops, states = loop.Loop.validate, iter([0.1, 0.9, 0.5, 0.4]), []

    def validate(self: Any) -> dict[str, float]:
        states.append({name: value.clone() for name, value in self.parts.module.student.state_dict().items()})
        return {**plain(self), "top1": next(tops)}

    monkeypatch.setattr(loop.Loop, "validate", validate)
    config = make_config(make_store(), epochs=4)
    run_training(config)
    best = load_checkpoint(config.out / BEST)
    assert best["epoch"] == 2
    for name, value in best["model_state_dict"].items():
        assert torch.equal(value, states[1][name]), name
    assert any(not torch.equal(states[1][name], states[3][name]) for name in states[1])


def wait_for(gate: threading.Event) -> list[CheckpointSaved]:
    assert gate.wait(10)
    return []


def test_a_copy_does_not_follow_the_live_tensor(tmp_path: Path) -> None:
    gate = threading.Event()
    writer = CheckpointWriter(tmp_path, 60)
    live = content(1, value=1.0)
    writer.submit(partial(wait_for, gate))
    writer.note_best(live, None, 1)
    writer.save(live, 1, wait=False)
    live["model_state_dict"]["w"] += 5
    gate.set()
    assert [saved.path.name for saved in writer.finish()] == [BEST, LAST]
    writer.close()
    for name in (BEST, LAST):
        assert load_checkpoint(tmp_path / name)["model_state_dict"]["w"].tolist() == [1.0, 1.0, 1.0]


def test_an_error_of_the_background_thread_ends_the_training(make_store, make_config, monkeypatch):
    plain = saving.save_checkpoint

    def save(path: Path, values: Any) -> None:
        if values["epoch"] >= 2:
            raise CheckpointError(f"{path}: cannot be saved: No space left on device")
        plain(path, values)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    config = make_config(make_store(), epochs=5, checkpoint_minutes=0)
    with pytest.raises(CheckpointError, match="No space left"):
        run_training(config)
    assert load_checkpoint(config.out / LAST)["epoch"] == 1


def test_an_error_keeps_the_last_finished_step(make_store, make_config, monkeypatch):
    """Not that of the last saving, which may be a minute old."""
    plain = loop.Loop.forward

    def forward(self: Any, *arguments: Any) -> Any:
        if self.parts.progress.global_step == 7:
            raise RuntimeError("the GPU has fallen off the bus")
        return plain(self, *arguments)

    monkeypatch.setattr(loop.Loop, "forward", forward)
    config = make_config(make_store(), epochs=9)
    with pytest.raises(RuntimeError, match="fallen off"):
        run_training(config)
    assert load_checkpoint(config.out / LAST)["training"]["progress"]["global_step"] == 7


@pytest.mark.parametrize(("named", "kept"), [(4, 4), (2, 2)])
def test_a_kill_between_the_two_files_leaves_a_pair(tmp_path: Path, named: int, kept: int) -> None:
    """last.pt decides: it was written (and names epoch 4 as the best), or it was not (and names epoch 2)."""
    for name, epoch in ((BEST, 2), (NEXT_BEST, 4)):
        torch.save(content(epoch), tmp_path / name)
    adopt_best(tmp_path, named)
    assert load_checkpoint(tmp_path / BEST)["epoch"] == kept
    assert not (tmp_path / NEXT_BEST).exists()


KILLED = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from train.config import load_config
from train.run import run_training
run_training(load_config(dict(store={store!r}, out={out!r}, student="timm:test_resnet", epochs={epochs}, batch_size=6,
    image_size=32, learning_rate=1e-3, device="cpu", workers=0, seed=3, resume={resume}, checkpoint_minutes={minutes},
    ema_decay=0.9)))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_end(tmp_path: Path, make_store: Any) -> None:
    store = make_store(train=27, val=8)

    def start(out: Path, **options: Any) -> subprocess.Popen[bytes]:
        values = {
            "root": str(ROOT),
            "store": str(store),
            "out": str(out),
            "epochs": 12,
            "resume": False,
            **options,
        }
        return subprocess.Popen([sys.executable, "-c", KILLED.format(**values)], stderr=subprocess.DEVNULL)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, minutes=1.0).wait(240) == 0
    for kill in range(3):
        process = start(killed, minutes=0.005, resume=kill > 0)
        deadline = time.monotonic() + 120
        before = (killed / LAST).stat().st_mtime_ns if (killed / LAST).exists() else 0
        while not (killed / LAST).exists() or (killed / LAST).stat().st_mtime_ns == before:
            assert process.poll() is None or process.returncode == 0
            if process.returncode == 0:
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(killed, minutes=1.0, resume=True).wait(240) == 0
    for name in (LAST, BEST):
        left, right = load_checkpoint(whole / name), load_checkpoint(killed / name)
        assert left["epoch"] == right["epoch"], name
        for key, value in left["model_state_dict"].items():
            assert torch.equal(value, right["model_state_dict"][key]), (name, key)
