"""Calls on their way from the working process to the one that reports: JSON lines over a pipe."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from backend.calls import Call

FIELDS = ("kind", "method", "path", "query", "body", "replaces", "closes")


class Sender(Protocol):
    """Whoever takes calls: the reporter itself, or a pipe to it. `send` does not block for long."""

    def send(self, call: Call) -> None: ...


class PipeSender:
    """Writes calls to a file descriptor; when nobody reads any more, they are dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lock = threading.Lock()
        # Decoding processes and ranks must not hold the pipe open.
        os.set_inheritable(descriptor, False)

    def send(self, call: Call) -> None:
        line = json.dumps({name: getattr(call, name) for name in FIELDS}).encode("utf-8") + b"\n"
        with self.lock:
            try:
                while line:
                    line = line[os.write(self.descriptor, line) :]
            except OSError:
                return


def read_calls(descriptor: int) -> Iterator[Call]:
    """The calls that come through a pipe until its other end is closed; one cut off by a kill is no call."""
    with os.fdopen(descriptor, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            fields: dict[str, Any] = json.loads(line)
            yield Call(**fields)
