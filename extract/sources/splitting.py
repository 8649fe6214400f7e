"""Cutting a missing validation split, by a rule that is stable when images are added.

- A sample goes to `val` when blake2b-64(key) / 2^64 < val_fraction, so that other samples do not matter.
- Exact copies of one file go where the one with the smallest key goes.
- Every class with two or more samples gets one on either side: where the rule gives `val` (or `train`) none, the
  sample with the smallest (largest) hash goes there. That depends on the other samples of the class: of each class
  at most one sample moves when others are added. The classes of an image with boxes are those of its boxes. Masks
  are not decoded for this; they, and images without any target, count as one class.
- What a store has recorded stays where it is, whatever the rule would say now.

By option the content's digest takes the key's place: renamed files stay in their split, and every file is read once.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from extract.sources import copies
from extract.sources.base import AnnotationError, Sample, Samples, Selection, Source, SourceError

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


def in_validation(identity: str | bytes, val_fraction: float) -> bool:
    """Whether the hash alone puts the sample with this key (or content digest) into the validation split."""
    return split_hash(identity) < val_fraction * 2.0**64


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
    sides = recorded_sides(samples.keys, recorded or {})
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
        names = (digest or key for digest, key in zip(copies.content_digests(samples), keys, strict=True))
        hashes = np.fromiter((split_hash(name) for name in names), np.uint64, len(samples))
        _, index, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        return hashes, rows[index][inverse.ravel()], notes
    hashes = np.fromiter((split_hash(key) for key in keys), np.uint64, len(samples))
    if group_copies is False:
        return hashes, np.arange(len(samples)), notes
    first, note = copies.group_copies(samples)
    if count := copies.count_copies(first):
        notes.append(
            f"{count:,} of {len(samples):,} samples are exact copies of others: each is in the split of its original"
        )
    return hashes[first], first, [*notes, *([note] if note else [])]


def recorded_sides(keys: Sequence[str], recorded: Mapping[str, Container[str]]) -> npt.NDArray[np.int8]:
    """For each key 0 where a store has it in `train`, 1 in `val`, -1 in neither; int8 [N]."""
    train, val = recorded.get("train", ()), recorded.get("val", ())
    if not recorded:
        return np.full(len(keys), -1, np.int8)
    return np.fromiter((1 if key in val else 0 if key in train else -1 for key in keys), np.int8, len(keys))


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
    return [] if boxes is None else sorted(set(boxes.classes.tolist()))


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
            others = [place for place, other in enumerate(members) if place == number or contains(other, row)]
            if all(left[place] > 1 for place in others):
                chosen[row] = True
                for place in others:
                    left[place] -= 1
                break


def contains(rows: Rows, row: int) -> bool:
    """Whether ascending rows have this one."""
    place = int(np.searchsorted(rows, row))
    return place < len(rows) and int(rows[place]) == row


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
        samples = samples_of_split(name, source)
        classes = np.array([names.index(own) for own in source.class_names], np.int32)
        changed = None if source.class_names == names else classes
        parts[SPLIT_NAMES.get(name, name)] = Selection(samples, np.arange(len(samples)), prefix, changed)
    notes = tuple(dict.fromkeys(note for source, _ in sources.values() for note in source.notes))
    warnings = tuple(dict.fromkeys(text for source, _ in sources.values() for text in source.warnings))
    return replace(first, root=root, class_names=names, parts=parts, notes=notes, warnings=warnings)


def samples_of_split(name: str, source: Source) -> Samples:
    """What a data set gives for the split `name`: all it has, or its own split of that name. Raises SourceError."""
    if len(source.parts) == 1:
        (samples,) = source.parts.values()
        return samples
    own = source.parts.get(SPLIT_NAMES.get(name, name))
    if own is None:
        raise SourceError(
            f"split {name!r} at {source.root}: it has other splits of its own: {', '.join(source.parts)}"
        )
    return own


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
