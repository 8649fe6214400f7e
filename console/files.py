"""Files for the user: whole or not at all, and one line where the system refuses them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class OutputError(Exception):
    """Something cannot be written; the text says where, why and what to do."""

    exit_code: int = 1


def check_writable(path: Path, option: str) -> None:
    """Raise OutputError when nothing can be written at `path` or into it: before hours of work, not after.

    `path` need not exist; nothing is left behind. `option` is named in the error, like `--out`.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    folder = place.parent if place == path.absolute() and not place.is_dir() else place
    if not folder.is_dir():
        raise OutputError(f"{option} {path}: {folder} is a file, expected a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(
            f"{option} {path}: cannot be written in {folder}: {reason}; choose another place"
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into an OutputError that names it."""
    try:
        yield
    except FileExistsError:
        raise OutputError(f"{path}: is a file, expected a folder") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OutputError(
            f"{path}: cannot be written: {reason}; choose another place (or make room), then run it again"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to: it becomes `path` when the block ends well, and is removed when not."""
    partial = path.with_name(f".partial-{path.name}")  # keeps the suffix, which says the format
    try:
        with writing(path):
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            partial.unlink(missing_ok=True)
