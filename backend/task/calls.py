"""The platform's HTTP calls as data: method, path, query, body. What each carries is said here and nowhere else.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from console.redaction import redact

# The descriptor of the pipe to the reporting process, for the process that works and for rank 0.
PIPE_VARIABLE = "QWEN_DISTILL_PIPE"
LONGEST_ERROR = 500
Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call. A newer call with the same `replaces` makes a waiting older one superfluous.

    `closes` marks the end-of-task call, which is sent after all others and tried hardest.
    """

    kind: str
    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Body | None = None
    replaces: str | None = None
    closes: bool = False

    @property
    def target(self) -> str:
        """Path and query as they go over the wire, percent-encoded."""
        text = urlencode({name: query_text(value) for name, value in self.query.items()}, quote_via=quote)
        return f"{self.path}?{text}" if text else self.path

    @property
    def payload(self) -> bytes | None:
        """The body as UTF-8 JSON, or None."""
        return None if self.body is None else json.dumps(self.body, allow_nan=False).encode("utf-8")

    def record(self) -> dict[str, Any]:
        """What `undelivered.jsonl` keeps, enough to make the call by hand."""
        return {
            "kind": self.kind,
            "method": self.method,
            "path": self.path,
            "query": dict(self.query),
            "body": self.body,
        }


def query_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def finite(value: Any) -> float | None:
    """The number, or None where it is missing or not finite (JSON has no NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: Any) -> float | None:
    """A fraction of 1 as percent, clamped to 0–100."""
    number = finite(value)
    return None if number is None else round(min(max(number * 100, 0.0), 100.0), 6)


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class TaskCalls:
    """The calls of one task, all below `/model-distillation/tasks/{taskId}`."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.base = f"/model-distillation/tasks/{quote(task_id, safe='')}"

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
        accuracy = percent(val_accuracy)
        loss = finite(train_loss)
        body: Body = {
            "currentEpoch": epoch,
            "totalEpochs": total_epochs,
            "trainLoss": loss,
            "valLoss": finite(val_loss),
            "valAccuracy": accuracy,
            "status": "RUNNING",
        }
        return Call(
            kind="progress",
            method="PUT",
            path=f"{self.base}/progress",
            query=known({"currentEpoch": epoch, "accuracy": accuracy, "loss": loss}),
            body=body if message is None else body | {"message": one_line(message)},
            replaces="progress",
        )

    def history(self, *, epoch: int, values: Mapping[str, Any]) -> Call:
        """`POST …/history`: one row per epoch; `values` holds the numbers by their JSON names."""
        numbers = {name: finite(values.get(name)) for name in HISTORY_NUMBERS}
        body = {"taskId": self.task_id, "epoch": epoch, **numbers}
        return Call(kind="history", method="POST", path=f"{self.base}/history", body=body)

    def model_path(self, path: Path) -> Call:
        """`PUT …/model-path`: where the best model lies."""
        query = {"modelPath": str(path), "modelUrl": path.as_uri()}
        return Call(
            kind="model-path",
            method="PUT",
            path=f"{self.base}/model-path",
            query=query,
            replaces="model-path",
        )

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
        return Call(kind="evaluations", method="POST", path=f"{self.base}/evaluations", body=body)

    def complete(self) -> Call:
        """`POST …/complete`: the task has succeeded."""
        return Call(kind="complete", method="POST", path=f"{self.base}/complete", closes=True)

    def error(self, message: str) -> Call:
        """`PUT …/error`: the task has failed; the message is cut to one line of at most 500 characters."""
        query = {"errorMessage": one_line(message)[:LONGEST_ERROR]}
        return Call(kind="error", method="PUT", path=f"{self.base}/error", query=query, closes=True)


HISTORY_NUMBERS = (
    "trainLoss",
    "trainAccuracy",
    "valLoss",
    "valAccuracy",
    "distillLoss",
    "hardLoss",
    "softLoss",
    "gpuUsage",
    "memoryUsage",
    "epochTime",
)
EVALUATION_NUMBERS = ("precision", "recall", "f1Score", "map50", "map95")


def one_line(text: str) -> str:
    """Text with line breaks and control characters as single blanks, passwords in addresses hidden."""
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", redact(text)).strip()


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
