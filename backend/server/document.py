"""A task's settings as one JSON document: what may be in it for a student, its values, and the command it leads to.

The document is the platform's training_config (`backend/task/parsing.py`): camelCase, flat or nested. A setting that it
lacks has the default of the student's recipe, else the general one; nothing is written for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import ValidationError

from backend.server.command import OPTION_OF_FIELD, PATH_OF_FIELD
from backend.server.errors import TaskError
from backend.server.schemas import NewTask, TaskFields
from backend.server.tasks import Tasks, requested_devices
from backend.task.configs import LABEL_TASKS, StageConfigs
from backend.task.errors import OptionError
from backend.task.options import GROUPS, OPTIONS, Option, camel_case
from backend.task.parsing import JSON_NAMES, NESTED, SPECIAL, Arguments, read_training_config, walk
from backend.task.request import reconcile
from console.options import options_of
from train.config import TrainConfig
from train.errors import ConfigError
from train.students.catalog import list_students
from train.students.families import FAMILIES, StudentName

JSON_KINDS: dict[str, dict[str, Any]] = {
    "text": {"anyOf": [{"type": "string"}, {"type": "number"}]},
    "long text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "list": {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "array"}]},
}
JSON_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
#: Other names in the JSON that decide an option, beside those of JSON_NAMES.
SPECIAL_NAMES = {
    "pretrained": ("initMethod",),
    "lora_bias": ("biasTrain",),
    "distill_loss_type": ("lossType",),
    "feature_loss_type": ("lossType",),
}
#: Set by the server itself, never by the form.
OF_THE_SERVER = frozenset({"task_id"})
#: Field of a task → option, for all that a task has beside its `training_config`.
FIELD_OPTIONS = {**OPTION_OF_FIELD, **PATH_OF_FIELD, "gpu_devices": "gpu_devices"}
WEIGHTS = ("soft_label_weight", "hard_label_weight")


# -- students ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a family: its name, and what is measured of it (None: not measured)."""

    name: str
    parameters: int | None
    macs: int | None


@dataclass(frozen=True, kw_only=True)
class StudentFamily:
    """A type of student. Without `sizes` (timm) any model name can be given."""

    type: str
    task: str
    sizes: tuple[Size, ...]
    recipe: Mapping[str, Any]


@cache
def student_families() -> tuple[StudentFamily, ...]:
    """All families of the registry, in its order."""
    rows = list_students()
    return tuple(
        StudentFamily(
            type=kind,
            task=family.task,
            sizes=tuple(
                Size(name=row["size"], parameters=row["parameters"], macs=row["macs"])
                for row in rows
                if row["type"] == kind
            ),
            recipe=family.recipe,
        )
        for kind, family in FAMILIES.items()
    )


# -- settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as a form shows it.

    Attributes:
        name: the option's name; `key` is its name in the JSON.
        kind: text, integer, number, boolean or list.
        default: what applies where it is not given; None: absent, or decided by something else.
        from_recipe: whether the default is that of the student's recipe.
        unavailable: why it has no effect on this student; empty where it has.
        needs: `lora` or `logits`: what must be in use for it to have an effect.
    """

    name: str
    key: str
    group: str
    kind: str
    help: str
    default: Any
    from_recipe: bool
    choices: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    needs: str = ""
    unavailable: str = ""

    def read(self, value: Any) -> Any:
        """The typed value, or None for an empty one. Raises OptionError when it is not one."""
        return OPTIONS[self.name].read(value)


def settings_of(student_type: str) -> tuple[Setting, ...]:
    """The settings of a task with such a student, in the order of the platform's options."""
    recipe = FAMILIES[student_type].recipe
    return tuple(
        describe_setting(group, option, recipe, student_type)
        for group, options in GROUPS.items()
        for option in options
        if option.from_json and option.name not in OF_THE_SERVER
    )


def describe_setting(group: str, option: Option, recipe: Mapping[str, Any], student_type: str) -> Setting:
    declared = options_of(TrainConfig).get(option.name) if option.shared else None
    reason = "" if declared is None else declared.not_for.get(student_type, "")
    if declared is not None and declared.students and student_type not in declared.students:
        reason = f"an option of {', '.join(declared.students)} students"
    if option.name == "task_type":
        default: Any = FAMILIES[student_type].task
    elif option.name == "num_classes":
        default = None  # the data set's
    elif option.name == "gpu_devices":
        default = None  # the queue's next free device
    elif option.name == "learning_rate" and recipe.get("optimizer") == "auto":
        default = recipe.get(option.name)  # the optimizer's own choice
    elif option.name == "distillation_type" and FAMILIES[student_type].task not in LABEL_TASKS:
        default = "feature"
    else:
        default = recipe.get(option.name, option.default)
    return Setting(
        name=option.name,
        key=json_name(option.name),
        group=group,
        kind=option.kind,
        help=option.help,
        default=default,
        from_recipe=option.name in recipe and recipe[option.name] == default,
        choices=option.choices,
        limits=option.limits,
        needs=option.needs,
        unavailable=reason,
    )


def settings_schema(student_type: str) -> dict[str, Any]:
    """The JSON schema (draft 7) of the document, with the defaults of such a student."""
    described = {setting.name: schema_of(setting) for setting in settings_of(student_type)}
    flat: dict[str, Any] = {
        spelling: {"$ref": f"#/definitions/{name}"}
        for spelling, name in JSON_NAMES.items()
        if name in described
    }
    flat |= {name: {} for name in SPECIAL}
    properties = {**flat, **{name: {"$ref": "#/definitions/nested"} for name in NESTED}}
    nested = {"type": "object", "properties": properties, "additionalProperties": False}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {**described, "nested": nested},
        **nested,
    }


