"""Log lines: plain, flushed, on stderr, so that stdout stays free for results."""

from __future__ import annotations

import logging
import sys

from console.redaction import redact
from files.names import printable

ROOT = "qwen_distill"
STORE = "store"  # imports nothing of ours, so its loggers bear its own name


def get_logger(name: str) -> logging.Logger:
    """The logger of a part of the program; it prints nothing until `configure_logging` was called."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure_logging(level: int = logging.INFO) -> None:
    """Print our log lines on stderr; calling it again changes the level only.

    Libraries' own loggers are left alone. Only commands call this: importing the package must not.
    """
    for name in (ROOT, STORE):
        ours = logging.getLogger(name)
        ours.setLevel(level)
        ours.propagate = False
        if not ours.handlers:
            handler = StderrHandler()
            handler.setFormatter(Formatter("%(message)s"))
            ours.addHandler(handler)
    # torch warns about torchao's classes whenever both are installed: nothing that a user could act on.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever `sys.stderr` is now: tests and the platform's entry point replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class Formatter(logging.Formatter):
    """`warning: text` from level WARNING on, the bare text below; passwords in addresses are hidden."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(redact(super().format(record)))
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text
