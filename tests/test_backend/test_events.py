"""What extraction and training tell → calls: every epoch once, also over a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backend.task import events
from backend.task.calls import TaskCalls
from backend.task.events import ExtractionEvents, TrainingEvents
from tests.test_backend.senders import Told


def record(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 0.5, "val_loss": 0.4, "top1": 0.75, "epoch_time_s": 1.0}


def write_metrics(folder: Path, *epochs: int, cut: str = "") -> None:
    lines = "".join(json.dumps(record(epoch)) + "\n" for epoch in epochs)
    (folder / "metrics.jsonl").write_text(lines + cut, "utf-8")


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
    heard.epoch_end(record(1))
    progress, history = told.calls
    assert progress.query == {"currentEpoch": 1, "accuracy": 75.0, "loss": 0.5}
    assert history.body is not None
    assert (history.body["valAccuracy"], history.body["trainAccuracy"]) == (75.0, None)


def test_what_was_saved_but_not_reported_is_reported_by_the_run_that_goes_on(tmp_path: Path) -> None:
    write_metrics(tmp_path, 1, 2, cut='{"epoch": 3, "tra')
    heard, told = hear(tmp_path)
    write_metrics(tmp_path, 1, 2, 3)  # as the checkpoint has them, when the run is restored
    heard.epoch_end(record(4))
    heard.epoch_end(record(5))
    assert told.epochs() == [3, 4, 5]


def test_also_when_it_was_the_last_epoch(tmp_path: Path) -> None:
    write_metrics(tmp_path, 1, 2)
    heard, told = hear(tmp_path)
    write_metrics(tmp_path, 1, 2, 3)
    heard.finished({})
    assert told.epochs() == [3]


def test_an_epoch_that_is_repeated_after_a_kill_is_reported(tmp_path: Path) -> None:
    """Its line was written, its checkpoint was not: the platform gets the epoch that counts."""
    write_metrics(tmp_path, 1, 2, 3)
    heard, told = hear(tmp_path)
    write_metrics(tmp_path, 1, 2)
    heard.epoch_end(record(3))
    assert told.epochs() == [3]


def test_only_best_pt_becomes_the_platforms_file_and_is_told_once(tmp_path: Path) -> None:
    heard, told = hear(tmp_path)
    for name in ("best.pt", "last.pt", "checkpoint_epoch_1.pt"):
        (tmp_path / name).write_text(name)
        heard.checkpoint_saved(tmp_path / name, 1, True)
    heard.publish_best()
    assert (tmp_path / "best_model.pt").read_text() == "best.pt"
    assert told.paths() == [str(tmp_path / "best_model.pt")]
