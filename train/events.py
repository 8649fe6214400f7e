"""The events of a training: the one place where its progress leaves the process.

`EventStream.emit` appends an event to `RUN/events.jsonl`, for other processes (`follow`), and passes it to the listeners
in this one. Whatever an event announces (a line of metrics.jsonl, a checkpoint, summary.json) is on disk before it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from console.output import plain_json, redact_values
from train.errors import TrainError
from train.run_folder import RunFolder

POLL_S = 0.5


@dataclass(frozen=True)
class EpochEnded:
    """`record` is the line of metrics.jsonl: `epoch` (from 1), `train_loss`, `val_loss`, metrics …"""

    record: dict[str, Any]


@dataclass(frozen=True)
class PhaseOneEpochEnded:
    """An epoch of phase one (`--pretrain-epochs`), of `epochs`; `record` is its line of metrics.jsonl."""

    record: dict[str, Any]
    epochs: int


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint of the run folder (best.pt, last.pt …) is complete on disk; `epoch` counts from 1."""

    path: Path
    epoch: int
    is_best: bool


@dataclass(frozen=True)
class TrainingFinished:
    """The run is complete; `summary` is the content of summary.json."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class TrainingFailed:
    """The run ended early: by an error, or by `processes.stop.Stopped` after a signal; `kind` is the error's class.

    When a step was too slow to wait for, this comes from another thread, and the process ends within a second.
    """

    kind: str
    message: str
    exit_code: int


Event = EpochEnded | PhaseOneEpochEnded | CheckpointSaved | TrainingFinished | TrainingFailed
#: Called with each event in the process of rank 0; it must not block for long.
Listener = Callable[[Event], None]

NAMES: dict[str, type[Event]] = {
    "epoch_ended": EpochEnded,
    "phase_one_epoch_ended": PhaseOneEpochEnded,
    "checkpoint_saved": CheckpointSaved,
    "training_finished": TrainingFinished,
    "training_failed": TrainingFailed,
}


class EventStream:
    """Takes the events of one run. Without `start` they reach the listeners only."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self.listeners = tuple(listeners)
        self.file: Path | None = None
        self.announced: dict[int, dict[str, Any]] = {}  # the last record of each epoch

    def start(self, folder: RunFolder) -> None:
        """Write events to the folder's file from now on, after those of the run that is being resumed."""
        self.file = folder.events
        # Runs of older versions have no events; what is in their metrics.jsonl was announced.
        before, _ = read_events(self.file)
        end_last_line(self.file)
        records = [e.record for e in before if isinstance(e, EpochEnded)] or folder.read_records()
        self.announced = {int(record["epoch"]): record for record in records}

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Emit the epochs of a resumed run (`records`: all of them) that a kill kept from being announced."""
        for record in records:
            if self.announced.get(record["epoch"]) != plain_json(record):
                self.emit(EpochEnded(dict(record)))

    def emit(self, event: Event) -> None:
        """Raises TrainError when the event cannot be written."""
        if self.file is not None:
            line = json.dumps(to_json(event), ensure_ascii=False) + "\n"
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise TrainError(f"{self.file}: cannot be written: {error.strerror}") from error
        self.pass_on(event)

    def fail(self, error: BaseException) -> None:
        """Emit that the run ended early. The error itself is what counts: a disk that is full changes nothing."""
        event = TrainingFailed(type(error).__name__, str(error), int(getattr(error, "exit_code", 1)))
        try:
            self.emit(event)
        except TrainError:
            self.pass_on(event)

    def pass_on(self, event: Event) -> None:
        """Pass an event to the listeners, that of another process too."""
        for listener in self.listeners:
            listener(event)


def to_json(event: Event) -> dict[str, Any]:
    """One line of events.jsonl: its name, the time in seconds since 1970, its fields; files by their names."""
    name = next(name for name, kind in NAMES.items() if isinstance(event, kind))
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    if isinstance(event, CheckpointSaved):
        values["path"] = event.path.name
    content: dict[str, Any] = redact_values(plain_json(values))
    return {"event": name, "time": round(time.time(), 3), **content}


def from_json(content: Mapping[str, Any], folder: Path) -> Event | None:
    """The event of a line; None for one of a later version."""
    kind = NAMES.get(content["event"])
    if kind is None:
        return None
    values = {field.name: content[field.name] for field in fields(kind)}
    return kind(**(values | {"path": folder / values["path"]} if kind is CheckpointSaved else values))


def read_events(file: Path, position: int = 0) -> tuple[list[Event], int]:
    """The events from a position (in bytes) on, and the position after them; a line being written is left out."""
    if not file.exists():
        return [], position
    with file.open("rb") as stream:
        stream.seek(position)
        content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]
    found = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):  # cut off by a kill
            found.append(from_json(json.loads(line), file.parent))
    return [event for event in found if event is not None], position + len(whole)


def end_last_line(file: Path) -> None:
    """End a line that a kill cut off, so that the next one is not appended to it."""
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        with file.open("ab") as stream:
            stream.write(b"\n")


def follow(file: Path, ended: threading.Event, position: int = 0) -> Iterator[Event]:
    """The events of a run as they are written, until `ended` is set and all have been read."""
    last = False
    while not last:
        last = ended.wait(POLL_S)
        events, position = read_events(file, position)
        yield from events
