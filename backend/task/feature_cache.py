"""The shared cache of teacher features: one store for each pair of data and teacher, made once, used by all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.task.errors import PlatformError
from console.output import get_logger
from console.progress import track_progress
from files.locking import locked
from files.reading import open_regular, read_regular
from files.writing import publish
from processes.stop import Stopped, StopRequest

if TYPE_CHECKING:
    from extract.sources.base import Source

log = get_logger("cache")

KEY_VERSION = 1
POLL_S = 0.2
REPORT_EVERY_S = 60.0
INDEX_FILE = "model.safetensors.index.json"
TEACHER_FILES = frozenset({"config.json", "preprocessor_config.json", INDEX_FILE})
VISION_PREFIXES = ("visual.", "model.visual.")
CHUNK_BYTES = 1 << 20
READERS = 8
ANY_SIZE = (1, 1)  # of an image whose boxes are given in pixels, as a database's are
# Left beside images by other programs (ultralytics, macOS, Windows); not part of the data.
IGNORED_SUFFIXES = (".cache", ".tmp", ".part")
IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True)
class FeatureCache:
    """Stores below one folder, named by what is in them; a lock file beside each."""

    root: Path

    @property
    def digests(self) -> Path:
        return self.root / "digests"

    def store_path(self, key: str) -> Path:
        return self.root / f"{key}.zarr"

    @contextmanager
    def lock(
        self, key: str, owner: str, stop: StopRequest, waiting: Callable[[str], None] = lambda text: None
    ) -> Iterator[None]:
        """Hold a store for this process alone. A process that waits reports for whom; the lock ends with its process.

        Raises:
            Stopped: when a stop is requested while waiting.
        """
        path = self.root / f"{key}.lock"
        reported = float("-inf")

        def wait(waited_s: float) -> None:
            nonlocal reported
            if stop.requested:
                raise Stopped("stopped while waiting for another task's extraction", stop.exit_code)
            if waited_s - reported >= REPORT_EVERY_S:
                reported = waited_s
                text = f"waiting for the features that another task extracts ({read_owner(path)})"
                log.info("%s, %d s so far", text, round(waited_s))
                waiting(text)
            stop.wait(POLL_S)

        with locked(path, wait) as file:
            file.truncate(0)
            file.write(f"{owner}, process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


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


# -- content digests of folders and files, remembered by path, size and time of change ----------------------
#
# The first look at a data set reads every byte; later ones only ask for sizes and times. What is remembered is a text
# file in the cache: losing it costs time, nothing else.


@dataclass(frozen=True)
class FileState:
    """A file as it is now, below a root."""

    name: str
    path: Path
    size: int
    changed_ns: int

    @property
    def memo_key(self) -> str:
        return f"{self.size} {self.changed_ns} {self.name}"


@dataclass
class DigestMemo:
    """Remembered digests of one root: `size time name` → hex digest."""

    file: Path
    known: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, root: Path) -> DigestMemo:
        name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=16).hexdigest()
        memo = cls(folder / f"{name}.txt")
        try:
            lines = memo.file.read_text("utf-8", errors="surrogateescape").split("\0")
        except OSError:
            return memo
        for line in lines:
            digest, blank, key = line.partition(" ")
            if blank and len(digest) == 32:
                memo.known[key] = digest
        return memo

    def save(self, known: dict[str, str]) -> None:
        """Replace what is remembered; a full disk only costs the next run its time."""
        partial = self.file.with_name(f"{self.file.name}.{secrets.token_hex(4)}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = "\0".join(f"{digest} {key}" for key, digest in known.items())
            partial.write_text(text, "utf-8", errors="surrogateescape")
            publish(partial, self.file)
        except OSError:
            partial.unlink(missing_ok=True)


def digest_folder(root: Path, memo_folder: Path, check_stop: Callable[[], None] = lambda: None) -> str:
    """The digest of names and contents of all files below `root` (hex, blake2b-128).

    `check_stop` is called between files and may raise.

    Raises:
        PlatformError: when a folder cannot be listed.
    """
    return digest_files(root, list(files_below(root)), memo_folder, check_stop)


def digest_files(
    root: Path, files: Iterable[FileState], memo_folder: Path, check_stop: Callable[[], None] = lambda: None
) -> str:
    """The digest of the given files of `root`; files that cannot be read (pipes, devices) count by name alone."""
    states = sorted(files, key=lambda state: os.fsencode(state.name))
    memo = DigestMemo.load(memo_folder, root)
    missing = [state for state in states if state.memo_key not in memo.known]
    fresh = dict(zip((s.memo_key for s in missing), read_digests(missing, root, check_stop), strict=True))
    known = {
        state.memo_key: fresh.get(state.memo_key) or memo.known.get(state.memo_key, "") for state in states
    }
    if fresh or len(known) != len(memo.known):
        memo.save({key: digest for key, digest in known.items() if digest})
    whole = hashlib.blake2b(digest_size=16)
    for state in states:
        whole.update(os.fsencode(state.name) + b"\0" + known[state.memo_key].encode() + b"\n")
    return whole.hexdigest()


def digest_source(source: Source, check_stop: Callable[[], None] = lambda: None) -> str:
    """The digest of an opened data set (hex, blake2b-128): class names, and every sample with its bytes and targets."""
    from imaging.decode import ImageError

    whole = hashlib.blake2b(repr(source.class_names).encode(), digest_size=16)
    for name, samples in source.splits.items():
        for sample in samples:
            check_stop()
            try:
                content = hashlib.blake2b(sample.read(), digest_size=16).hexdigest()
            except ImageError:
                content = ""
            boxes = sample.read_boxes(ANY_SIZE)  # as they are given, also where they reach outside
            # Lists, because the text of a long array leaves out its middle.
            entries = () if boxes is None else (boxes.values.tolist(), boxes.classes.tolist())
            whole.update(repr((name, sample.key, sample.label, entries, content)).encode())
    return whole.hexdigest()


def read_digests(states: list[FileState], root: Path, check_stop: Callable[[], None]) -> Iterator[str]:
    if not states:
        return
    with (
        ThreadPoolExecutor(READERS) as pool,
        track_progress(len(states), f"reading {root.name}", "files") as progress,
    ):
        try:
            for digest in pool.map(lambda state: file_digest(state.path), states):
                check_stop()
                progress.advance()
                yield digest
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def file_digest(path: Path) -> str:
    """Hex blake2b-128 of a file's bytes; empty when it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_regular(path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def files_below(root: Path) -> Iterator[FileState]:
    """All data files below a folder, or the file itself; hidden ones and other programs' caches are left out."""
    if root.is_file():
        yield file_state(root, root.name)
        return
    for folder, folders, names in os.walk(root, onerror=refuse_folder, followlinks=True):
        folders[:] = [name for name in folders if is_data(name) and not leads_back(Path(folder, name))]
        for name in names:
            if is_data(name):
                path = Path(folder, name)
                yield file_state(path, path.relative_to(root).as_posix())


def is_data(name: str) -> bool:
    lower = name.lower()
    return not (name.startswith(".") or lower in IGNORED_NAMES or lower.endswith(IGNORED_SUFFIXES))


def leads_back(path: Path) -> bool:
    """True for a linked folder that holds itself (an endless walk)."""
    return path.is_symlink() and path.resolve() in path.absolute().parents


def file_state(path: Path, name: str) -> FileState:
    try:
        status = path.stat()
    except OSError:
        return FileState(name, path, -1, -1)
    return FileState(name, path, status.st_size, status.st_mtime_ns)


def refuse_folder(error: OSError) -> None:
    raise PlatformError(f"{error.filename}: cannot be listed: {error.strerror}")
