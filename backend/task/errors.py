"""Errors of a platform's task: one line each, with the exit code that the platform sees."""

from __future__ import annotations


class PlatformError(Exception):
    """The task cannot continue; the text has what, where, got, expected and the next step."""

    exit_code = 1


class OptionError(PlatformError):
    """An option, the training_config JSON or the platform's YAML is wrong; the text names every problem."""

    exit_code = 2
