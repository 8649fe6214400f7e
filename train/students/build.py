"""From a name to a student, with random weights or those that it starts from: the only place that turns names into modules."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from train.students.base import InitialWeights, Student, StudentError
from train.students.families import FAMILIES, parse_student_name
from train.students.weights import load_initial_weights


def construct_student(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> Student:
    """A student by name (`resnet18`, `unet/small`, `timm:NAME` …), on the current default device.

    `num_classes` None or 0 builds it without a head (label-free training). `image_size` in pixels, None takes
    the recipe's. `options` are the type's own: timm's `create_model` arguments, the LSTM's `freeze_encoder`,
    `attention_pooling` and `frame_encoder`.

    Raises UnknownStudentError for a name, StudentError for anything else that cannot be built.
    """
    parsed = parse_student_name(name)
    family = FAMILIES[parsed.type]
    if pretrained and not family.published:
        raise StudentError(
            f"pretrained: no weights are published for {parsed}: give a local file with --student-path"
        )
    unknown = [] if family.options is None else [name for name in options if name not in family.options]
    if unknown:
        valid = f": {', '.join(family.options)}" if family.options else ""
        raise StudentError(f"{parsed} has no option {', '.join(map(repr, unknown))}{valid}")
    module, function = family.builder.split(":")
    builder = getattr(importlib.import_module(module), function)
    size = image_size if image_size is not None else family.recipe["image_size"]
    if pretrained:
        options["pretrained"] = True
    student: Student = builder(parsed, num_classes=num_classes or 0, image_size=size, **options)
    return student


def rebuild_student(spec: Mapping[str, Any]) -> Student:
    """The student that `StudentSpec.to_dict()` describes, with random weights (a checkpoint fills them)."""
    return construct_student(
        spec["name"], num_classes=spec["num_classes"], image_size=spec["image_size"], **spec["options"]
    )


@runtime_checkable
class LoadsOwnWeights(Protocol):
    """A student whose weights come in files of another kind (ultralytics' pickled models)."""

    def load_local_weights(self, path: Path) -> InitialWeights: ...


def build_student(name: str, *, student_path: str | Path | None = None, **options: Any) -> Student:
    """`construct_student(name, **options)`, then the local weights of `student_path`, where it is given.

    Raises StudentError for weights that do not fit, besides what `construct_student` raises.
    """
    student = construct_student(name, **options)
    if student_path is not None:
        load_local_weights(student, Path(student_path))
    return student


def load_local_weights(student: Student, path: Path) -> InitialWeights:
    """Fill the student from `path` (see `load_initial_weights`); a student that reads files of its own does so."""
    if isinstance(student, LoadsOwnWeights):
        return student.load_local_weights(path)
    return load_initial_weights(student, path)
