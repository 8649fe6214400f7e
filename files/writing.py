"""Files that appear whole or not at all, and one line of explanation where the system refuses them.

The one way to write a file that is read later: under a temporary name, fsync, rename, fsync of the folder. After a kill
or a power failure at any moment, the name leads to the old content or to the new one, never to a part.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from files.names import printable

PARTIAL_PREFIX = ".partial-"
URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # `C:` of one letter is a drive


class OutputError(Exception):
    """A file cannot be written; the text has the place, the reason and the next step."""

    exit_code: int = 1


def check_writable(path: Path, option: str) -> None:
    """Raise OutputError when nothing can be written at `path` or into it: before hours of work, not after.

    `path` need not exist; nothing is left behind. `option` is named in the error, like `--out`.
    """
    refuse_url(path, option)
    with refused(path, option):
        if "\0" in str(path):  # pathlib reports only that the file does not exist
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


def refuse_url(path: Path, option: str) -> None:
    """Raise OutputError for `s3://bucket/x` and the like, which pathlib takes for a folder named `s3:`.

    A folder of that name that exists is a folder.
    """
    scheme = path.parts[0] if path.parts else ""
    if URL_SCHEME.fullmatch(scheme) and not Path(scheme).is_dir():
        address = f"{scheme}//{'/'.join(path.parts[1:])}"
        raise OutputError(
            f"{option} {address}: is a URL, expected a local path; write to a local folder and copy it afterwards"
        )


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
    """`replacing` for a file of the user: OutputError where the system refuses it, and for a device, pipe or socket."""
    with writing(path):
        check_replaceable(path)
        with replacing(path) as partial:
            yield partial


# -- the steps ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to: it becomes `path`, durably, when the block succeeds, and is removed when not."""
    partial = path.with_name(
        f"{PARTIAL_PREFIX}{path.name}"
    )  # keeps the suffix, by which libraries know the format
    try:
        partial.unlink(missing_ok=True)  # a killed process may have left it
        yield partial
        publish(partial, path)
    finally:
        with contextlib.suppress(OSError, ValueError):  # what refused the file may refuse this too
            partial.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a whole file; text as UTF-8. Raises OSError; what was at `path` before is then untouched."""
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def publish(partial: Path, final: Path) -> None:
    """Give a written file its final name, durably: its bytes reach the disk before its name does."""
    sync_file(partial)
    os.replace(partial, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` durable."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
