"""A run that was interrupted anywhere equals one that was not, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from processes.stop import Stopped, StopRequest
from train.checkpoint import load_checkpoint
from train.config import load_config
from train.errors import ConfigError
from train.run import run_training
from train.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
TIMES = ("epoch_time_s",)

# Dropout, batch norm, augmentation, accumulation with a ragged last group, EMA and two workers.
SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from train.config import load_config
from train.run import run_training
import train.loop.loop as loop

slow_step, slow_s = {slow_step}, {slow_s}
plain = loop.Loop.forward

def forward(self, *arguments):
    if self.parts.progress.global_step == slow_step:
        Path({marker!r}).touch()
        losses = plain(self, *arguments)   # batch norm has moved on when the signal comes
        time.sleep(slow_s) if {sleeping} else spin(slow_s)
        return losses
    return plain(self, *arguments)

def spin(seconds):
    # One operation of torch after the other, as a real slow step is.
    end = time.monotonic() + seconds
    a = torch.ones(64, 64)
    while time.monotonic() < end:
        a = a @ a * 0.01

loop.Loop.forward = forward
config = load_config(dict(
    store={store!r}, out={out!r}, student="timm:test_resnet", epochs=3, batch_size=6, grad_accum_steps=2,
    image_size=32, learning_rate=1e-3, device="cpu", workers=2, ema_decay=0.9, seed=3, resume={resume},
    dropout=0.2,
))
try:
    run_training(config)
except BaseException as error:
    code = getattr(error, "exit_code", None)
    if code is None:
        raise
    print(error, file=sys.stderr)
    sys.exit(code)
"""


def command(tmp_path: Path, store: Path, out: Path, **options: object) -> list[str]:
    values = {"slow_step": -1, "slow_s": 0.0, "sleeping": True, "resume": False} | options
    code = SCRIPT.format(
        root=str(ROOT), store=str(store), out=str(out), marker=str(tmp_path / "slow"), **values
    )
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(tmp_path: Path, store: Path, out: Path, **options: object) -> None:
    result = subprocess.run(
        command(tmp_path, store, out, **options), capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]


def interrupt(tmp_path: Path, store: Path, out: Path, number: int, **options: object) -> tuple[int, float]:
    """Start a run whose step `slow_step` takes long, send a signal inside it; exit code and seconds it took."""
    (tmp_path / "slow").unlink(missing_ok=True)
    process = subprocess.Popen(command(tmp_path, store, out, **options), cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "slow").exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode, time.monotonic() - started


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, averages and records are equal, bit for bit."""
    for name in ("last.pt", "best.pt"):
        left, right = load_checkpoint(one / name), load_checkpoint(other / name)
        assert_same(left["model_state_dict"], right["model_state_dict"], name)
        assert_same(left["alignment_head"], right["alignment_head"], name)
    left, right = (load_checkpoint(folder / "last.pt")["training"] for folder in (one, other))
    assert_same(left["optimizer"]["state"], right["optimizer"]["state"], "optimizer")
    assert_same(left["average"]["state"], right["average"]["state"], "average")
    assert records(one) == records(other)


def assert_same(left: object, right: object, where: str) -> None:
    if isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], f"{where}.{name}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def records(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture
def whole_run(tmp_path, make_store):
    """A store of 27 samples (batches of 6, the last of 3; three steps an epoch), and a run without interruption."""
    store = make_store(train=27, val=8, logits=True)
    run(tmp_path, store, tmp_path / "whole")
    return store, tmp_path / "whole"


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_epoch(tmp_path, whole_run):
    store, whole = whole_run
    out = tmp_path / "stopped"
    code, seconds = interrupt(tmp_path, store, out, signal.SIGTERM, slow_step=4, slow_s=20.0, sleeping=True)
    assert code == 143
    assert seconds < 4, "saved and ended within four seconds although the step takes twenty"
    progress = load_checkpoint(out / "last.pt")["training"]["progress"]
    assert (progress["epoch"], progress["step"], progress["global_step"]) == (1, 1, 4)
    run(tmp_path, store, out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.slow
def test_sigint_while_the_main_thread_computes(tmp_path, whole_run):
    store, whole = whole_run
    out = tmp_path / "stopped"
    code, seconds = interrupt(tmp_path, store, out, signal.SIGINT, slow_step=2, slow_s=20.0, sleeping=False)
    assert code == 130
    assert seconds < 4
    run(tmp_path, store, out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_stops_cleanly(tmp_path, whole_run):
    """As timeout(1) and batch systems send it: the worker processes get it too."""
    store, whole = whole_run
    out = tmp_path / "stopped"
    (tmp_path / "slow").unlink(missing_ok=True)
    process = subprocess.Popen(
        command(tmp_path, store, out, slow_step=4, slow_s=0.5),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not (tmp_path / "slow").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    text = errors.decode()
    assert process.returncode == 143, text
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    run(tmp_path, store, out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.slow
def test_sigterm_between_steps_is_a_normal_stop(tmp_path, whole_run):
    store, whole = whole_run
    out = tmp_path / "stopped"
    code, _ = interrupt(tmp_path, store, out, signal.SIGTERM, slow_step=7, slow_s=0.3)
    assert code == 143
    assert load_checkpoint(out / "last.pt")["training"]["progress"]["global_step"] in (7, 8)
    run(tmp_path, store, out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.slow
def test_kill_9_resumes_from_the_last_epoch(tmp_path, whole_run):
    store, whole = whole_run
    out = tmp_path / "killed"
    code, _ = interrupt(tmp_path, store, out, signal.SIGKILL, slow_step=7, slow_s=60.0)
    assert code == -signal.SIGKILL
    assert len(records(out)) == 2
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train_loss": 1.0}\n')  # as if killed between this line and the checkpoint
    run(tmp_path, store, out, resume=True)
    assert_same_run(whole, out)
    leftovers = [path.name for path in out.iterdir() if "partial" in path.name]
    assert not leftovers
    assert os.listdir(out / "tensorboard")


class StopAfter(StopRequest):
    """Asks for a stop once the loop has looked `looks` times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def requested(self) -> bool:
        # The stop deadline's thread looks as well, at moments of its own.
        if threading.current_thread() is threading.main_thread():
            self.looks -= 1
            if self.looks == 0:
                self.set()
        return super().requested


