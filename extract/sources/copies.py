"""Exact copies in a data set, found without reading every file.

Only files of equal size can be copies. Among those a fingerprint of two blocks of 4 KiB is compared, and only where
that is equal too the whole file is read. Of a million JPEG files that costs a `stat` each, two small reads for the
many whose size another one has, and whole reads for the copies themselves. Empty files are no copies of one another:
they are unreadable images. Rows of HDF5 files, Parquet files and databases have no size that is known before they are read: up to
`READ_ROWS` of them are read, more are left ungrouped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import numpy.typing as npt

from extract.sources.base import Sample, Samples, content_digest
from imaging.decode import read_blocks
from imaging.errors import ImageError

READ_ROWS = 10_000
BLOCK = 4096
# Threads overlap the waiting for a disk or a network; one task for a row would cost more than reading it.
THREADS, ROWS_PER_TASK = 8, 512
UNKNOWN = -1

Rows = npt.NDArray[np.int64]
Digest = Callable[[Sample], bytes | None]


def group_copies(samples: Samples) -> tuple[Rows, str | None]:
    """The row of the first sample (by key) with the same content, int64 [N], and a note when rows were not read."""
    first = np.arange(len(samples), dtype=np.int64)
    sizes = np.fromiter((size_of(sample) for sample in samples), np.int64, len(samples))
    unknown = np.flatnonzero(sizes == UNKNOWN)
    note = None
    if len(unknown) > READ_ROWS:
        note = (
            f"{len(unknown):,} samples are not files: copies among them are not kept in one split, because finding them "
            "would read everything twice (--group-duplicates does that)"
        )
        unknown = unknown[:0]
    files = np.flatnonzero(sizes > 0)
    candidates = equal_rows(files, sizes[files])
    candidates = equal_rows(candidates, digests(samples, candidates, fingerprint))
    candidates = np.concatenate([candidates, unknown])
    return merge(samples, first, candidates, digests(samples, candidates, whole_digest)), note


def count_copies(first: Rows) -> int:
    """Samples that repeat another one, from what `group_copies` found."""
    return int((first != np.arange(len(first))).sum())


def count_shared(splits: Mapping[str, Samples]) -> dict[tuple[str, str], int]:
    """(split, other split) → samples of the other one that are exact copies of samples of the first, where there are any."""
    first, _ = group_copies(Joined(list(splits.values())))
    ends = np.cumsum([len(samples) for samples in splits.values()])[:-1]
    groups = dict(zip(splits, np.split(first, ends), strict=True))
    order = sorted(groups, key=lambda name: name != "train")
    found = {pair: int(np.isin(groups[pair[1]], groups[pair[0]]).sum()) for pair in combinations(order, 2)}
    return {pair: count for pair, count in found.items() if count}


class Joined(Samples):
    """The samples of several splits, one after the other."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self._keys = [key for part in parts for key in part.keys]

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def target_kinds(self, rows: Rows | None = None) -> frozenset[str]:
        return frozenset().union(*(part.target_kinds() for part in self.parts))

    def build(self, index: int) -> Sample:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].build(index - int(self.starts[part]))


def size_of(sample: Sample) -> int:
    """Bytes of a sample's file or files, UNKNOWN where that takes reading them, 0 where it cannot be read."""
    try:
        size = sample.stored_bytes()
    except OSError:
        return 0
    return UNKNOWN if size is None else size


def equal_rows(rows: Rows, values: npt.NDArray[np.int64]) -> Rows:
    """Those of `rows` whose value, in the same place of `values`, another one has too."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return rows[counts[inverse.ravel()] > 1]


def digests(samples: Samples, rows: Rows, digest: Digest) -> npt.NDArray[np.int64]:
    """The first 63 bits of each row's digest, int64 [n]; what cannot be read differs from everything."""
    found = zip(rows.tolist(), each_digest(samples, rows, digest), strict=True)
    numbers = (-1 - row if data is None else int.from_bytes(data[:8], "big") >> 1 for row, data in found)
    return np.fromiter(numbers, np.int64, len(rows))


def content_digests(samples: Samples) -> Iterator[bytes | None]:
    """The digest of every sample's content, in order; None for one that cannot be read."""
    return each_digest(samples, np.arange(len(samples)), whole_digest)


def each_digest(samples: Samples, rows: Rows, digest: Digest) -> Iterator[bytes | None]:
    """`digest` of each row, in order, by several threads."""
    parts = [rows[first : first + ROWS_PER_TASK].tolist() for first in range(0, len(rows), ROWS_PER_TASK)]
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda part: [digest(samples[row]) for row in part], parts):
            yield from found


def fingerprint(sample: Sample) -> bytes | None:
    """A digest of two blocks of a file, in its middle and at its end; of the whole content where it is no file."""
    path = sample.file
    if path is None:
        return whole_digest(sample)
    try:
        return hashlib.blake2b(read_blocks(path, BLOCK), digest_size=16).digest()
    except ImageError:
        return None


def whole_digest(sample: Sample) -> bytes | None:
    try:
        return content_digest(sample.read())
    except ImageError:
        return None


def merge(samples: Samples, first: Rows, rows: Rows, found: Iterable[int]) -> Rows:
    """`first`, with the rows of equal digests joined to that of the smallest key."""
    groups: dict[int, list[int]] = {}
    for row, digest in zip(rows.tolist(), found, strict=True):
        groups.setdefault(digest, []).append(row)
    keys = samples.keys
    for members in groups.values():
        if len(members) > 1:
            first[members] = min(members, key=lambda row: keys[row])
    return first