def schema_of(setting: Setting) -> dict[str, Any]:
    schema: dict[str, Any] = {**JSON_KINDS[setting.kind], "description": setting.help}
    schema |= {JSON_LIMITS[name]: limit for name, limit in setting.limits.items()}
    if setting.choices:
        schema = {"enum": list(setting.choices), "description": setting.help}
    if setting.default is not None:
        schema["default"] = setting.default
    return schema


@dataclass(frozen=True)
class Settings:
    """A document that was read: typed values by option name, and what is wrong with it.

    `problems` are all of them; `wrong` are the names of options whose value is not accepted, with the reason.
    """

    values: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    wrong: Mapping[str, str] = field(default_factory=dict)


def read_settings(document: Mapping[str, Any]) -> Settings:
    """What a document says. Never raises: a form shows the problems."""
    try:
        read = read_training_config(json.dumps(document))
    except OptionError as error:
        return Settings({}, (str(error),))
    wrong = {}
    raw = raw_values(document)
    for name, value in raw.items():
        try:
            OPTIONS[name].read(value)
        except OptionError as error:
            wrong[name] = str(error)
    values = {name: value for name, value in read.values.items() if value is not None}
    values |= {name: raw[name] for name in wrong}
    return Settings(values, tuple(read.problems), tuple(read.warnings), wrong)


def raw_values(document: Mapping[str, Any]) -> dict[str, Any]:
    """Option → its value as the document has it; nested ones win over outer ones."""
    fields = sorted(walk(dict(document), Arguments()), key=lambda item: item[0].count("."))
    return {JSON_NAMES[name]: value for _, name, value in fields if name in JSON_NAMES}


def with_setting(document: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The document with one option changed: its other spellings are removed; None removes it altogether."""
    changed = dict(document)
    if name in WEIGHTS and (alpha := raw_values(document).get("alpha")) is not None:
        # `alpha` says both weights at once: the other one keeps its value.
        changed = without(changed, spellings_of("alpha"))
        kept = read_settings({"alpha": alpha}).values
        for weight in WEIGHTS:
            if weight not in raw_values(changed) and weight in kept:
                changed[camel_case(weight)] = kept[weight]
    changed = without(changed, spellings_of(name))
    if value is not None:
        changed[json_name(name)] = value
    return changed


def spellings_of(name: str) -> frozenset[str]:
    known = {spelling for spelling, option in JSON_NAMES.items() if option == name}
    return frozenset(known | set(SPECIAL_NAMES.get(name, ())))


def without(document: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """A copy without the fields of these names, also inside the nested objects; an object that gets empty goes too."""
    kept: dict[str, Any] = {}
    for name, value in document.items():
        if name in names:
            continue
        if name in NESTED and isinstance(value, dict):
            inner = without(value, names)
            if inner or not value:
                kept[name] = inner
        else:
            kept[name] = value
    return kept


#: Where a form writes an option that has several names in the JSON.
WRITTEN_AS = {"epochs": "totalEpochs"}


def json_name(name: str) -> str:
    return WRITTEN_AS.get(name) or camel_case(name)


def task_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as keywords of `TaskFields`: its own fields, and everything else as `training_config`.

    Raises OptionError with every problem on one line.
    """
    settings = read_settings(document)
    if settings.problems:
        raise OptionError("; ".join(settings.problems))
    values = dict(settings.values)
    student = reconcile(*(values.pop(f"student_model{part}", None) for part in ("", "_type", "_size")))
    fields = {
        field: values.pop(option) for field, option in FIELD_OPTIONS.items() if values.get(option) is not None
    }
    config = {json_name(name): value for name, value in values.items()}
    return {**fields, "student_model": str(student), "training_config": config}


def student_of(document: Mapping[str, Any]) -> StudentName | None:
    """The student that a document names; None for none, or one that is not known."""
    values = read_settings(document).values
    named = [values.get(f"student_model{part}") for part in ("", "_type", "_size")]
    try:
        return reconcile(*(None if value is None else str(value) for value in named))
    except OptionError:
        return None


def document_of(fields: TaskFields) -> dict[str, Any]:
    """The document of a task's fields."""
    own = {
        json_name(option): getattr(fields, field)
        for field, option in FIELD_OPTIONS.items()
        if getattr(fields, field) not in (None, "")
    }
    return {**own, **fields.training_config}


@dataclass(frozen=True)
class Preview:
    """What creating a task would start; without a command `problems` say why."""

    command: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fields: NewTask | None = None


def preview_task(tasks: Tasks, document: Mapping[str, Any], task_id: str) -> Preview:
    """The exact command of a document, checked as the training process will check it. Never raises for bad settings."""
    try:
        fields = NewTask(task_id=task_id, **task_fields(document))
        request = tasks.check(fields, tasks.place(task_id, requested_devices(fields) or "cpu"))
        configs = StageConfigs(request)
        configs.train_config(request.output_dir)
        command = tasks.preview(fields)
    except ValidationError as error:
        return Preview(problems=tuple(f"{place_of(item)}: {item['msg']}" for item in error.errors()))
    except (OptionError, TaskError, ConfigError) as error:
        return Preview(problems=(str(error),))
    return Preview(tuple(command), (), (*request.warnings, *configs.notes), fields)


def place_of(item: Any) -> str:
    return ".".join(str(part) for part in item["loc"])
