"""A task → the command line of the training process. The one place where the two meet; `backend.task` reads it back.

`OPTION_OF_FIELD` is the whole mapping of settings; further settings go as JSON through `--training_config`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backend.server.schemas import TaskFields
from backend.server.settings import Settings
from backend.task.safety import inside

SCRIPT = Path(__file__).resolve().parents[2] / "train_qwen_vl_distillation.py"

# Field of a task → option of the training process. A field that is not given is not passed.
OPTION_OF_FIELD: dict[str, str] = {
    "task_name": "task_name",
    "teacher_model": "teacher_model",
    "student_model": "student_model",
    "student_model_type": "student_model_type",
    "student_model_size": "student_model_size",
    "dataset_id": "dataset_id",
    "val_dataset_id": "val_dataset_id",
    "task_type": "task_type",
    "num_classes": "num_classes",
    "total_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "temperature": "temperature",
    "alpha": "alpha",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
}
# Fields that are paths below the models root.
PATH_OF_FIELD: dict[str, str] = {"teacher_path": "teacher_path", "student_path": "student_path"}
FIELD_OF_OPTION: dict[str, str] = {
    option: field for field, option in (OPTION_OF_FIELD | PATH_OF_FIELD).items()
}


class Place(NamedTuple):
    """Where a task is and what it runs on."""

    task_id: str
    output_dir: Path
    devices: str


class Order(NamedTuple):
    """One process to start: the options, the folder that gets its log, and how often the task was started."""

    task_id: str
    attempt: int
    words: list[str]
    output_dir: Path


def training_words(fields: TaskFields, place: Place, settings: Settings) -> list[str]:
    """The options of one task, `--name=value` each, in the order of the training process's help.

    Raises:
        OptionError: when a path is not below the models root.
    """
    return [f"--{name}={value}" for name, value in options_of_task(fields, place, settings)]


def command_line(words: list[str]) -> list[str]:
    """The whole command: this Python, the entry script, the options."""
    return [sys.executable, str(SCRIPT), *words]


def options_of_task(fields: TaskFields, place: Place, settings: Settings) -> Iterator[tuple[str, str]]:
    values = fields.model_dump()
    yield "task_id", place.task_id
    yield "api_base_url", settings.api_base_url
    for field, option in OPTION_OF_FIELD.items():
        if values[field] not in (None, ""):
            yield option, str(values[field])
    for field, option in PATH_OF_FIELD.items():
        # A platform passes <models root>/<teacher> for every task.
        name = values[field] or (default_teacher_path(values) if field == "teacher_path" else None)
        if name:
            yield option, str(inside(option, settings.models_root, name))
    yield "models_root", str(settings.models_root)
    yield "datasets_root", str(settings.datasets_root)
    yield "output_dir", str(place.output_dir)
    yield "gpu_devices", place.devices
    if fields.training_config:
        yield "training_config", json.dumps(fields.training_config, allow_nan=False)


def default_teacher_path(values: Mapping[str, Any]) -> str | None:
    """The teacher's name, as a platform passes it, unless the JSON says where its weights are (`modelPath`)."""
    name = values["teacher_model"]
    config = values["training_config"]
    nested = config.get("teacherModelConfig")
    given = "teacherPath" in config or "modelPath" in config
    given = given or (isinstance(nested, dict) and bool(nested.get("modelPath")))
    return None if given else name
