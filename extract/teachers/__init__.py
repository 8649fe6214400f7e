"""Teachers: frozen image encoders whose features are stored. `load_teacher` is the way in."""

from extract.teachers.base import Encoded, Teacher, list_teachers, load_teacher
from extract.teachers.errors import CheckpointError, TeacherError

__all__ = [
    "CheckpointError",
    "Encoded",
    "Teacher",
    "TeacherError",
    "list_teachers",
    "load_teacher",
]
