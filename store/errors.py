"""Errors that a user can act on. Their text is one line: what, where, got, expected, next step."""

from __future__ import annotations


class DistillError(Exception):
    """The root of all errors that the command line shows as one line, without a traceback.

    `exit_code` is what marks an error as meant for the user; `cli.py` looks for nothing else.
    """

    exit_code: int = 1


class StoreError(DistillError):
    """Something about a store is wrong: its files, its format, or what was asked of it."""


class LockedError(StoreError):
    """Another process is writing these rows."""


class UnknownNameError(StoreError, KeyError):
    """No such split, array or key; the text lists what there is."""

    __str__ = Exception.__str__  # KeyError's would put the text in quotes


class RowRangeError(StoreError, IndexError):
    """A row number that the split does not have."""
