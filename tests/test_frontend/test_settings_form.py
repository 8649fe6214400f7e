"""The form and the JSON editor are two views of one document; both validate as the training process does."""

from __future__ import annotations

import asyncio
import json
import operator
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from backend.server.catalog import detect_data_set
from backend.server.document import (
    document_of,
    read_settings,
    settings_of,
    settings_schema,
    student_families,
    student_of,
    task_fields,
    with_setting,
)
from backend.server.schemas import NewTask, TaskFields
from backend.task.configs import LABEL_TASKS
from backend.task.errors import OptionError
from backend.task.options import OPTIONS
from frontend import texts as texts_module
from frontend.form import problem_of, shown
from frontend.texts import TEXTS, Texts, preferred_language
from train.students.families import FAMILIES


def problems_of(document: dict[str, Any], student_type: str = "resnet") -> list[str]:
    validator = jsonschema.Draft7Validator(settings_schema(student_type))
    return [error.message for error in validator.iter_errors(document)]


def test_every_text_has_both_languages_and_the_same_places() -> None:
    for name, (english, chinese) in TEXTS.items():
        assert english, name
        assert chinese, name
        places = [set(re.findall(r"{(\w+)}", text)) for text in (english, chinese)]
        assert places[0] == places[1], name


def test_every_text_is_used() -> None:
    pages = Path(texts_module.__file__).parent
    code = "".join(path.read_text(encoding="utf-8") for path in pages.glob("*.py") if path.name != "texts.py")
    prefixes = tuple(re.findall(r"""f["']([a-z.]+\.)\{""", code))
    unused = [name for name in TEXTS if not re.search(rf"""["']{re.escape(name)}["']""", code)]
    assert [name for name in unused if not name.startswith(prefixes)] == []


@pytest.mark.parametrize(
    ("cookie", "accepted", "expected"),
    [
        (None, "", "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "de-DE,de;q=0.9", "en"),
        ("en", "zh-CN", "en"),
        ("zh", "en-US", "zh"),
        ("<script>", "en-US", "en"),
    ],
)
def test_the_language_is_the_chosen_one_else_the_browser_s(
    cookie: str | None, accepted: str, expected: str
) -> None:
    assert preferred_language(cookie, accepted) == expected


def test_families_sizes_and_defaults_are_the_registry_s() -> None:
    families = {family.type: family for family in student_families()}
    assert list(families) == list(FAMILIES)
    for kind, family in FAMILIES.items():
        assert [size.name for size in families[kind].sizes] == list(family.sizes)
        defaults = {setting.name: setting for setting in settings_of(kind)}
        recipe = dict(family.recipe)
        if family.task not in LABEL_TASKS:
            recipe["distillation_type"] = "feature"  # as the training process has it
        for name, value in recipe.items():
            if name in defaults:
                assert defaults[name].default == value, (kind, name)
                assert defaults[name].from_recipe is (family.recipe[name] == value), (kind, name)


def test_every_setting_of_the_form_has_a_name_in_both_languages() -> None:
    unnamed = {"student_model", "student_model_type", "student_model_size", "alpha", "distill_loss_type"}
    for setting in settings_of("resnet"):
        assert setting.name in unnamed or f"set.{setting.name}" in TEXTS, setting.name


def test_a_field_writes_one_name_and_replaces_every_other_spelling() -> None:
    nested = {"epochs": 5, "trainingConfig": {"total_epochs": 1, "batchSize": 8}, "loraAdvancedConfig": {}}
    document = with_setting({"totalEpochs": 7, "epochs": 5, "trainingConfig": {"epochs": 9}}, "epochs", 20)
    assert document == {"totalEpochs": 20}
    assert with_setting(nested, "batch_size", None)["trainingConfig"] == {"total_epochs": 1}
    assert with_setting({"studentModelConfig": {"initMethod": "pretrained"}}, "pretrained", None) == {}


def test_changing_one_weight_keeps_the_other_one_of_alpha() -> None:
    document = with_setting({"alpha": 0.7}, "soft_label_weight", 0.9)
    values = read_settings(document).values
    assert (values["soft_label_weight"], values["hard_label_weight"]) == (0.9, 0.3)


def test_a_document_becomes_a_task_and_comes_back() -> None:
    document = {
        "taskName": "A",
        "teacherModel": "qwen",
        "studentModel": "resnet/resnet18",
        "datasetId": "flowers",
        "totalEpochs": 3,
        "learningRate": 0.003,
        "gpuDevices": "0,1",
        "optimizer": "sgd",
        "control": True,
    }
    fields = NewTask(task_id="a", **task_fields(document))
    assert fields.training_config == {"optimizer": "sgd", "control": True}
    assert document_of(TaskFields(**fields.model_dump(exclude={"task_id"}))) == document


def test_the_platform_s_nested_document_is_understood() -> None:
    document = {
        "studentModelType": "vit",
        "studentModelSize": "tiny",
        "datasetId": 12,
        "trainingConfig": {"optimizer": "sgd", "loraAdvancedConfig": {"targetModules": ["qkv", "proj"]}},
        "distillationAdvancedConfig": {"lossType": "cosine"},
    }
    assert problems_of(document, "vit") == []
    fields = task_fields(document)
    assert (fields["student_model"], fields["dataset_id"]) == ("vit/vit-tiny", "12")
    assert fields["training_config"] == {
        "optimizer": "sgd",
        "featureLossType": "cosine",
        "loraTargetModules": "qkv,proj",
    }
    assert str(student_of(document)) == "vit/vit-tiny"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"epochs": 0}, "minimum"),
        ({"epochs": "many"}, "not of type"),
        ({"optimizer": "lion"}, "not one of"),
        ({"learningRate": 0}, "less than or equal to the minimum"),
        ({"epoch": 5}, "Additional properties"),
        ({"trainingConfig": {"epoch": 5}}, "Additional properties"),
    ],
)
def test_the_schema_refuses_what_the_training_process_refuses(document: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in problems_of(document)), problems_of(document)
    read = read_settings(document)
    assert read.problems or read.warnings


