"""Output that a line-reading parent can log: whole UTF-8 lines, no colors, no carriage returns.

Java's Process.destroy() sends SIGTERM and closes our output at once: from then on every write fails, and that
must not keep anybody from saving a checkpoint. So a parent that is gone is not an error here.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
from collections.abc import Iterable
from typing import Any, TextIO

ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
LONGEST_LINE = 65_536


class PlainStream(io.TextIOBase):
    """Wraps a text stream: writes whole lines only, each flushed; of a redrawn line the last state counts."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.pending = ""
        self.lock = threading.Lock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        with self.lock:
            *lines, rest = (self.pending + text).split("\n")
            self.pending = rest.rpartition("\r")[2] if len(rest) < LONGEST_LINE else rest[-LONGEST_LINE:]
            self.put(lines)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        for line in lines:
            self.write(line)

    def put(self, lines: list[str]) -> None:
        """Write finished lines in one go, so that lines of several processes do not mix."""
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                visible = ANSI.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()
                self.stream.write(visible + "\n")
            if lines:
                self.stream.flush()

    def flush(self) -> None:
        """Nothing to do: finished lines are flushed as they are written."""

    def finish(self) -> None:
        """Write what has no line break yet."""
        with self.lock:
            rest, self.pending = self.pending, ""
            if rest.strip():
                self.put([rest])


def make_plain(stream: Any) -> Any:
    """The stream as a line-reading parent needs it; a terminal stays as it is."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None or stream.isatty():
        return stream
    reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    return PlainStream(stream)


def use_plain_output() -> None:
    """Make stdout and stderr of this process plain; both keep their order when they are merged."""
    sys.stdout, sys.stderr = make_plain(sys.stdout), make_plain(sys.stderr)


def finish_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, PlainStream):
            stream.finish()
