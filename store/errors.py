"""Errors that a user can act on. Their text is one line: what, where, got, expected, next step."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DistillError(Exception):
    """The root of all errors that the command line shows as one line, without a traceback.

    `exit_code` is what marks an error as meant for the user; `cli.py` looks for nothing else.
    """

    exit_code: int = 1


class StoreError(DistillError):
    """Something about a store is wrong: its files, its format, or what was asked of it."""


class RemoteError(StoreError):
    """An address cannot be used: network, credentials, permissions. The store itself may be sound."""


class LockedError(StoreError):
    """Another process is writing these rows."""


class UnknownNameError(StoreError, KeyError):
    """No such split, array or key; the text lists what there is."""

    __str__ = Exception.__str__  # KeyError's would put the text in quotes


class RowRangeError(StoreError, IndexError):
    """A row number that the split does not have."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a StoreError with the next step."""
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EFBIG: "the limit on file size is reached: raise it (ulimit -f)",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "no permission to write: choose another folder or change its permissions",
        errno.EPERM: "no permission to write: choose another folder or change its permissions",
        errno.ENOENT: "no file can be made there: choose another folder",
        errno.ENOTDIR: "a part of the path is a file: choose another folder",
        errno.EEXIST: "a part of the path is a file: choose another folder",
        errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
        errno.EINVAL: "the file system does not support it: choose another folder",
        errno.ENOSYS: "the file system does not support it: choose another folder",
        errno.ENOTSUP: "the file system does not support it: choose another folder",
    }
    try:
        yield
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise StoreError(f"{str(path)!r}: a name cannot hold a NUL byte: choose another name") from None
    except OSError as error:
        known = advice.get(error.errno or 0)
        if known is None:
            raise
        where = error.filename or path
        raise StoreError(
            f"{where}: cannot write, {known}, then run the same command again; committed rows are kept"
        ) from error
