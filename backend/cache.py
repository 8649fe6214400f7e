"""The shared cache of teacher features: one store for each pair of data and teacher, made once, used by all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from backend.digests import FileState, digest_files, file_state, files_below
from backend.errors import PlatformError
from console.log import get_logger
from console.stop import Stopped, StopRequest
from files.reading import read_regular

log = get_logger("cache")

KEY_VERSION = 1
POLL_S = 0.2
SAY_EVERY_S = 60.0
INDEX_FILE = "model.safetensors.index.json"
TEACHER_FILES = frozenset({"config.json", "preprocessor_config.json", INDEX_FILE})
VISION_PREFIXES = ("visual.", "model.visual.")


@dataclass(frozen=True)
class FeatureCache:
    """Stores below one folder, named by what is in them; a lock file beside each."""

    root: Path

    @property
    def digests(self) -> Path:
        return self.root / "digests"

    def store_path(self, key: str) -> Path:
        return self.root / f"{key}.zarr"

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            PlatformError: when it cannot be made or written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise PlatformError(
                f"--cache_dir: {self.root}: {error.strerror}: give a folder that this user can write to"
            ) from None

    @contextmanager
    def lock(
        self, key: str, owner: str, stop: StopRequest, waiting: Callable[[str], None] = lambda text: None
    ) -> Iterator[None]:
        """Hold a store for this process alone. Whoever waits says for whom; the lock goes with its process.

        Raises:
            Stopped: when a stop is requested while waiting.
        """
        path = self.root / f"{key}.lock"
        with path.open("a+", encoding="utf-8") as file:
            wait_for_lock(file, path, stop, waiting)
            file.seek(0)
            file.truncate()
            file.write(f"{owner}, process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def wait_for_lock(file: IO[str], path: Path, stop: StopRequest, waiting: Callable[[str], None]) -> None:
    started = said = time.monotonic()
    first = True
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if stop.requested:
            raise Stopped("stopped while waiting for another task's extraction", stop.exit_code)
        if first or time.monotonic() - said >= SAY_EVERY_S:
            first, said = False, time.monotonic()
            text = f"waiting for the features that another task extracts ({read_owner(path)})"
            log.info("%s, %d s so far", text, round(time.monotonic() - started))
            waiting(text)
        stop.wait(POLL_S)


def read_owner(path: Path) -> str:
    try:
        return path.read_text("utf-8") or "starting"
    except OSError:
        return "unknown"


def cache_key(parts: Mapping[str, Any]) -> str:
    """The name of a store from all that decides its content (plain JSON types)."""
    text = json.dumps({"version": KEY_VERSION, **parts}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def teacher_digest(path: Path, memo_folder: Path, check_stop: Callable[[], None]) -> str:
    """The digest of a teacher's weights file, or of those files of a checkpoint folder that hold its vision part.

    Raises:
        PlatformError: when the folder cannot be listed.
    """
    return digest_files(path, teacher_files(path), memo_folder, check_stop)


def teacher_files(path: Path) -> list[FileState]:
    if path.is_file():
        return [file_state(path, path.name)]
    shards = vision_shards(path / INDEX_FILE)
    return [
        state
        for state in files_below(path)
        if state.name in TEACHER_FILES
        or (state.name.endswith(".safetensors") and (shards is None or state.name in shards))
    ]


def vision_shards(index: Path) -> set[str] | None:
    """The shards that hold vision tensors; None without a readable index (then every shard counts)."""
    try:
        weight_map = json.loads(read_regular(index))["weight_map"]
        return {str(file) for name, file in weight_map.items() if name.startswith(VISION_PREFIXES)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
