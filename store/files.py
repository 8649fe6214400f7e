"""Bytes, checksums and JSON of a store's files, and what a disk that refuses them means."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from files.writing import replace_file
from store.errors import StoreError

PARTIAL = ".partial"
CHECKSUM_BYTES = 4 << 20


def crc32c(data: bytes | np.ndarray, start: int = 0) -> int:
    """crc32c of `data`, continuing from `start`. Arrays must be C-contiguous.

    The library holds the interpreter's lock while it computes: in pieces, other threads get their turn.
    """
    view = np.frombuffer(byte_view(data), np.uint8)
    for first in range(0, len(view), CHECKSUM_BYTES):
        start = int(google_crc32c.extend(start, view[first : first + CHECKSUM_BYTES]))
    return start


def byte_view(data: bytes | np.ndarray) -> memoryview:
    """The bytes of C-contiguous data, without a copy."""
    buffer: Any = data
    size = data.nbytes if isinstance(data, np.ndarray) else len(data)
    return memoryview(buffer).cast("B") if size else memoryview(b"")


def write_all(fd: int, data: bytes | np.ndarray) -> None:
    """`os.write` until everything is written."""
    view = byte_view(data)
    while view:
        view = view[os.write(fd, view) :]


def write_pieces(fd: int, pieces: list[bytes]) -> None:
    """Like `write_all` of all pieces in a row, in one system call as a rule."""
    written = os.writev(fd, pieces)
    for piece in pieces:
        write_all(fd, piece[written:])
        written = max(0, written - len(piece))


def to_json(value: Any) -> bytes:
    """The one JSON form of a value, so that equal values make equal files."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    replace_file(path, to_json(value))


def read_json(path: Path) -> Any:
    """Raises StoreError when the file is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}); the file is damaged") from error


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says what to do."""
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
