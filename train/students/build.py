"""A student with the weights that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from train.students.base import InitialWeights, Student
from train.students.construct import construct_student
from train.students.weights import load_initial_weights


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
