"""What can go wrong with a teacher, in words that a user can act on."""

from __future__ import annotations

from store.errors import DistillError


class TeacherError(DistillError):
    """A teacher cannot be loaded, or cannot encode what it was given."""


class CheckpointError(TeacherError):
    """A checkpoint folder or file is missing, damaged, incomplete or of another architecture."""
