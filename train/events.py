"""What a training tells others while it runs: the platform's reporter, a sweep, a tracker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Observer(Protocol):
    """Hears of a run's events in the process of rank 0. An observer must not block for long.

    Only the distilled (main) run is observed; its control is not.
    """

    def epoch_end(self, record: dict[str, Any]) -> None:
        """`record` is the line of metrics.jsonl: `epoch` (from 1), `train_loss`, `val_loss`, metrics …"""

    def checkpoint_saved(self, path: Path, epoch: int, is_best: bool) -> None:
        """`path` (best.pt or last.pt) is complete on disk; `epoch` counts from 1."""

    def finished(self, summary: dict[str, Any]) -> None:
        """The run is complete; `summary` is the content of summary.json."""

    def failed(self, error: BaseException) -> None:
        """The run ended early: by an error, or `console.stop.Stopped` after a signal.

        When a step was too slow to wait for, this comes from another thread, and the process ends within a second.
        """


class SilentObserver:
    """An observer that ignores everything; subclass it to hear only what matters."""

    def epoch_end(self, record: dict[str, Any]) -> None:
        pass

    def checkpoint_saved(self, path: Path, epoch: int, is_best: bool) -> None:
        pass

    def finished(self, summary: dict[str, Any]) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        pass


class Observers:
    """Several observers as one."""

    def __init__(self, members: Sequence[Observer] = ()) -> None:
        self.members = tuple(members)

    def epoch_end(self, record: dict[str, Any]) -> None:
        for member in self.members:
            member.epoch_end(record)

    def checkpoint_saved(self, path: Path, epoch: int, is_best: bool) -> None:
        for member in self.members:
            member.checkpoint_saved(path, epoch, is_best)

    def finished(self, summary: dict[str, Any]) -> None:
        for member in self.members:
            member.finished(summary)

    def failed(self, error: BaseException) -> None:
        for member in self.members:
            member.failed(error)
