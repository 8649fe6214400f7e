"""The ledger of bad images: one JSON line each, in the store, with key, reason and hash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from extract.session import BadSample
from files.writing import replace_file
from store import format as names
from store.errors import DistillError
from store.reader import open_store

LEDGER = "bad_images.jsonl"


class TooManyBad(DistillError):
    """More bad images than `--max-bad` allows."""


def append_ledger(store: Path, bad: Iterable[BadSample]) -> None:
    """Add lines while the store is being written; several processes may do so."""
    lines = "".join(ledger_line(item) for item in bad).encode()
    if lines:
        fd = os.open(store / LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, lines)
        finally:
            os.close(fd)


def ledger_line(item: BadSample) -> str:
    return json.dumps(asdict(item), ensure_ascii=False) + "\n"


def write_ledger(store: Path) -> list[BadSample]:
    """The whole ledger from a complete store, each bad row once; no file when there is none."""
    bad = []
    opened = open_store(store)
    for name in opened.splits:
        split = opened[name]
        for row in np.flatnonzero(~split.valid).tolist():
            content = split.gather([row], [names.CONTENT])[names.CONTENT][0]
            digest = content.tobytes().hex() if content.any() else ""
            bad.append(BadSample(name, row, split.keys[row], split.reason(row), digest))
    if bad:
        replace_file(store / LEDGER, "".join(ledger_line(item) for item in bad).encode())
    else:
        (store / LEDGER).unlink(missing_ok=True)
    return bad


def check_limit(bad: int, allowed: int, limit: str, store: Path, first: BadSample | None) -> None:
    """Raises TooManyBad when more images are bad than allowed."""
    if bad > allowed:
        example = f"; the last: {first.key}: {first.reason}" if first else ""
        raise TooManyBad(
            f"{bad} bad images, --max-bad {limit} allows {allowed}{example}. All are listed in {store / LEDGER}. "
            "Raise --max-bad, or repair or remove them, and run the same command again"
        )
