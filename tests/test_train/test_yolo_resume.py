"""A YOLO run that was interrupted, at any moment, ends as an uninterrupted one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from processes.stop import Stopped, StopRequest
from tests.test_train.yolo_runs import (
    OPTIONS,
    ROOT,
    RUN_OPTIONS,
    Crash,
    Listener,
    assert_equal,
    crash_in,
    learnt,
    make_config,
    metrics_of,
    stop_after,
)
from train.checkpoint import load_checkpoint
from train.config import load_config
from train.errors import ConfigError
from train.run import run_training

pytest.importorskip("ultralytics")


@pytest.mark.slow
def test_resume_equals_an_uninterrupted_run(
    yolo_run: tuple[Path, Listener],
    yolo_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_log: pytest.LogCaptureFixture,
) -> None:
    whole, _ = yolo_run
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        crash_in(patched, 5)  # three batches an epoch: in the middle of the second
        with pytest.raises(Crash):
            run_training(make_config(yolo_store, out, **RUN_OPTIONS))
    assert [record["epoch"] for record in metrics_of(out)] == [1]
    summary = run_training(make_config(yolo_store, out, resume=True, **RUN_OPTIONS))
    assert f"{out}: resumed after epoch 1" in train_log.text
    assert_equal(learnt(out), learnt(whole))
    assert summary["metrics"] == json.loads((whole / "summary.json").read_text())["metrics"]
    timing = {"epoch_time_s", "train_time_s"}
    for one, other in zip(metrics_of(out), metrics_of(whole), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {
            k: v for k, v in other.items() if k not in timing
        }
    files = [(folder / "ultralytics" / "results.csv").read_text().splitlines() for folder in (out, whole)]
    resumed, uninterrupted = ([line.split(",")[2:] for line in file] for file in files)
    assert resumed == uninterrupted


def test_a_complete_run_is_not_repeated_and_a_taken_folder_is_refused(
    yolo_run: tuple[Path, Listener], yolo_store: Path
) -> None:
    folder, listener = yolo_run
    before = (folder / "last.pt").stat().st_mtime_ns
    options = {"control": True, **RUN_OPTIONS}
    assert run_training(make_config(yolo_store, folder, resume=True, **options)) == listener.summary
    assert run_training(load_config({"out": folder, "resume": True})) == listener.summary
    assert (folder / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="--resume to continue it, or --overwrite"):
        run_training(make_config(yolo_store, folder, **options))
    with pytest.raises(ConfigError, match="image_size 64 → 96"):
        run_training(make_config(yolo_store, folder, resume=True, **{**options, "image_size": 96}))


@pytest.mark.slow
def test_interrupted_in_the_middle_of_finishing_the_checkpoints(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ultralytics rewrites best.pt and last.pt in place after the last epoch: here only half of it gets done."""
    from ultralytics.engine import trainer

    out = tmp_path / "out"

    def write_half(file: Path, **_: Any) -> None:
        file.write_bytes(file.read_bytes()[:1000])
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "strip_optimizer", write_half)
        with pytest.raises(Crash):
            run_training(make_config(yolo_store, out, epochs=1))
    before = learnt(out)
    summary = run_training(make_config(yolo_store, out, epochs=1, resume=True))
    assert summary["epochs_done"] == 1
    assert_equal(learnt(out), before)
    assert summary["exported"]["map50"] is not None


def saved_epochs(listener: Listener, name: str) -> list[int]:
    return [epoch for saved, epoch, _ in listener.saved if saved == name]


def test_checkpoints_are_written_by_time(yolo_store: Path, tmp_path: Path) -> None:
    """After the first epoch, every minute, and at the end; with 0 minutes whenever the last writing is done."""
    listener = Listener()
    run_training(make_config(yolo_store, tmp_path / "minute"), [listener])
    assert saved_epochs(listener, "last.pt") == [1, 3]
    assert saved_epochs(listener, "best.pt")[-1] == load_checkpoint(tmp_path / "minute" / "best.pt")["epoch"]
    assert not list((tmp_path / "minute").glob(".best*"))


