"""Files of a data set: only regular files are opened, so that no entry can block or never end.

A data set is made elsewhere and may hold anything under the name of an image or annotation: a pipe without a writer, a
socket, a link to a device. Whatever reads a file of a data set opens it here.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

NOT_REGULAR = "not a regular file"


def open_regular(path: Path | str) -> io.BufferedReader:
    """The open file, for reading. Raises OSError, whose `strerror` says why, for anything but a regular file."""
    try:
        check_regular(
            os.stat(path).st_mode, path
        )  # before opening: that alone can start something at a device
        # Non-blocking and checked again, in case the name has come to mean a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL byte in the name
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None
    try:
        check_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(mode: int, path: Path | str) -> None:
    """Raises OSError unless `mode` (`st_mode`) is that of a regular file."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, os.fspath(path))


def read_regular(path: Path | str) -> bytes:
    """All bytes of a regular file. Raises OSError like `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_regular_text(path: Path | str, encoding: str = "utf-8") -> str:
    """The text of a regular file, line ends as `\\n`. Raises OSError like `open_regular`, UnicodeDecodeError."""
    return read_regular(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
