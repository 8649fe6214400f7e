"""What the teacher knows of the task, to notice when the student knows more.

Where a student is better than a probe of the teacher's features, the teacher's predictions teach it the teacher's mistakes.
The distillation terms end then, and the labels teach alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from store.format import LABEL, LOGITS, MEASURED_FILE
from store.reader import Split, Store

#: Logits that are read to count how often the teacher agrees with the labels.
ROWS_READ = 20_000


@dataclass(frozen=True)
class TeacherReference:
    """`value` of the task's metric that the teacher's probe reaches, measured on `samples`."""

    metric: str
    value: float
    samples: int

    def is_beaten(self, value: float, samples: int) -> bool:
        """Whether a student's `value`, measured on `samples`, is better by more than the standard error of the difference."""
        variance = sum(
            min(max(share * (1 - share), 0.0), 0.25) / max(count, 1)
            for share, count in ((self.value, self.samples), (value, samples))
        )
        return value - self.value > math.sqrt(variance)


def teacher_reference(
    store: Store, val: Split, train: Split, metric: str, logits: str | None
) -> TeacherReference | None:
    """The accuracy of stored logits on labeled rows, or the recorded mean IoU of the probe of cells; None: not known.

    Measured where the student is, on `val`: a probe fitted on all labels predicted its rows without having seen them. On
    `train` only where `val` has no logits: those are out of fold too, but with few labels each fold's probe knows less
    than the probe that teaches the unlabeled rows, and distillation would end too early.
    """
    if metric == "top1":
        return top1_of(val, logits) or top1_of(train, logits)
    if metric == "miou" and "://" not in store.location:
        path = store.path / MEASURED_FILE
        measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if measured.get("probe_miou") is not None:
            return TeacherReference(metric, float(measured["probe_miou"]), len(val))
    return None


def top1_of(split: Split, logits: str | None) -> TeacherReference | None:
    """The accuracy of the logits with this name, None: of the first ones; None where the split has none or no labels."""
    stored = sorted(name for name in split.names if name.startswith(f"{LOGITS}/"))
    name = f"{LOGITS}/{logits}" if logits else next(iter(stored), "")
    return accuracy_of(split, name) if name in stored else None


def accuracy_of(split: Split, name: str) -> TeacherReference | None:
    """How often the logits' best class is the label, over at most ROWS_READ rows evenly spread; None without labels."""
    labels = split.read(LABEL)
    rows = np.flatnonzero((labels >= 0) & split.valid)
    if not len(rows):
        return None
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(ROWS_READ, len(rows))).astype(np.int64))]
    values = split.gather(rows, [name])[name].astype(np.float32)
    known = np.isfinite(values).all(1)
    if not known.any():
        return None
    agreed = values[known].argmax(1) == labels[rows][known]
    return TeacherReference("top1", float(agreed.mean()), int(known.sum()))
