"""A task → the training process's command line → what the training process reads: nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.server.command import OPTION_OF_FIELD, PATH_OF_FIELD, SCRIPT, Place, command_line, training_words
from backend.server.schemas import TaskFields
from backend.server.settings import Settings
from backend.task.configs import StageConfigs
from backend.task.errors import OptionError
from backend.task.options import OPTIONS
from backend.task.parsing import parse_arguments
from backend.task.request import read_request

FULL: dict[str, Any] = {
    "task_name": '--odd name, 花 = "quoted" $(touch x) ; rm',
    "teacher_model": "tiny",
    "teacher_path": "tiny",
    "student_model": "resnet/resnet50",
    "student_model_type": "resnet",
    "student_model_size": "resnet50",
    "student_path": "tiny",
    "task_type": "classification",
    "num_classes": 10,
    "dataset_id": "花 two",
    "val_dataset_id": "flowers",
    "total_epochs": 7,
    "batch_size": 3,
    "learning_rate": 1e-7,
    "temperature": 3.5,
    "alpha": 0.7,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "training_config": {"optimizer": "sgd", "imageSize": 64, "gpuDevices": [3]},
}


def place(settings: Settings, devices: str = "cpu") -> Place:
    return Place("7", settings.output_root / "7", devices)


def test_every_field_has_an_option_and_every_option_exists() -> None:
    special = {"gpu_devices", "training_config"}
    assert set(TaskFields.model_fields) == set(OPTION_OF_FIELD) | set(PATH_OF_FIELD) | special
    assert {*OPTION_OF_FIELD.values(), *PATH_OF_FIELD.values()} <= set(OPTIONS)


def test_the_training_process_reads_back_every_field(settings: Settings) -> None:
    words = training_words(TaskFields(**FULL), place(settings, "0,1"), settings)
    arguments = parse_arguments(words)
    assert (arguments.problems, arguments.warnings) == ([], [])
    read = arguments.values
    for field, option in OPTION_OF_FIELD.items():
        if field != "alpha":
            assert read[option] == FULL[field], option
    assert (read["soft_label_weight"], read["hard_label_weight"]) == (0.7, 0.3)
    assert read["teacher_path"] == read["student_path"] == str(settings.models_root / "tiny")
    assert read["datasets_root"] == str(settings.datasets_root)
    assert read["api_base_url"] == f"http://127.0.0.1:{settings.port}"
    assert read["output_dir"] == str(settings.output_root / "7")
    assert read["gpu_devices"] == "0,1"
    assert json.loads(read["training_config"]) == FULL["training_config"]


def test_it_becomes_the_task_that_was_asked_for(settings: Settings) -> None:
    request = read_request(training_words(TaskFields(**FULL), place(settings), settings))
    assert (request.task_id, request.task_name) == ("7", FULL["task_name"])
    assert str(request.student) == "resnet/resnet50"
    assert request.dataset_dir == settings.datasets_root / "花 two"
    assert request.val_dataset_dir == settings.datasets_root / "flowers"
    assert request.devices == ("cpu",)
    chosen = StageConfigs(request).settings
    assert (chosen["epochs"], chosen["optimizer"], chosen["image_size"]) == (7, "sgd", 64)


def test_it_is_what_a_platform_would_pass(settings: Settings) -> None:
    """The command line of docs/platform.md, and ours for the same task, are the same task."""
    pairs = {
        "task_id": "7",
        "api_base_url": f"http://127.0.0.1:{settings.port}",
        "teacher_model": "tiny",
        "teacher_path": str(settings.models_root / "tiny"),
        "student_model": "yolov8s",
        "dataset_id": "flowers",
        "datasets_root": str(settings.datasets_root),
        "output_dir": str(settings.output_root / "7"),
        "gpu_devices": "0,1",
    }
    foreign = read_request([word for name, value in pairs.items() for word in (f"--{name}", value)])
    fields = TaskFields(teacher_model="tiny", student_model="yolov8s", dataset_id="flowers")
    ours = read_request(training_words(fields, place(settings, "0,1"), settings))
    differing = {name for name in vars_of(foreign) if getattr(foreign, name) != getattr(ours, name)}
    assert differing == {"chosen"}  # ours also names the models root, for paths in the JSON
    assert dict(ours.chosen) == {**foreign.chosen, "models_root": str(settings.models_root)}


def vars_of(request: object) -> list[str]:
    return list(type(request).__dataclass_fields__)  # type: ignore[attr-defined]


def test_what_is_not_given_is_not_passed(settings: Settings) -> None:
    fields = TaskFields(student_model="resnet18", dataset_id="flowers", teacher_model="tiny")
    read = parse_arguments(training_words(fields, place(settings), settings)).values
    assert not {"num_classes", "task_type", "epochs", "training_config", "student_path"} & set(read)


def test_a_teacher_named_in_the_json_is_not_overridden(settings: Settings) -> None:
    config = {"teacherModelConfig": {"modelPath": "tiny"}}
    fields = TaskFields(
        teacher_model="a name for people",
        student_model="resnet18",
        dataset_id="flowers",
        training_config=config,
    )
    request = read_request(training_words(fields, place(settings), settings))
    assert request.teacher_path == settings.models_root / "tiny"


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "~root", "link"])
def test_paths_stay_below_the_models_root(settings: Settings, name: str, tmp_path: Path) -> None:
    (settings.models_root / "link").symlink_to(tmp_path)
    for field in ("teacher_path", "student_path"):
        fields = TaskFields(**{"student_model": "resnet18", "dataset_id": "flowers", field: name})
        with pytest.raises(OptionError, match=r"'\.\.' is not allowed|expected a name below|leads outside"):
            training_words(fields, place(settings), settings)


PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40).filter(
    lambda text: text.strip() == text
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=PLAIN, dataset=PLAIN, number=st.floats(1e-12, 1e9), config=st.dictionaries(PLAIN, st.floats(0, 1))
)
def test_no_text_of_a_form_becomes_another_option(
    name: str, dataset: str, number: float, config: dict[str, float]
) -> None:
    roots = {f"{root}_root": Path("/nowhere") for root in ("datasets", "models", "output")}
    settings = Settings(**roots, port=8080)
    fields = TaskFields(
        task_name=name, dataset_id=dataset, student_model=name, learning_rate=number, training_config=config
    )
    words = training_words(fields, place(settings), settings)
    read = parse_arguments(words)
    assert read.warnings == []
    assert (read.values["task_name"], read.values["dataset_id"]) == (fields.task_name, fields.dataset_id)
    assert read.values["learning_rate"] == number
    assert json.loads(read.values.get("training_config") or "{}") == config
    names = {word[2:].partition("=")[0] for word in words}
    assert set(read.values) == names


def test_the_command_is_the_entry_script() -> None:
    python, script, *words = command_line(["--task_id=7"])
    assert Path(python).is_file()
    assert Path(script) == SCRIPT
    assert SCRIPT.is_file()
    assert words == ["--task_id=7"]
