"""Calls that a training process could not deliver: it ended while this server was not running.

The process keeps them in `undelivered.jsonl` of its output folder; they are applied when its end is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from backend.server.errors import TaskError
from backend.server.schemas import (
    Count,
    ErrorLine,
    NewEvaluation,
    NewHistoryPoint,
    Progress,
    ReportedPath,
    ReportedUrl,
)
from backend.server.tasks import Tasks
from backend.task.main import UNDELIVERED
from console.output import get_logger
from files.reading import open_regular

log = get_logger("server")

LARGEST_FILE = 50_000_000


def apply_undelivered(tasks: Tasks, task_id: str) -> None:
    """Apply the calls that the latest attempt could not deliver. All of them may be repeated."""
    try:
        folder, since = tasks.output_dir(task_id), tasks.read(task_id).started_at
        records = read_records(folder / UNDELIVERED)
    except (OSError, TaskError):  # the usual case: there is no such file
        return
    for record in records:
        if since is None or record.get("time", 0) < since.timestamp():
            continue  # of an earlier attempt
        try:
            apply(tasks, task_id, record)
        except (ValidationError, KeyError, TypeError) as error:
            log.warning("task %s: a line of %s is skipped: %s", task_id, UNDELIVERED, type(error).__name__)


def read_records(path: Path) -> list[dict[str, Any]]:
    with open_regular(path) as file:
        lines = file.read(LARGEST_FILE).decode("utf-8", "replace").splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def apply(tasks: Tasks, task_id: str, record: Mapping[str, Any]) -> None:
    """What the route of the call's kind does. Raises ValidationError, KeyError, TypeError for a broken record."""
    kind, query, body = record["kind"], record["query"], record["body"]
    if kind == "progress":
        epoch = TypeAdapter(Count).validate_python(query["currentEpoch"])
        tasks.report_progress(task_id, epoch, None, None, Progress.model_validate(body))
    elif kind == "history":
        tasks.report_history(task_id, NewHistoryPoint.model_validate(body))
    elif kind == "model-path":
        path = TypeAdapter(ReportedPath).validate_python(query["modelPath"])
        tasks.report_model(task_id, path, TypeAdapter(ReportedUrl).validate_python(query["modelUrl"]))
    elif kind == "evaluations":
        tasks.report_evaluation(task_id, NewEvaluation.model_validate(body))
    elif kind == "complete":
        tasks.report_end(task_id, "complete")
    elif kind == "error":
        tasks.report_end(task_id, "error", TypeAdapter(ErrorLine).validate_python(query["errorMessage"]))
