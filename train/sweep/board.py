"""The trials as the user sees them: a live table in a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from console.progress import clock
from train.metrics import HEADLINE_METRICS, label_of, metric_of, text_of
from train.run_folder import RunFolder, read_json
from train.sweep.config import Trial
from train.sweep.trial import OUTCOME_FILE, RUN_FOLDER


class TrialState(NamedTuple):
    """What is known of a trial from the files in its folder."""

    name: str
    state: str  # waiting, or the state of its TrialResult
    epoch: int
    epochs: int | None
    metric: str | None
    best: float | None
    left_s: float | None
    reason: str
    is_control: bool


def read_state(folder: Path, trial: Trial) -> TrialState:
    """The state of `trial` from outcome.json, metrics.jsonl and config.json below `folder`."""
    run = RunFolder(folder / RUN_FOLDER)
    outcome = read_json(folder / OUTCOME_FILE)
    records = run.read_records()
    # The trial's options may leave the number of epochs to the student's recipe; the run's have it.
    options = run.read_options() or trial.options
    epochs = options.get("epochs")
    metric, best = best_of(records)
    epoch = int(records[-1]["epoch"]) if records else 0
    state = str(outcome["state"]) if outcome else "waiting"
    left = None
    if state == "running" and records and epochs:
        left = (int(epochs) - epoch) * float(records[-1].get("epoch_time_s") or 0.0)
    reason = str(outcome.get("reason") or "") if outcome else ""
    return TrialState(trial.name, state, epoch, epochs, metric, best, left, reason, trial.is_control)


def best_of(records: Sequence[dict[str, Any]]) -> tuple[str | None, float | None]:
    """(name, best value) of the first headline metric that the records have."""
    for name in HEADLINE_METRICS:
        values = [float(record[name]) for record in records if record.get(name) is not None]
        if values:
            return name, (max if metric_of(name).higher_is_better else min)(values)
    return None, None


class Board:
    """Shows the trials while they run; reads their folders, so it needs no word from the workers."""

    def __init__(self, out: Path, trials: Sequence[Trial]) -> None:
        self.out, self.trials = out, trials
        self.live: Any = None
        self.shown: dict[str, tuple[str, int]] = {}
        self.updated = 0.0

    def states(self) -> list[TrialState]:
        return [read_state(self.out / "trials" / trial.name, trial) for trial in self.trials]

    def update(self) -> None:
        states = self.states()
        if self.live is not None:
            self.live.update(table(states), refresh=True)
            return
        for state in states:
            key = (state.state, state.epoch)
            if state.state != "waiting" and self.shown.get(state.name) != key:
                self.shown[state.name] = key
                print(line(state), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(table(self.states()), console=Console(stderr=True), auto_refresh=False)
            self.live.start()
        else:
            # What an earlier sweep finished needs no line again.
            self.shown = {s.name: (s.state, s.epoch) for s in self.states() if s.state == "done"}
        self.updated = time.monotonic()
        return self

    def __exit__(self, *details: object) -> None:
        if self.live is not None:
            self.live.stop()


def line(state: TrialState) -> str:
    """`resnet18-seed0-1a2b3c4d: running, epoch 3/20, top-1 accuracy 61.25%, 0:41 left`"""
    parts = [state.state]
    if state.epoch:
        parts.append(f"epoch {state.epoch}/{state.epochs}" if state.epochs else f"epoch {state.epoch}")
    if state.best is not None:
        parts.append(best_text(state))
    if state.left_s is not None:
        parts.append(f"{clock(state.left_s)} left")
    if state.reason:
        parts.append(state.reason)
    return f"{state.name}: {', '.join(parts)}"


def best_text(state: TrialState) -> str:
    """`top-1 accuracy 61.25%`; empty before the first validation."""
    if state.metric is None or state.best is None:
        return ""
    return f"{label_of(state.metric)} {text_of(state.metric, state.best)}"


def table(states: Sequence[TrialState]) -> Any:
    from rich.table import Table
    from rich.text import Text

    colors = {"running": "cyan", "done": "green", "failed": "red", "timeout": "red", "stopped": "yellow"}
    drawn = Table()
    for heading in ("trial", "state", "epoch", "best", "left"):
        drawn.add_column(heading, overflow="fold" if heading == "trial" else "ellipsis")
    for state in states:
        drawn.add_row(
            state.name,
            Text(state.state, style=colors.get(state.state, "")),
            f"{state.epoch}/{state.epochs or '?'}",
            best_text(state),
            "" if state.left_s is None else clock(state.left_s),
        )
    return drawn