@pytest.mark.parametrize(("workers", "exact_flip"), [(2, False), (0, True)])
def test_stopped_again_and_again_equals_uninterrupted(tmp_path, make_store, make_config, workers, exact_flip):
    """In one process: dropout, batch norm, augmentation, EMA, a ragged last group, stops at odd places."""
    options = {
        "store": make_store(train=27, val=8, logits=True, exact_flip=exact_flip),
        "batch_size": 6,
        "grad_accum_steps": 2,
        "ema_decay": 0.9,
        "dropout": 0.2,
        "workers": workers,
        "epochs": 2,
    }
    run_training(make_config(**options, out=tmp_path / "whole"))
    stops = 0
    for looks in (3, 2, 4, 100):
        try:
            run_training(make_config(**options, out=tmp_path / "parts", resume=True), stop=StopAfter(looks))
        except Stopped:
            stops += 1
    assert stops == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_with_other_options_names_them(make_store, make_config):
    store = make_store()
    run_training(make_config(store, epochs=1))
    with pytest.raises(
        ConfigError, match=r"other options.*learning_rate 0.001 → 0.01, temperature None → 2.0"
    ):
        run_training(make_config(store, epochs=1, resume=True, learning_rate=0.01, temperature=2.0))


def test_a_control_may_be_added_but_not_dropped(make_store, make_config, train_log):
    store = make_store()
    run_training(make_config(store, epochs=1))
    run_training(make_config(store, epochs=2, resume=True, control=True))
    assert "resumed after epoch 1" in train_log.text
    with pytest.raises(ConfigError, match="control True → False"):
        run_training(make_config(store, epochs=3, resume=True, control=False))


def test_resume_needs_no_option_but_the_folder(tmp_path, make_store, make_config, monkeypatch):
    """Store and student too come from config.json, whatever the working directory is; sources are kept."""
    store = make_store(train=21)
    options = {"epochs": 2, "dropout": 0.2, "ema_decay": 0.9, "seed": 3, "temperature": 2.0}
    whole = make_config(store, **options, out=tmp_path / "whole")
    run_training(whole)
    monkeypatch.chdir(tmp_path)
    given = make_config(store.name, **options, out=tmp_path / "parts")
    with pytest.raises(Stopped):
        run_training(given, stop=StopAfter(4))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = load_config({"out": tmp_path / "parts", "resume": True})
    assert (resumed.temperature, resumed.batch_size) == (2.0, 8)
    assert resumed.is_explicit("batch_size")
    assert not resumed.is_explicit("weight_decay")
    run_training(resumed)
    assert_same_run(whole.out, given.out)
    with pytest.raises(ConfigError, match=r"other options.*temperature 2.0 → 3.0"):
        run_training(load_config({"out": given.out, "resume": True, "temperature": 3.0, "epochs": 3}))


