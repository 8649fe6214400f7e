"""When a sample's file and annotation last changed, as far as that is known without reading them.

A stamp is a row of four int64: bytes and time of change (ns) of the file that holds the sample, then two numbers of its
annotation. Equal stamps mean: not read again. The stamps of the last run are kept beside the store's arrays, as
`.extract/files-<split>.i64` [N, 2] and `.extract/annotations-<split>.i64` [N, 2], in the order of its rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.plan import RowSamples
from extract.sources.base import Boxes, Sample, content_digest
from files.writing import replace_file
from imaging.decode import ImageError

UNKNOWN = -1  # no file, or one that cannot be looked at
NEVER_SEEN = -2  # recorded for what no run has looked at: differs from everything
NO_FILE = -3  # the annotation's file does not exist: for YOLO, an image without objects
NO_ANNOTATION = -4

READERS = 8
Stamps = npt.NDArray[np.int64]


def stamps_of(samples: RowSamples) -> tuple[Stamps, npt.NDArray[np.int32]]:
    """Stamps [N, 4] and labels [N] (-1: none) of all samples; each is built once and no file is read."""
    stamps = np.full((len(samples), 4), UNKNOWN, np.int64)
    labels = np.full(len(samples), -1, np.int32)
    containers: dict[str, tuple[int, int]] = {}  # many samples can share one table or HDF5 file
    for row in range(len(samples)):
        sample = samples[row]
        stamps[row, :2] = file_stamp(sample, containers)
        stamps[row, 2:] = annotation_stamp(sample)
        labels[row] = -1 if sample.label is None else sample.label
    return stamps, labels


def file_stamp(sample: Sample, containers: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Bytes and time of change of the file or folder of frames; of the file around it, for a row of one."""
    content: Any = sample.frames if sample.image is None else sample.image
    if isinstance(content, Path):
        return path_stamp(content)
    if isinstance(getattr(content, "path", None), Path):
        return path_stamp(content.path)
    container = getattr(content, "file", None)
    if not isinstance(container, str):
        return UNKNOWN, UNKNOWN
    if container not in containers:
        containers[container] = path_stamp(Path(container))
    return containers[container]


def path_stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
        if not path.is_dir():
            return status.st_size, status.st_mtime_ns
        frames = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
    except OSError:
        return UNKNOWN, UNKNOWN
    state = [(name, frame.st_size, frame.st_mtime_ns) for name, frame in frames]
    return sum(size for _, size, _ in state), number_of(repr(state))


def annotation_stamp(sample: Sample) -> tuple[int, int]:
    """Of an annotation that is read later; what the sample holds in memory has UNKNOWN, and is compared itself."""
    parts: list[str] = []
    for lazy, kind in ((sample.boxes, Boxes), (sample.mask, bytes)):
        if isinstance(lazy, kind):
            return UNKNOWN, UNKNOWN
        if lazy is None:
            continue
        # How it is read (the number of classes, colors, …) counts as well as the file: a dataclass's repr has both.
        parts.append(repr(lazy))
        place = getattr(lazy, "path", None)
        if place is not None:
            try:
                status = os.stat(place)
                parts.append(f"{status.st_size} {status.st_mtime_ns}")
            except OSError:
                parts.append(str(NO_FILE))
    return (NO_ANNOTATION, NO_ANNOTATION) if not parts else (0, number_of("\0".join(parts)))


def number_of(text: str) -> int:
    """A number of 63 bits that stands for the text."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# -- beside the store's arrays ------------------------------------------------------------------------


def save_stamps(folder: Path, tables: dict[str, Stamps]) -> None:
    """Record stamps [N, 4] by split in the folder of the extractor's notes."""
    folder.mkdir(exist_ok=True)
    for split, table in tables.items():
        replace_file(folder / f"files-{split}.i64", np.ascontiguousarray(table[:, :2]).tobytes())
        replace_file(folder / f"annotations-{split}.i64", np.ascontiguousarray(table[:, 2:]).tobytes())


def load_stamps(folder: Path, split: str, rows: int) -> Stamps:
    """int64 [rows, 4]; what was not recorded differs from everything."""
    table = np.full((rows, 4), NEVER_SEEN, np.int64)
    for first, name in ((0, "files"), (2, "annotations")):
        file = folder / f"{name}-{split}.i64"
        if file.exists():
            found = np.frombuffer(file.read_bytes(), np.int64)
            found = found[: len(found) // 2 * 2].reshape(-1, 2)[:rows]
            table[: len(found), first : first + 2] = found
    return table


# -- reading what stamps do not tell ------------------------------------------------------------------


def digests_of(
    samples: RowSamples, rows: npt.NDArray[np.int64], between: Callable[[], None] = lambda: None
) -> dict[int, bytes]:
    """Row → digest of its bytes now. `between` is called now and then and may raise."""
    found: dict[int, bytes] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(rows), 64 * READERS):
            some = rows[start : start + 64 * READERS].tolist()
            found |= dict(zip(some, pool.map(lambda row: digest_of(samples[row]), some), strict=True))
            between()
    return found


def digest_of(sample: Sample) -> bytes:
    """The digest of a sample's bytes now; zeros when it cannot be read, as the store has it then."""
    try:
        return content_digest(sample.read())
    except ImageError:
        return bytes(16)
