"""Cutting a missing validation split, by a rule that is stable when images are added.

- A sample goes to `val` when blake2b-64(key) / 2^64 < val_fraction, so that other samples do not matter.
- Exact copies of one file go where the one with the smallest key goes.
- Every class with two or more samples gets one on either side: where the rule gives `val` (or `train`) none, the
  sample with the smallest (largest) hash goes there. That depends on the other samples of the class: of each class
  at most one sample moves when others are added. The classes of an image with boxes are those of its boxes. Masks
  are not decoded for this; they, and images without any target, count as one class.
- What a store has recorded stays in its split, even where the rule would now decide otherwise.

By option the content's digest takes the key's place: renamed files stay in their split, and every file is read once.

Exact copies are found without reading every file: only files of equal size can be copies. Among those a fingerprint of two blocks of 4 KiB is compared, and only where
that is equal too the whole file is read. Of a million JPEG files that costs a `stat` each, two small reads for the
many whose size another one has, and whole reads for the copies themselves. Empty files are not copies of one
another: they are unreadable images. The size of rows of HDF5 files, Parquet files and databases is not known before they
are read: up to `READ_ROWS` of them are read, more are left ungrouped.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from extract.sources.base import (
    AnnotationError,
    Sample,
    Samples,
    Selection,
    Source,
    SourceError,
    content_digest,
)
from imaging.decode import ImageError, read_blocks
from store.format import NO_LABEL

# The names that folders and files use for a split → ours.
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
ANY_SIDE = 10_000  # of an image whose boxes are read for their classes alone

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


def split_hash(identity: str | bytes) -> int:
    """The number below 2^64 that decides to which split the sample with this key (or content digest) goes."""
    data = identity.encode("utf-8", errors="surrogatepass") if isinstance(identity, str) else identity
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def cut_validation(
    samples: Samples,
    val_fraction: float,
    group_copies: bool | None = None,
    recorded: Mapping[str, Container[str]] | None = None,
) -> tuple[dict[str, Samples], list[str]]:
    """`train` and `val` of the samples (a split without any is left out), and notes for the log.

    `group_copies`: None keeps exact copies in one split, True decides by content, False by key alone. Unreadable
    files are decided by key. `recorded`: keys that are in a split already.
    """
    hashes, first, notes = identify(samples, group_copies)
    chosen = hashes < val_fraction * 2.0**64
    fixed = np.zeros(len(samples), np.bool_)
    sides = np.full(len(samples), -1, np.int8)  # 0 where a store has the key in `train`, 1 in `val`
    if recorded:
        train, val = recorded.get("train", ()), recorded.get("val", ())
        known = (1 if key in val else 0 if key in train else -1 for key in samples.keys)
        sides = np.fromiter(known, np.int8, len(samples))
    for row in np.flatnonzero(sides >= 0)[::-1].tolist():  # the first of several copies has the last word
        chosen[first[row]], fixed[first[row]] = bool(sides[row]), True
    balance(chosen, hashes, fixed, class_members(samples, first))
    chosen = np.where(sides >= 0, sides == 1, chosen[first])
    rows = {"train": np.flatnonzero(~chosen), "val": np.flatnonzero(chosen)}
    return {name: Selection(samples, part) for name, part in rows.items() if len(part)}, notes


def identify(samples: Samples, group_copies: bool | None) -> tuple[Hashes, Rows, list[str]]:
    """The hash that decides about each sample, uint64 [N], the row that stands for its copies, int64 [N], notes."""
    keys = samples.keys
    notes: list[str] = []
    if group_copies:
        rows = np.arange(len(samples))
        contents = each_digest(samples, rows, whole_digest)
        names = (content or key for content, key in zip(contents, keys, strict=True))
        hashes = np.fromiter((split_hash(name) for name in names), np.uint64, len(samples))
        _, index, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        return hashes, rows[index][inverse.ravel()], notes
    hashes = np.fromiter((split_hash(key) for key in keys), np.uint64, len(samples))
    if group_copies is False:
        return hashes, np.arange(len(samples)), notes
    first, note = find_copies(samples)
    if count := int((first != np.arange(len(first))).sum()):
        notes.append(
            f"{count:,} of {len(samples):,} samples are exact copies of others: each is in the split of its original"
        )
    return hashes[first], first, [*notes, *([note] if note else [])]


def class_members(samples: Samples, first: Rows) -> list[Rows]:
    """For each class the rows (int64, one for all copies) that have it; all rows where nothing has a class."""
    members: dict[int, array[int]] = {}
    for row, sample in enumerate(samples):
        for number in classes_of(sample):
            members.setdefault(number, array("q")).append(int(first[row]))
    found = [np.unique(np.array(members[number], np.int64)) for number in sorted(members)]
    return found or [np.unique(first)]


def classes_of(sample: Sample) -> list[int]:
    """The classes of a sample: its label, or those of its boxes; none where the annotation is wrong."""
    if sample.label is not None:
        return [sample.label]
    if sample.boxes is None:
        return []
    try:
        # Which classes there are does not depend on the image's size, which is not known yet.
        boxes = sample.read_boxes((ANY_SIDE, ANY_SIDE))
    except AnnotationError:
        return []
    return [] if boxes is None else sorted(set(boxes.classes.tolist()) - {NO_LABEL})


def balance(
    chosen: npt.NDArray[np.bool_], hashes: Hashes, fixed: npt.NDArray[np.bool_], members: Sequence[Rows]
) -> None:
    """Give every class with two or more samples one on either side; changes `chosen` (bool [N], true: `val`).

    `fixed` samples do not move. A sample with several classes may leave `train` only when each of its classes keeps
    another one there.
    """
    for rows in members:
        movable = rows[~fixed[rows]]
        if len(rows) > 1 and chosen[rows].all() and len(movable):
            chosen[movable[np.argmax(hashes[movable])]] = False
    left = [int((~chosen[rows]).sum()) for rows in members]
    for number, rows in enumerate(members):
        if len(rows) < 2 or chosen[rows].any():
            continue
        movable = rows[~fixed[rows]]
        for row in movable[np.argsort(hashes[movable], kind="stable")].tolist():
            others = [
                place
                for place, other in enumerate(members)
                if place == number or row in other[(at := np.searchsorted(other, row)) : at + 1]  # ascending
            ]
            if all(left[place] > 1 for place in others):
                chosen[row] = True
                for place in others:
                    left[place] -= 1
                break


def join_splits(sources: Mapping[str, tuple[Source, str]], root: str) -> Source:
    """One source whose splits are data sets opened on their own, with a prefix for the keys of each.

    Of a data set that has splits of its own, the one of that name is taken. Class folders that not every split has
    are united. Raises SourceError when the layouts or the class names differ otherwise, or no split has the name.
    """
    first = next(source for source, _ in sources.values())
    for name, (source, _) in sources.items():
        if source.kind != first.kind:
            raise SourceError(f"split {name!r} is a {source.kind} data set, the first is {first.kind}")
    names = unite_names({name: source for name, (source, _) in sources.items()})
    parts = {}
    for name, (source, prefix) in sources.items():
        own = SPLIT_NAMES.get(name, name)
        if len(source.splits) > 1 and own not in source.splits:
            raise SourceError(
                f"split {name!r} at {source.root}: it has other splits of its own: {', '.join(source.splits)}"
            )
        samples = source.splits[own if len(source.splits) > 1 else next(iter(source.splits))]
        classes = np.array([names.index(own) for own in source.class_names], np.int32)
        changed = None if source.class_names == names else classes
        parts[own] = Selection(samples, np.arange(len(samples)), prefix, changed)
    notes = tuple(dict.fromkeys(note for source, _ in sources.values() for note in source.notes))
    warnings = tuple(dict.fromkeys(text for source, _ in sources.values() for text in source.warnings))
    return replace(first, root=root, class_names=names, splits=parts, notes=notes, warnings=warnings)


def unite_names(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """The class names of all splits. Raises SourceError when they cannot be united."""
    lists = {source.class_names for source in sources.values()}
    if len(lists) == 1:
        return lists.pop()
    named = {name: source for name, source in sources.items() if source.class_names}
    if len(named) == len(sources) and all(
        source.kind in ("folder", "clips", "voc") for source in named.values()
    ):
        return tuple(sorted(set().union(*lists)))
    text = "; ".join(f"{name}: {', '.join(source.class_names) or 'none'}" for name, source in sources.items())
    raise SourceError(f"the splits have different class names ({text}): pass class_names or fix the data set")


# -- exact copies ------------------------------------------------------------------------------------------------

READ_ROWS = 10_000
BLOCK = 4096
# Threads overlap the waiting for a disk or a network; one task for a row would cost more than reading it.
THREADS, ROWS_PER_TASK = 8, 512
UNKNOWN = -1

Digest = Callable[[Sample], bytes | None]


def find_copies(samples: Samples) -> tuple[Rows, str | None]:
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


def count_shared(splits: Mapping[str, Samples]) -> dict[tuple[str, str], int]:
    """(split, other split) → samples of the other one that are exact copies of samples of the first, where there are any."""
    first, _ = find_copies(Joined(list(splits.values())))
    ends = np.cumsum([len(samples) for samples in splits.values()])[:-1]
    groups = dict(zip(splits, np.split(first, ends), strict=True))
    order = sorted(groups, key=lambda name: name != "train")
    found = {pair: int(np.isin(groups[pair[1]], groups[pair[0]]).sum()) for pair in combinations(order, 2)}
    return {pair: count for pair, count in found.items() if count}


class Joined(Samples):
    """The samples of several splits, one after the other."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        super().__init__([key for part in parts for key in part.keys])
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

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
