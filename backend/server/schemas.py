"""What requests carry and answers hold, as pydantic models: camelCase in JSON, snake_case in Python.

Limits are those of the tables: what passes here fits into any of the three databases.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from backend.server.database import TaskState
from backend.task.calls import LONGEST_ERROR, one_line
from backend.task.options import OPTIONS, is_plain

Content = TypeVar("Content")
LARGEST = 2**31 - 1
LONGEST_DETAILS = 1_000_000
LONGEST_CONFIG = 100_000
# An id is a folder's name, a part of URLs and a key in every database.
TASK_ID = r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,63}$"


def plain(text: str) -> str:
    """Text without control characters and lone surrogates, which not every database takes."""
    if not all(is_plain(character) for character in text):
        raise ValueError("control characters are not allowed")
    return text


def printable_json(value: Any) -> Any:
    """JSON text, with what a database does not take (NUL, lone surrogates) escaped; it stays the same document."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\\u0000").encode("utf-8", "backslashreplace").decode("utf-8")


def config_object(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that can be written as a line of text."""
    try:
        text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON object without NaN, not nested too deeply") from None
    if len(text) > LONGEST_CONFIG:
        raise ValueError(f"expected at most {LONGEST_CONFIG} characters, got {len(text)}")
    return value


def blank_as_none(value: Any) -> Any:
    """A form's empty field is one that was not filled in."""
    return None if isinstance(value, str) and not value.strip() else value


Word = Annotated[str, StringConstraints(strip_whitespace=True, max_length=50), AfterValidator(plain)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200), AfterValidator(plain)]
Devices = Annotated[str, StringConstraints(strip_whitespace=True, max_length=100), AfterValidator(plain)]
PathText = Annotated[str, StringConstraints(strip_whitespace=True, max_length=500), AfterValidator(plain)]
TaskId = Annotated[str, Field(pattern=TASK_ID)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Model(BaseModel):
    """The base of all: `taskName` in JSON is `task_name` in Python, and both are accepted."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, from_attributes=True, extra="forbid"
    )


class Answer(BaseModel, Generic[Content]):
    """Every answer of the platform: `code` is 200 for success, else the HTTP status."""

    code: int = 200
    message: str = "success"
    data: Content | None = None


class TaskFields(Model):
    """What a task is: the fields of the create form. What is not given, the student's recipe or a default decides."""

    task_name: Name = ""
    teacher_model: Annotated[Name | None, BeforeValidator(blank_as_none)] = Field(
        None, description=OPTIONS["teacher_model"].help
    )
    teacher_path: Annotated[PathText | None, BeforeValidator(blank_as_none)] = Field(
        None, description="The teacher's folder or file below the models root (default: its name)."
    )
    student_model: Annotated[Name, Field(min_length=1)] = Field(description=OPTIONS["student_model"].help)
    student_model_type: Annotated[Word | None, BeforeValidator(blank_as_none)] = None
    student_model_size: Annotated[Word | None, BeforeValidator(blank_as_none)] = None
    student_path: Annotated[PathText | None, BeforeValidator(blank_as_none)] = Field(
        None, description="Weights to start from, below the models root, if they exist."
    )
    task_type: Annotated[Word | None, BeforeValidator(blank_as_none)] = Field(
        None, description=f"{OPTIONS['task_type'].help} {', '.join(OPTIONS['task_type'].choices)}."
    )
    num_classes: Annotated[int, Field(ge=1, le=LARGEST)] | None = Field(
        None, description=OPTIONS["num_classes"].help
    )
    dataset_id: Annotated[Name, Field(min_length=1)] = Field(description=OPTIONS["dataset_id"].help)
    val_dataset_id: Annotated[Name | None, BeforeValidator(blank_as_none)] = None
    total_epochs: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    learning_rate: Number | None = None
    temperature: Number | None = None
    alpha: Fraction | None = Field(None, description=OPTIONS["alpha"].help)
    lora_rank: Count | None = None
    lora_alpha: Number | None = None
    lora_dropout: Number | None = None
    gpu_devices: Annotated[Devices | None, BeforeValidator(blank_as_none)] = Field(
        None, description="0 or 0,1 or cpu; none: the next free GPU, the CPU on a machine without one."
    )
    training_config: Annotated[dict[str, Any], AfterValidator(config_object)] = Field(
        default_factory=dict, description="Further settings, camelCase; the fields above have priority."
    )


class NewTask(TaskFields):
    """A task to create; without an id it gets one."""

    task_id: TaskId | None = None


class TaskView(TaskFields):
    """A task as it stands."""

    task_id: str
    state: TaskState
    datasets_root: str
    models_root: str
    output_dir: str
    planned_epochs: int | None = Field(description="Epochs that it will train: as asked, else the recipe's.")
    current_epoch: int | None
    train_loss: float | None
    val_loss: float | None
    accuracy: float | None = Field(description="Of the validation split after the last epoch, percent.")
    best_accuracy: float | None = Field(description="The best of all epochs, percent.")
    progress: float = Field(description="Share of the epochs that are done, percent.")
    time_left: float | None = Field(description="Seconds until the last epoch ends, as far as known.")
    message: str | None
    model_path: str | None
    model_url: str | None
    error_message: str | None
    exit_code: int | None
    attempt: int = Field(description="How often it has been started.")
    devices: str | None = Field(description="The devices it runs or ran on.")
    queue_position: int | None = Field(None, description="Its place among the waiting tasks, from 1.")
    created_at: datetime
    updated_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None


class TaskPage(Model):
    """One page of the tasks that a filter lets through, newest first."""

    total: int
    page: int
    size: int
    items: list[TaskView]


class Progress(Model):
    """The body of `PUT …/progress`; older training processes send the query parameters alone."""

    model_config = ConfigDict(extra="ignore")

    current_epoch: Count | None = None
    total_epochs: Count | None = None
    train_loss: Number | None = None
    val_loss: Number | None = None
    val_accuracy: Percent | None = None
    status: Annotated[str, Field(max_length=50)] | None = None
    message: Annotated[str, Field(max_length=10_000), AfterValidator(one_line)] | None = None


class HistoryPoint(Model):
    """One epoch. Accuracies and usage are percent, memory is megabytes, time is seconds."""

    epoch: Count
    train_loss: Number | None = None
    train_accuracy: Percent | None = None
    val_loss: Number | None = None
    val_accuracy: Percent | None = None
    distill_loss: Number | None = None
    hard_loss: Number | None = None
    soft_loss: Number | None = None
    gpu_usage: Number | None = None
    memory_usage: Number | None = None
    epoch_time: Number | None = None


class NewHistoryPoint(HistoryPoint):
    """`POST …/history`."""

    model_config = ConfigDict(extra="ignore")

    task_id: str | None = None


class EvaluationResult(Model):
    """Final metrics, fractions of 1; `detailedResults` is a JSON document as text."""

    precision: Fraction | None = None
    recall: Fraction | None = None
    f1_score: Fraction | None = None
    map50: Fraction | None = None
    map95: Fraction | None = None
    eval_dataset_id: Name | None = None
    eval_dataset_name: Name | None = None
    eval_sample_count: Count | None = None
    detailed_results: (
        Annotated[str, Field(max_length=LONGEST_DETAILS), BeforeValidator(printable_json)] | None
    ) = None


class NewEvaluation(EvaluationResult):
    """`POST …/evaluations`."""

    model_config = ConfigDict(extra="ignore")

    task_id: str | None = None


class EvaluationView(EvaluationResult):
    """An evaluation as it was reported."""

    created_at: datetime


class OutputFile(Model):
    """A file of the task's output folder; `name` is its path there."""

    name: str
    size: int
    modified_at: datetime


ErrorLine = Annotated[
    str, Field(min_length=1, max_length=10_000), AfterValidator(lambda text: one_line(text)[:LONGEST_ERROR])
]
ReportedPath = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(one_line)]
ReportedUrl = Annotated[str, Field(max_length=3000), AfterValidator(one_line)]
