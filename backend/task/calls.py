"""The platform's HTTP calls as data: method, path, query, body. What each carries is defined here and nowhere else.

Accuracies are percent (0 to 100); losses are plain; precision, recall, F1 and mAP are fractions of 1. A value
that is not known (or not a finite number) is `null` in a body and left out of a query.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from console.output import redact

# The descriptor of the pipe to the reporting process, for the process that works and for rank 0.
PIPE_VARIABLE = "QWEN_DISTILL_PIPE"
LONGEST_ERROR = 500
HISTORY_NUMBERS = (
    *("trainLoss", "trainAccuracy", "valLoss", "valAccuracy", "distillLoss", "hardLoss", "softLoss"),
    *("gpuUsage", "memoryUsage", "epochTime"),
)
EVALUATION_NUMBERS = ("precision", "recall", "f1Score", "map50", "map95")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call. A newer call with the same `replaces` replaces an older one that is still waiting.

    `closes` marks the end-of-task call, which is sent after all others and tried hardest.
    """

    kind: str
    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    replaces: str | None = None
    closes: bool = False

    @property
    def target(self) -> str:
        """Path and query as they go over the wire, percent-encoded."""
        text = urlencode({name: str(value) for name, value in self.query.items()}, quote_via=quote)
        return f"{self.path}?{text}" if text else self.path

    @property
    def payload(self) -> bytes | None:
        """The body as UTF-8 JSON, or None."""
        return None if self.body is None else json.dumps(self.body, allow_nan=False).encode("utf-8")

    def record(self) -> dict[str, Any]:
        """What `undelivered.jsonl` keeps, enough to make the call by hand."""
        return {name: value for name, value in asdict(self).items() if name not in ("replaces", "closes")}


class TaskCalls:
    """The calls of one task, all below `/model-distillation/tasks/{taskId}`; the last part of the path is the kind."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.base = f"/model-distillation/tasks/{quote(task_id, safe='')}"

    def call(self, kind: str, method: str, **rest: Any) -> Call:
        return Call(kind=kind, method=method, path=f"{self.base}/{kind}", **rest)

    def progress(
        self,
        *,
        epoch: int,
        total_epochs: int,
        train_loss: Any = None,
        val_loss: Any = None,
        val_accuracy: Any = None,
        message: str | None = None,
    ) -> Call:
        """`PUT …/progress`: query for every server, body for newer ones. `val_accuracy` is a fraction of 1."""
        accuracy, loss = percent(val_accuracy), finite(train_loss)
        query = {"currentEpoch": epoch, "accuracy": accuracy, "loss": loss}
        body = {
            "currentEpoch": epoch,
            "totalEpochs": total_epochs,
            "trainLoss": loss,
            "valLoss": finite(val_loss),
            "valAccuracy": accuracy,
            "status": "RUNNING",
            **({} if message is None else {"message": one_line(message)}),
        }
        known = {name: value for name, value in query.items() if value is not None}
        return self.call("progress", "PUT", query=known, body=body, replaces="progress")

    def history(self, *, epoch: int, values: Mapping[str, Any]) -> Call:
        """`POST …/history`: one row per epoch; `values` holds the numbers by their JSON names."""
        numbers = {name: finite(values.get(name)) for name in HISTORY_NUMBERS}
        return self.call("history", "POST", body={"taskId": self.task_id, "epoch": epoch, **numbers})

    def model_path(self, path: Path) -> Call:
        """`PUT …/model-path`: where the best model is."""
        query = {"modelPath": str(path), "modelUrl": path.as_uri()}
        return self.call("model-path", "PUT", query=query, replaces="model-path")

    def evaluations(
        self, *, values: Mapping[str, Any], dataset_id: str, dataset_name: str, samples: int, details: Any
    ) -> Call:
        """`POST …/evaluations`: the final metrics; `details` becomes a JSON string."""
        body = {
            "taskId": self.task_id,
            **{name: finite(values.get(name)) for name in EVALUATION_NUMBERS},
            "evalDatasetId": dataset_id,
            "evalDatasetName": dataset_name,
            "evalSampleCount": samples,
            "detailedResults": json.dumps(details, ensure_ascii=False, allow_nan=False),
        }
        return self.call("evaluations", "POST", body=body)

    def complete(self) -> Call:
        """`POST …/complete`: the task has succeeded."""
        return self.call("complete", "POST", closes=True)

    def error(self, message: str) -> Call:
        """`PUT …/error`: the task has failed; the message is cut to one line of at most 500 characters."""
        return self.call(
            "error", "PUT", query={"errorMessage": one_line(message)[:LONGEST_ERROR]}, closes=True
        )


def finite(value: Any) -> float | None:
    """The number, or None where it is missing or not finite (JSON has no NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: Any) -> float | None:
    """A fraction of 1 as percent, clamped to 0–100."""
    number = finite(value)
    return None if number is None else round(min(max(number * 100, 0.0), 100.0), 6)


def one_line(text: str) -> str:
    """Text with line breaks and control characters as single blanks, passwords in addresses hidden."""
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", redact(text)).strip()


# -- on their way from the process that works to the one that reports: JSON lines over a pipe -------------


class Sender(Protocol):
    """What takes calls: the queue itself, or a pipe to it. `send` does not block for long."""

    def send(self, call: Call) -> None: ...


class PipeSender:
    """Writes calls to a file descriptor; when nothing reads them any more, they are dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lock = threading.Lock()
        # Decoding processes and ranks must not hold the pipe open.
        os.set_inheritable(descriptor, False)

    def send(self, call: Call) -> None:
        line = json.dumps(asdict(call)).encode("utf-8") + b"\n"
        with self.lock:
            try:
                while line:
                    line = line[os.write(self.descriptor, line) :]
            except OSError:
                return


def read_calls(descriptor: int) -> Iterator[Call]:
    """The calls that come through a pipe until its other end is closed; one that a kill cut off is dropped."""
    with os.fdopen(descriptor, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            yield Call(**json.loads(line))
