"""Progress of long work: a bar with rate and time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from typing import Any, Self, TextIO

PLAIN_INTERVAL_S = 10.0
NOTEBOOK_INTERVAL_S = 0.5


class Progress(ABC):
    """The display of a long operation: counts items, prints notes, and is closed at the end of its `with` block."""

    def __init__(self, total: int | None, description: str, unit: str, done: int, stream: TextIO) -> None:
        self.total, self.description, self.unit, self.stream = total, description, unit, stream
        self.done = self.initial = done
        self.started = time.monotonic()

    @property
    def rate(self) -> float:
        """Items a second of this run."""
        return (self.done - self.initial) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """`encoding: 128/500 images (26%), 41.3 images/s, 0:09 left`"""
        rate = self.rate
        if self.total is None:
            return f"{self.description}: {self.done} {self.unit}, {rate:.1f} {self.unit}/s"
        share = 100 * self.done / self.total if self.total else 100.0
        line = f"{self.description}: {self.done}/{self.total} {self.unit} ({share:.0f}%)"
        line += f", {rate:.1f} {self.unit}/s"
        if rate > 0 and self.done < self.total:
            line += f", {clock((self.total - self.done) / rate)} left"
        return line

    @abstractmethod
    def advance(self, count: int = 1) -> None: ...

    @abstractmethod
    def note(self, text: str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def track_progress(
    total: int | None, description: str, unit: str = "items", done: int = 0, stream: TextIO | None = None
) -> Progress:
    """A progress display on `stream` (stderr), fitting to it: a bar in a terminal, one line that changes in a notebook,
    plain lines elsewhere.

    `total` is None where the length is not known beforehand; `done` is what an earlier run has finished,
    which counts in the bar but not in the rate.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        return BarProgress(total, description, unit, done, stream)
    if in_notebook():
        return NotebookProgress(total, description, unit, done, stream)
    return PlainProgress(total, description, unit, done, stream)


class PhaseProgress:
    """Shows the progress of each phase (encoding, scoring); a display starts when its total is known."""

    def __init__(self, unit: str = "images") -> None:
        self.unit = unit
        self.display: Progress | None = None
        self.phase: tuple[str, int] | None = None
        self.done = 0

    def progress(self, done: int, total: int, message: str) -> None:
        if (message, total) != self.phase or done < self.done:
            self.close()
            self.display = track_progress(total, message, self.unit, done)
            self.phase = message, total
        elif self.display is not None:
            self.display.advance(done - self.done)
        self.done = done
        if done >= total:
            self.close()  # what follows (a probe) is not part of this phase's rate

    def close(self) -> None:
        if self.display is not None:
            self.display.close()
            self.display = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


class PlainProgress(Progress):
    """One flushed line now and then: readable in logs and through a pipe, no carriage return, no color."""

    def __init__(self, total: int | None, description: str, unit: str, done: int, stream: TextIO) -> None:
        super().__init__(total, description, unit, done, stream)
        self.printed_at, self.printed_done = self.started, -1

    def advance(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.printed_at >= PLAIN_INTERVAL_S:
            self.print_line()

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.printed_done != self.done:
            self.print_line()

    def print_line(self) -> None:
        self.printed_at, self.printed_done = time.monotonic(), self.done
        self.note(self.line())


def in_notebook() -> bool:
    """Whether this program is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookProgress(Progress):
    """One line of a notebook's output that changes in its place; needs no widgets."""

    def __init__(self, total: int | None, description: str, unit: str, done: int, stream: TextIO) -> None:
        from IPython.display import display

        super().__init__(total, description, unit, done, stream)
        self.shown_at = self.started
        self.handle = display(self.output(), display_id=True)

    def output(self) -> Any:
        from IPython.display import Pretty

        return Pretty(self.line())

    def advance(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.shown_at >= NOTEBOOK_INTERVAL_S:
            self.shown_at = time.monotonic()
            self.handle.update(self.output())

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self.handle.update(self.output())


class BarProgress(Progress):
    """A rich progress bar with rate and time left."""

    def __init__(self, total: int | None, description: str, unit: str, done: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total, description, unit, done, stream)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=Console(file=stream),
        )
        self.bar.start()
        self.task = self.bar.add_task(description, total=total, completed=done, rate="")

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(self.task, advance=count, rate=f"{self.rate:.1f} {self.unit}/s")

    def note(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
