"""Files of a task's output folder: the log, whole, in part and followed; what can be downloaded."""

from __future__ import annotations

import asyncio
import codecs
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

from backend.server.errors import NotFoundError
from backend.server.schemas import OutputFile
from files.reading import open_regular

LOG_FILE = "task.log"
FOLLOW_S = 0.3
CHUNK = 65_536
MOST_FILES = 1_000
# Working files of a training that are of no use elsewhere.
HIDDEN_FOLDERS = frozenset({"tensorboard", "wandb", "mlflow"})


def read_tail(path: Path, most_bytes: int) -> str:
    """The last lines of a log, whole ones, at most that many bytes; empty when there is none yet."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most_bytes))
            data = file.read(most_bytes)
    except OSError:
        return ""
    if size > most_bytes:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


async def follow(
    path: Path, is_over: Callable[[], bool], tail_bytes: int = 200_000
) -> AsyncIterator[list[str]]:
    """The lines of a log as they are written, several at a time; an empty list when there was nothing for a while.

    It begins with the last `tail_bytes` and ends when `is_over` (the process has ended) and all is read.
    """
    position = max(0, size_of(path) - tail_bytes)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest, skip_first, idle = "", position > 0, 0.0
    while True:
        # Before reading: what was written until the end is then read below.
        over = await asyncio.to_thread(is_over)
        data = await asyncio.to_thread(read_from, path, position)
        position += len(data)
        *lines, rest = (rest + decoder.decode(data)).split("\n")
        if lines and skip_first:
            lines, skip_first = lines[1:], False
        if lines:
            idle = 0.0
            yield lines
        elif over and not data:
            if rest:
                yield [rest]
            return
        elif not data:
            await asyncio.sleep(FOLLOW_S)
            idle += FOLLOW_S
            if idle >= 15:
                idle = 0.0
                yield []


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_from(path: Path, position: int) -> bytes:
    try:
        with open_regular(path) as file:
            file.seek(position)
            return file.read(CHUNK)
    except OSError:
        return b""


def list_files(folder: Path) -> list[OutputFile]:
    """The regular files of an output folder that may be of use, by name."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in HIDDEN_FOLDERS and name[0] != ".")
        for name in sorted(names):
            path = Path(root) / name
            if name[0] == "." or path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            modified = datetime.fromtimestamp(status.st_mtime, UTC)
            relative = path.relative_to(folder).as_posix()
            found.append(OutputFile(name=relative, size=status.st_size, modified_at=modified))
            if len(found) >= MOST_FILES:
                return found
    return found


def find_file(folder: Path, name: str) -> Path:
    """A file that `list_files` lists. Raises NotFoundError for every other name: `..`, links, devices."""
    if name not in {file.name for file in list_files(folder)}:
        raise NotFoundError(f"there is no file {name[:200]!r} in the task's output folder")
    return folder / name
