"""Errors of stage two that a user can act on; their text is one line."""

from __future__ import annotations

from store.errors import DistillError


class TrainError(DistillError):
    """A training cannot start or go on: the data, the student or the machine does not fit."""


class ConfigError(TrainError):
    """The options do not make sense; the text lists every problem, not only the first."""

    exit_code = 2


class ReportError(TrainError):
    """There is nothing to report on, or a folder is not what it should be."""


class DeliveryError(TrainError):
    """A trained student cannot be used, exported or quantized as asked."""
