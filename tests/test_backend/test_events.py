"""Events of extraction and training → calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend.task import events
from backend.task.calls import TaskCalls
from backend.task.events import ExtractionEvents, TrainingEvents
from tests.test_backend.senders import Told
from train.events import CheckpointSaved, EpochEnded, PhaseOneEpochEnded


def record(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 0.5, "val_loss": 0.4, "top1": 0.75, "epoch_time_s": 1.0}


def hear(folder: Path) -> tuple[TrainingEvents, Told]:
    told = Told()
    return TrainingEvents(TaskCalls("7"), told, 9, folder), told


def test_a_long_extraction_is_told_and_logged(monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(events, "LOG_EVERY_S", 0.0)
    caplog.set_level("INFO", "qwen_distill")
    told = Told()
    ExtractionEvents(TaskCalls("7"), told, 9).progress(32, 1000, "encoding")
    (call,) = told.calls
    assert call.query == {"currentEpoch": 0}
    assert call.body is not None
    assert call.body["message"] == "extracting features: encoding, 32 of 1000"
    assert "extracting features: encoding, 32 of 1000" in caplog.text


def test_an_epoch_is_one_progress_and_one_history(tmp_path: Path) -> None:
    heard, told = hear(tmp_path)
    heard(EpochEnded(record(1)))
    progress, history = told.calls
    assert progress.query == {"currentEpoch": 1, "accuracy": 75.0, "loss": 0.5}
    assert history.body is not None
    assert (history.body["valAccuracy"], history.body["trainAccuracy"]) == (75.0, None)


def test_an_epoch_of_phase_one_is_progress_of_epoch_0(tmp_path: Path) -> None:
    heard, told = hear(tmp_path)
    heard(PhaseOneEpochEnded({"epoch": 2, "train_loss": 0.51234}, 5))
    (call,) = told.calls
    assert call.query == {"currentEpoch": 0}
    assert call.body is not None
    assert call.body["message"] == "phase one, learning the teacher's features: epoch 2 of 5, loss 0.5123"


def test_only_best_pt_becomes_the_platforms_file_and_is_told_once(tmp_path: Path) -> None:
    heard, told = hear(tmp_path)
    for name in ("best.pt", "last.pt", "checkpoint_epoch_1.pt"):
        (tmp_path / name).write_text(name)
        heard(CheckpointSaved(tmp_path / name, 1, True))
    heard.publish_best()
    assert (tmp_path / "best_model.pt").read_text() == "best.pt"
    assert told.paths() == [str(tmp_path / "best_model.pt")]
