"""`cli verify`: is the store still what its data set is? Nothing is encoded, nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from extract.follow.changes import find_changes
from extract.resume import FOLDER, planned_keys, read_source_record
from extract.sources.base import Source, SourceError
from extract.sources.detect import open_source
from store import format as names
from store.format import target_arrays
from store.reader import open_store


class Comparison(NamedTuple):
    """problem: how the data set differs from the store, None when it does not. skipped: why nothing was compared."""

    problem: str | None = None
    skipped: str | None = None


def compare_with_data(path: Path, data: str | None = None, *, check_content: bool = False) -> Comparison:
    """Compare a complete store with its data set, where that can be opened: at `data`, or where it was.

    check_content: read every file; otherwise files of recorded size and time are trusted.
    """
    store = open_store(path)
    try:
        source = open_recorded(path, data)
    except SourceError as error:
        return Comparison(skipped=f"the data set was not compared: {error}")
    splits = source.splits()
    kinds = frozenset().union(*(samples.target_kinds() for samples in splits.values()))
    targets = target_arrays(**{kind: kind in kinds for kind in ("label", "boxes", "mask")})
    changes = find_changes(
        store,
        None,
        splits,
        source.class_names,
        [spec for spec in targets if spec.name.startswith(names.TARGETS)],
        notes=FOLDER,
        check_content=check_content,
    )
    if not changes.any:
        return Comparison()
    return Comparison(
        problem=f"the data set at {source.root} has changed since: {changes.describe()}; "
        "the command that made the store, run again, follows it"
    )


def open_recorded(path: Path, data: str | None) -> Source:
    """The data set as the store's extraction opened it. Raises SourceError when that is impossible."""
    manifest, record = open_store(path).manifest, read_source_record(path)
    if data is None and not record:
        raise SourceError(
            "the store does not record how it was opened (a converted copy?): give it with --data"
        )
    place = data or record.get("data") or manifest.data_root
    if not place:
        raise SourceError("the store does not record where it is: give it with --data")
    keys = planned_keys(path)
    return open_source(
        place,
        record.get("source") or manifest.source or "auto",
        split=record.get("split") or None,
        val_fraction=record.get("val_fraction", 0.1),
        group_duplicates=record.get("group_duplicates"),
        recorded=lambda: keys if keys.keys() <= {"train", "val"} else None,
        **record.get("options", {}),
    )