def test_a_store_of_other_data_is_refused_on_resume(tmp_path, make_store, make_config):
    store = make_store()
    run_training(make_config(store, epochs=1))
    moved = tmp_path / "moved.zarr"
    store.rename(moved)
    run_training(make_config(moved, epochs=2, resume=True))
    before = records_text(tmp_path / "run")
    appended = make_store("appended.zarr", train=26)
    with pytest.raises(ConfigError, match=r"appended.zarr is not the data.*'train': 24.*'train': 26.*--out"):
        run_training(make_config(appended, epochs=3, resume=True))
    changed = make_store("changed.zarr", seed=1)
    with pytest.raises(ConfigError, match="images, targets or preprocessing differ"):
        run_training(make_config(changed, epochs=3, resume=True))
    assert records_text(tmp_path / "run") == before


def test_targets_that_were_added_since_are_not_mixed_in(make_store, make_config):
    """`cli probe` adds logits and changes no image: `auto` options would come to something else."""
    from store.create import add_arrays
    from store.format import logits_array

    store = make_store()
    run_training(make_config(store, epochs=1, distillation_type="hybrid"))
    fill_logits(store, add_arrays(store, [logits_array("probe", 3)]))
    with pytest.raises(ConfigError, match=r"logits None → probe.*--distillation-type"):
        run_training(make_config(store, epochs=2, resume=True))


def fill_logits(store, job):
    import numpy as np

    from store.finalize import finalize_store
    from store.reader import open_store
    from store.writer import StoreWriter

    for split in open_store(store).splits:
        with StoreWriter(store, split, job=job) as writer:
            for start, stop in writer.batches():
                writer.append({"logits/probe": np.zeros((stop - start, 3), np.float16)})
    finalize_store(store, job=job)


def records_text(run):
    return (run / "metrics.jsonl").read_text()


def test_a_start_that_failed_does_not_block_the_next(make_store, make_config, monkeypatch):
    store = make_store()

    def fail(*arguments: object) -> None:
        raise OSError("unreadable")

    config = make_config(store, epochs=1)
    for again in ({"learning_rate": 0.01}, {"learning_rate": 0.02, "resume": True}):
        with monkeypatch.context() as patch:
            patch.setattr("train.loop.loop.Loop.forward", fail)
            with pytest.raises(OSError, match="unreadable"):
                run_training(config)
        assert (config.out / "config.json").exists()
        config = make_config(store, epochs=1, **again)
        RunFolder(config.out).check_place(config)
    assert run_training(config)["complete"]


@pytest.mark.parametrize(
    ("file", "options", "text"),
    [
        ("tulip.jpg", {}, "holds other files \\(tulip.jpg\\), expected a run or an empty folder"),
        ("config.json", {"overwrite": True}, "holds other files"),
        (".hidden", {}, None),
        (".hidden", {"resume": True}, "nothing to resume in .*run: check --out, or leave --resume out"),
        ("config.json", {"resume": True}, "nothing to resume in"),
    ],
)
def test_a_folder_that_nobody_can_mean_is_refused(tmp_path, make_config, file, options, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).touch()
    with pytest.raises(ConfigError, match=text) if text else contextlib.nullcontext():
        config = make_config("a.zarr", **options)
        RunFolder(config.out).check_place(config)


def test_a_finished_run_is_extended_or_left_alone(make_store, make_config):
    store = make_store()
    first = run_training(make_config(store, epochs=1))
    before = (make_config(store).out / "last.pt").stat().st_mtime_ns
    assert run_training(make_config(store, epochs=1, resume=True)) == first
    assert (make_config(store).out / "last.pt").stat().st_mtime_ns == before


def test_a_taken_folder_needs_a_decision(make_store, make_config):
    store = make_store()
    run_training(make_config(store, epochs=1))
    with pytest.raises(
        ConfigError, match="holds a run already: pass --resume to continue it, or --overwrite"
    ):
        run_training(make_config(store, epochs=1))
    left, kept = (make_config(store).out / name for name in ("adapters.pt", "notes.txt"))
    left.touch()
    kept.touch()
    assert run_training(make_config(store, epochs=2, overwrite=True))["epochs_done"] == 2
    assert kept.exists()
    assert not left.exists(), "adapters of another run"
