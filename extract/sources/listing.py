"""Listing files: stable keys, symbolic links without endless loops, a million files in little memory."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from extract.sources.base import SourceError

Progress = Callable[[int], None]  # called with the number of files found so far

PROGRESS_EVERY = 2_000
# More directory links than this on one path are not followed: links that point to each other would otherwise
# make exponentially many paths even without a loop.
MAX_LINKED_FOLDERS = 3


def list_files(root: Path, suffixes: Iterable[str], progress: Progress | None = None) -> list[str]:
    """Paths relative to `root` (with `/`) of all files with one of `suffixes` (lower case), sorted.

    Names that start with a dot are left out. Linked files and folders are followed; a link to a folder that
    contains the link is not. Raises SourceError when a folder cannot be listed.
    """
    wanted = frozenset(suffixes)
    found: list[str] = []
    folders: list[tuple[str, frozenset[tuple[int, int]], int]] = [("", frozenset(), 0)]
    while folders:
        folder, above, links = folders.pop()
        path = os.path.join(root, folder)
        here = above | {_identity(path)}
        for entry in _scan(path):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            relative = f"{folder}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                folders.append((relative + "/", here, links))
            elif entry.is_symlink() and _is_folder(entry):
                if links < MAX_LINKED_FOLDERS and _identity(entry.path) not in here:
                    folders.append((relative + "/", here, links + 1))
            elif suffix_of(entry.name) in wanted:
                found.append(relative)
                if progress is not None and len(found) % PROGRESS_EVERY == 0:
                    progress(len(found))
    if progress is not None:
        progress(len(found))
    found.sort()
    return found


def suffix_of(name: str) -> str:
    """The file name's extension in lower case with its dot, or an empty text."""
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if dot else ""


def make_key(relative: str) -> str:
    """The key of a file: its relative path with `/`, in Unicode NFC.

    NFC, because macOS file systems hand out decomposed names: the same data set has the same keys everywhere.
    Bytes that are not UTF-8 become `\\xNN`.
    """
    if relative.isascii():
        return relative
    text = os.fsencode(relative).decode("utf-8", errors="backslashreplace")
    return unicodedata.normalize("NFC", text)


def make_keys(relatives: list[str]) -> list[str]:
    """Keys of many paths; the same list when nothing changes, to save memory."""
    if all(path.isascii() for path in relatives):
        return relatives
    return [make_key(path) for path in relatives]


def check_unique(keys: Sequence[str], where: str) -> None:
    """Raises SourceError that names the first keys which occur twice."""
    if len(set(keys)) == len(keys):
        return
    twice = [key for key, count in Counter(keys).items() if count > 1]
    raise SourceError(
        f"{len(twice)} keys occur more than once in {where}, first {twice[0]!r}: "
        "each sample needs a key of its own (names that differ only in Unicode form count as the same)"
    )


def resolve_inside(root: Path, text: str, where: str) -> Path:
    """The path that an annotation file names, which must be inside `root`; `root` itself is absolute.

    Judged on the written path, `..` removed: links below the root are the owner's own and may lead elsewhere.
    Raises SourceError for a path that leaves the root or cannot be a path.
    """
    cleaned = text.strip().replace("\\", "/")
    if not cleaned or "\0" in cleaned:
        raise SourceError(f"{where}: {text!r} is not a path")
    base = os.path.normpath(root)
    path = os.path.normpath(os.path.join(base, cleaned))
    if path != base and not path.startswith(base.rstrip("/") + "/"):
        raise SourceError(f"{where}: {text!r} is outside the data set's root {base}")
    return Path(path)


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise SourceError(f"folder {os.fspath(folder)} cannot be listed: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise SourceError(f"folder {path} cannot be listed: {error.strerror}") from None
    return status.st_dev, status.st_ino
