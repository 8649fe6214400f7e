"""Students: small vision models with a uniform output. Nothing heavy is imported until it is used."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Student": "base",
    "StudentError": "base",
    "StudentOutput": "base",
    "StudentSpec": "base",
    "build_student": "build",
    "rebuild_student": "construct",
    "list_students": "catalog",
    "parse_student_name": "families",
    "UnknownStudentError": "families",
    "frames_from_pairs": "lstm",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