def test_the_schema_is_as_strict_as_the_options() -> None:
    """At every limit of an option and just outside it, form and schema agree with the limits."""
    holds = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    for setting in settings_of("resnet"):
        for limit in setting.limits.values():
            steps = (-1, 0, 1) if setting.kind == "integer" else (-1e-3, 0.0, 1e-3)
            for step in steps:
                value = limit + step
                accepted = all(holds[name](value, bound) for name, bound in setting.limits.items())
                case = (setting.name, value)
                assert (problem_of(Texts("en"), setting, value) == "") is accepted, case
                assert (problems_of({setting.key: value}) == []) is accepted, case


@pytest.mark.parametrize(
    ("name", "typed", "english", "chinese"),
    [
        ("epochs", "0", "At least 1", "至少为 1"),
        ("epochs", "2.5", "Enter a whole number", "请输入整数"),
        ("learning_rate", "fast", "Enter a number", "请输入数字"),
        ("learning_rate", "0", "Must be more than 0", "必须大于 0"),
        ("lora_dropout", "1", "Must be less than 1", "必须小于 1"),
        ("image_size", "5000", "At most 4096", "最多为 4096"),
        ("learning_rate", "1e-4", "", ""),
    ],
)
def test_a_wrong_value_is_explained_in_the_page_s_language(
    name: str, typed: str, english: str, chinese: str
) -> None:
    setting = next(setting for setting in settings_of("resnet") if setting.name == name)
    assert problem_of(Texts("en"), setting, typed) == english
    assert problem_of(Texts("zh"), setting, typed) == chinese


def test_numbers_are_shown_without_exponents_people_have_to_decode() -> None:
    assert [shown(value) for value in (0.0001, 5e-05, 32, 4.0, True, [0, 1], None, 1e-9)] == [
        *("0.0001", "0.00005", "32", "4", "true", "0,1", "", "1e-09")
    ]


def test_what_is_not_understood_is_reported_and_never_raised() -> None:
    read = read_settings({"epochs": "many", "trainingConfig": "x"})
    assert read.wrong == {"epochs": "expected a whole number, got 'many'"}
    assert len(read.problems) == 2
    with pytest.raises(OptionError, match="epochs"):
        task_fields({"epochs": "many", "studentModel": "resnet18"})


def test_control_is_an_option_of_the_platform_too() -> None:
    assert OPTIONS["control"].read("true") is True
    assert json.loads(json.dumps(settings_schema("resnet")))["properties"]["control"]


@pytest.mark.parametrize("labeled", [0, 4, 10])
def test_a_data_set_is_described_by_the_sources_of_stage_one(tmp_path: Path, labeled: int) -> None:
    """A table of ten images, of which some have a label."""
    (tmp_path / "set").mkdir()
    lines = ["image,label"]
    for index in range(10):
        Image.new("RGB", (32, 32), (index * 20, 0, 0)).save(tmp_path / "set" / f"{index}.png")
        lines.append(f"{index}.png,{('cat', 'dog')[index % 2] if index < labeled else ''}")
    (tmp_path / "set" / "images.csv").write_text("\n".join(lines))
    found = asyncio.run(detect_data_set(tmp_path, "set"))
    assert (found.problem, found.kind, found.samples) == ("", "table", 10)
    assert found.labeled_share == labeled / 10
    assert set(found.class_names) == ({"cat", "dog"} if labeled else set())


def test_what_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = asyncio.run(detect_data_set(tmp_path, "empty"))
    assert str(tmp_path / "empty") in found.problem
    assert "Traceback" not in found.problem
    assert "plain name" in asyncio.run(detect_data_set(tmp_path, "../other")).problem
