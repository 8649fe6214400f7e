"""Cutting a missing validation split by a rule that looks at each sample alone, so that it never changes.

A sample goes to `val` when blake2b-64(key) / 2^64 < val_fraction. Neither the order nor the number of the other
samples matters: new images leave the old ones where they are. By option the content's digest takes the key's
place, so that copies of one file stay on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from extract.sources.base import Samples, Selection, Source, SourceError, content_digest
from imaging.errors import ImageError

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


def in_validation(identity: str | bytes, val_fraction: float) -> bool:
    """Whether the sample with this key (or content digest) belongs to the validation split."""
    data = identity.encode("utf-8", errors="surrogatepass") if isinstance(identity, str) else identity
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < val_fraction * 2.0**64


def cut_validation(samples: Samples, val_fraction: float, group_duplicates: bool) -> dict[str, Samples]:
    """`train` and `val` of the samples; a split that comes out empty is left out.

    `group_duplicates` reads every file once, to decide by content. Unreadable files are decided by key.
    """
    chosen = np.fromiter(
        (
            in_validation(_content(samples, row) or key if group_duplicates else key, val_fraction)
            for row, key in enumerate(samples.keys)
        ),
        dtype=np.bool_,
        count=len(samples),
    )
    parts = {"train": np.flatnonzero(~chosen), "val": np.flatnonzero(chosen)}
    return {name: Selection(samples, rows) for name, rows in parts.items() if len(rows)}


def _content(samples: Samples, row: int) -> bytes | None:
    try:
        return content_digest(samples[row].read())
    except ImageError:
        return None


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
    return replace(first, root=root, class_names=names, parts=parts, notes=notes)


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
    raise SourceError(
        f"the splits have different class names ({text}): pass class_names or mend the data set"
    )
