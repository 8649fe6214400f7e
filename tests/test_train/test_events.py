"""The events of a training: one line each in events.jsonl, for listeners and for other processes, each once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from train.errors import TrainError
from train.events import (
    CheckpointSaved,
    EpochEnded,
    Event,
    EventStream,
    TrainingFailed,
    TrainingFinished,
    follow,
    read_events,
)
from train.run import run_training
from train.run_folder import RunFolder


def record(epoch: int, **values: Any) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 0.5, "val_loss": None, "top1": 0.75, **values}


def stream_of(folder: Path) -> tuple[EventStream, list[Event]]:
    heard: list[Event] = []
    stream = EventStream([heard.append])
    stream.start(RunFolder(folder))
    return stream, heard


def epochs_of(events: list[Event]) -> list[int]:
    return [event.record["epoch"] for event in events if isinstance(event, EpochEnded)]


def test_another_process_reads_what_listeners_get(tmp_path: Path) -> None:
    stream, heard = stream_of(tmp_path)
    for event in (
        EpochEnded(record(1)),
        CheckpointSaved(tmp_path / "best.pt", 1, True),
        TrainingFinished({"epochs": 1, "per_class": {"猫": 0.5}}),
    ):
        stream.emit(event)
    stream.fail(ValueError("mysql://user:secret@host/db"))
    assert heard[3] == TrainingFailed("ValueError", "mysql://user:secret@host/db", 1)
    events, position = read_events(tmp_path / "events.jsonl")
    assert events[:3] == heard[:3]
    assert isinstance(events[3], TrainingFailed)
    assert "secret" not in (tmp_path / "events.jsonl").read_text()
    assert position == (tmp_path / "events.jsonl").stat().st_size


def test_follow_gives_events_as_they_are_written_and_the_last_ones_at_the_end(tmp_path: Path) -> None:
    stream, _ = stream_of(tmp_path)
    stream.emit(EpochEnded(record(1)))
    ended = threading.Event()
    events = follow(tmp_path / "events.jsonl", ended)
    assert next(events) == EpochEnded(record(1))
    stream.emit(EpochEnded(record(2)))
    assert next(events) == EpochEnded(record(2))
    stream.emit(EpochEnded(record(3)))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "epoch_end')  # still being written
    ended.set()
    assert list(events) == [EpochEnded(record(3))]


def test_a_line_that_a_kill_cut_off_and_events_of_later_versions_are_left_out(tmp_path: Path) -> None:
    stream, _ = stream_of(tmp_path)
    stream.emit(EpochEnded(record(1)))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "moved", "time": 1.0}\n{"event": "epoch_end')
    stream, _ = stream_of(tmp_path)
    stream.emit(EpochEnded(record(2)))
    assert epochs_of(read_events(tmp_path / "events.jsonl")[0]) == [1, 2]


def test_a_resumed_run_emits_the_epochs_that_a_kill_kept_from_being_announced(tmp_path: Path) -> None:
    stream, _ = stream_of(tmp_path)
    stream.catch_up([])
    stream.emit(EpochEnded(record(1)))
    stream.emit(EpochEnded(record(2)))
    stream, heard = stream_of(tmp_path)
    stream.catch_up([record(1), record(2, val_loss=float("nan")), record(3)])  # not a number is null in JSON
    assert epochs_of(heard) == [3]
    # Epoch 3 was repeated with another result, and the process killed before it was announced.
    stream, heard = stream_of(tmp_path)
    stream.catch_up([record(1), record(2), record(3, top1=0.5)])
    assert heard == [EpochEnded(record(3, top1=0.5))]


def test_epochs_of_a_run_of_an_older_version_are_not_announced_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    stream, heard = stream_of(tmp_path)
    stream.catch_up([record(1), record(2)])
    assert epochs_of(heard) == [2]


def test_a_full_disk_is_one_line_and_does_not_hide_the_error_of_a_run(tmp_path: Path) -> None:
    stream, heard = stream_of(tmp_path / "missing")
    with pytest.raises(TrainError, match=r"missing/events.jsonl: cannot be written: No such file"):
        stream.emit(EpochEnded(record(1)))
    stream.fail(TrainError("no space"))
    assert heard == [TrainingFailed("TrainError", "no space", 1)]


def test_a_training_and_its_control_write_their_events(make_store: Any, make_config: Any) -> None:
    heard: list[Event] = []
    config = make_config(make_store(), control=True)
    run_training(config, [heard.append])
    events, _ = read_events(config.out / "events.jsonl")
    assert [type(event) for event in events] == [type(event) for event in heard]
    assert [EpochEnded(line) for line in RunFolder(config.out).read_records()] == [
        event for event in events if isinstance(event, EpochEnded)
    ]
    assert epochs_of(read_events(config.out / "control" / "events.jsonl")[0]) == [1, 2]


def test_a_start_that_is_refused_writes_nothing_into_the_run_that_is_there(
    make_store: Any, make_config: Any
) -> None:
    config = make_config(make_store(), epochs=1)
    run_training(config)
    before = (config.out / "events.jsonl").read_text()
    with pytest.raises(Exception, match="holds a run already"):
        run_training(config)
    assert (config.out / "events.jsonl").read_text() == before
    run_training(config.replace(overwrite=True))
    assert len(read_events(config.out / "events.jsonl")[0]) == len(before.splitlines())
