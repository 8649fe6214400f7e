"""What the back end refuses; the text is one line for the user, `status` the HTTP status of the answer."""

from __future__ import annotations


class ServerError(Exception):
    """The server cannot start: an option, the database or a folder is wrong."""

    exit_code = 2


class TaskError(Exception):
    """A request cannot be done as asked."""

    status = 400


class NotFoundError(TaskError):
    """There is no such task, file or log."""

    status = 404


class ConflictError(TaskError):
    """The task's state, or another task, does not allow it."""

    status = 409
