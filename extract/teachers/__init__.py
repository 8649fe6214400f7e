"""Teachers: frozen image encoders whose features are stored. `load_teacher` is the way in."""

from extract.teachers.base import (
    CheckpointError,
    Encoded,
    Teacher,
    TeacherError,
    license_notice,
    list_teachers,
    load_teacher,
)

__all__ = [
    "CheckpointError",
    "Encoded",
    "Teacher",
    "TeacherError",
    "license_notice",
    "list_teachers",
    "load_teacher",
]
