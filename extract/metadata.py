"""What was measured of a store: the teacher's time and the features' accuracy. Kept beside the arrays.

Times differ from run to run, so they stay out of the manifest: a store is bit-identical however often its
extraction was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from files.writing import replace_file
from store.errors import DistillError
from store.format import MEASURED_FILE

# Fractions of 1, by `cli probe`: of class labels, of masks, of boxes.
PROBED = ("probe_top1", "knn_top1", "probe_miou", "probe_objectness_ap", "probe_class_accuracy")


def read_measured(store: Path) -> dict[str, Any]:
    """`extraction_s` and `encoded` (added up over resumed runs), and `PROBED`; empty when unknown."""
    try:
        values: dict[str, Any] = json.loads((store / MEASURED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


class ExtractionClock:
    """An observer of the extraction that adds its time and its images to the record while it runs.

    So a run that is stopped or killed counts too, but for what it did since the last record (`every_s` seconds).
    """

    def __init__(self, store: Path, every_s: float = 10.0) -> None:
        self.store, self.every_s = store, every_s
        self.last: tuple[int, int, float] | None = None  # images done, images in all, when
        self.seconds, self.encoded = 0.0, 0  # not recorded yet

    def progress(self, done: int, total: int, message: str) -> None:
        if message != "encoding":
            return
        now = time.monotonic()
        # Otherwise another job begins, with images that came later; what it starts with was done before.
        if self.last is not None and self.last[1] == total and self.last[0] <= done:
            self.seconds += now - self.last[2]
            self.encoded += done - self.last[0]
        self.last = done, total, now
        if self.seconds >= self.every_s or done >= total:
            self.record()

    def record(self) -> None:
        """Add what is not recorded yet: other processes may be encoding other parts of the store."""
        if (
            not self.encoded or not self.store.exists()
        ):  # the staging store of a bucket is gone when it is complete
            return
        before = read_measured(self.store)
        note(
            self.store,
            extraction_s=float(before.get("extraction_s", 0.0)) + self.seconds,
            encoded=int(before.get("encoded", 0)) + self.encoded,
        )
        self.seconds, self.encoded = 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # An extraction that ends with an error, of a full disk for one, must end with that one.
        with contextlib.suppress(*((OSError, DistillError) if kind else ())):
            self.record()


def note_probe(store: Path, result: Mapping[str, Any]) -> None:
    """Keep what the features are worth (`extract.logits.probe_store`)."""
    note(store, **{name: result[name] for name in PROBED if name in result})


def note_verdict(store: Path, student: str, verdict: Mapping[str, Any]) -> None:
    """Keep whether the teacher is expected to help a student (`commands.verdict`): the report repeats it."""
    note(store, verdicts={**(read_measured(store).get("verdicts") or {}), student: verdict})


def forget_probe(store: Path) -> None:
    """Drop what was found out about features or labels that have changed since."""
    measured = read_measured(store)
    if known := {*PROBED, "verdicts"} & measured.keys():
        note(store, **dict.fromkeys(known))


def note(store: Path, **values: Any) -> None:
    """Keep `values` beside what is known already."""
    path = store / MEASURED_FILE
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps({**read_measured(store), **values}, indent=1).encode())