def test_a_stop_between_two_writings_keeps_the_last_finished_epoch(yolo_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop = StopRequest()

    with pytest.raises(Stopped, match="--resume continues after it"):
        run_training(make_config(yolo_store, out), [stop_after(2, stop)], stop)
    last, best = load_checkpoint(out / "last.pt"), load_checkpoint(out / "best.pt")
    assert last["epoch"] == 2
    assert best["epoch"] == last["training"]["best_epoch"]


def test_an_error_keeps_the_last_finished_epoch_and_the_best_student(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    crash_in(monkeypatch, 8)  # three batches an epoch: in the middle of the third
    with pytest.raises(Crash):
        run_training(make_config(yolo_store, out))
    last = load_checkpoint(out / "last.pt")
    assert last["epoch"] == 2
    assert load_checkpoint(out / "best.pt")["epoch"] == last["training"]["best_epoch"]


@pytest.mark.slow
def test_ultralytics_best_is_the_student_of_ours_after_a_resume(yolo_store: Path, tmp_path: Path) -> None:
    """Killed between ultralytics' files and ours: its best.pt may come from an epoch that is trained again."""
    from ultralytics import YOLO

    out = tmp_path / "out"
    stop = StopRequest()

    with pytest.raises(Stopped):
        run_training(make_config(yolo_store, out), [stop_after(1, stop)], stop)
    (out / "ultralytics" / "best.pt").write_bytes(b"of another epoch")
    run_training(make_config(yolo_store, out, resume=True))
    exported = YOLO(out / "ultralytics" / "best.pt").model.state_dict()
    ours = load_checkpoint(out / "best.pt")["model_state_dict"]
    for name, value in ours.items():
        assert torch.equal(exported[name.removeprefix("network.")].float(), value.half().float()), name


def test_a_stop_request_ends_after_the_batch(yolo_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop = StopRequest()

    with pytest.raises(Stopped, match="--resume continues after it") as stopped:
        run_training(make_config(yolo_store, out), [stop_after(1, stop)], stop)
    assert stopped.value.exit_code == 143
    assert len(metrics_of(out)) == 1
    assert not (out / "summary.json").exists()
    assert load_checkpoint(out / "last.pt")["epoch"] == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from train.config import TrainConfig
from train.run import run_training
from train.yolo import fit as yolo_fit
kill_at, options = int(sys.argv[1]), eval(sys.argv[2])
counted = yolo_fit.count_batches
def count(*arguments):
    after_batch, seen = counted(*arguments), iter(range(1, 1000))
    def finished(trainer):
        after_batch(trainer)
        if next(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return finished
yolo_fit.count_batches = count
run_training(TrainConfig(**options))
"""


@pytest.mark.slow
def test_resume_after_kill_9_with_loader_workers(yolo_store: Path, tmp_path: Path) -> None:
    def train(out: Path, kill_at: int, **changes: Any) -> int:
        settings = "plots=false,close_mosaic=2,nbs=8"  # the resumed epoch is not the first without mosaic
        options = {**OPTIONS, "store": str(yolo_store), "out": str(out), "workers": 2, **changes}
        options["yolo_settings"] = settings
        command = [sys.executable, "-c", KILLED, str(kill_at), repr(options)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert train(tmp_path / "whole", 0) == 0
    assert train(tmp_path / "killed", 8) == -signal.SIGKILL
    assert train(tmp_path / "killed", 0, resume=True) == 0
    assert_equal(learnt(tmp_path / "killed"), learnt(tmp_path / "whole"))


SLOW_BATCH = """
import sys, time
from train.config import TrainConfig
from train.yolo.dataset import StoreDataset
from train.events import EpochEnded, TrainingFailed
from train.run import run_training
def listener(event):
    if isinstance(event, TrainingFailed):
        print(event.kind, event.exit_code, flush=True)
    elif isinstance(event, EpochEnded):
        print("epoch", event.record["epoch"], flush=True)
        StoreDataset.load_image = lambda *arguments, **named: time.sleep(60)
run_training(TrainConfig(**eval(sys.argv[1])), [listener])
"""


@pytest.mark.slow
def test_a_signal_in_a_slow_batch_ends_the_run_in_time_and_is_reported(
    yolo_store: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "store": str(yolo_store), "out": str(tmp_path / "out")}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BATCH, repr(options)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "epoch 1\n"
    process.terminate()
    assert process.wait(timeout=40) == 143
    assert process.stdout.read() == "Stopped 143\n"
    assert load_checkpoint(tmp_path / "out" / "last.pt")["epoch"] == 1
