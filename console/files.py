"""Files for the user: whole or not at all, and one line where the system refuses them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from console.file_names import printable


class OutputError(Exception):
    """Something cannot be written; the text says where, why and what to do."""

    exit_code: int = 1


def check_writable(path: Path, option: str) -> None:
    """Raise OutputError when nothing can be written at `path` or into it: before hours of work, not after.

    `path` need not exist; nothing is left behind. `option` is named in the error, like `--out`.
    """
    with refused(path, option):
        if "\0" in str(path):  # pathlib says that no such file exists
            raise ValueError("a name cannot hold a NUL byte")
        if printable(str(path)) != str(path):  # the libraries that write models and videos do not take it
            raise ValueError("the name is not UTF-8")
        place = path.absolute()
        check_replaceable(path, option)
        while not place.exists() and place != place.parent:
            place = place.parent
        folder = place.parent if place == path.absolute() and not place.is_dir() else place
        is_folder = folder.is_dir()
    if not is_folder:
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
def refused(path: Path, option: str) -> Iterator[None]:
    """Turn a path that the system cannot even look at (too long, a NUL byte) into an OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{option} {shortened(str(path))}: cannot be written: {reason}; choose another place"
        ) from None


def check_replaceable(path: Path, option: str = "") -> None:
    """Raise OutputError for a device, pipe or socket: renaming a file to its name would replace it.

    Writing to `/dev/null` as root would otherwise take it from the whole machine.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(
            f"{option} {path}".strip()
            + ": is a device, pipe or socket, expected a file or folder; choose another place"
        )


def shortened(text: str, longest: int = 200) -> str:
    """The text, cut in the middle where it is longer: both ends of a path are worth reading."""
    text = printable(text).replace("\0", "\\0")
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"


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
            f"{shortened(str(path))}: cannot be written: {reason}; choose another place (or make room), then run it again"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to: it becomes `path` when the block ends well, and is removed when not."""
    with writing(path):
        check_replaceable(path)
    partial = path.with_name(f".partial-{path.name}")  # keeps the suffix, which says the format
    try:
        with writing(path):
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses even this
            partial.unlink(missing_ok=True)
