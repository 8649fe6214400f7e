"""What changed in a data set since its store was made: files, keys, splits, annotations, class names.

The new rows of each split: a sample that the store has keeps its row, a renamed file takes the row of its old name, a
new one the first row that a removed one has left, else the next at the end; rows beyond the end then fill the rest.
So most of a store's shards stay as they are, and the same change always gives the same store.

A stamp tells whether a sample's file or annotation may have changed, without reading them. It is a row of four int64: bytes and
time of change (ns) of the file that holds the sample, then two numbers of its annotation. Equal stamps mean: not read again.
The stamps of the last run are kept beside the store's arrays, as `.extract/files-<split>.i64` [N, 2] and
`.extract/annotations-<split>.i64` [N, 2], in the order of its rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.decode.sample import boxes_to_store
from extract.plan import RowSamples, sample_key
from extract.sources.base import REMOVED, AnnotationError, Boxes, Sample, Samples, content_digest
from files.writing import replace_file
from imaging.decode import ImageError
from store import format as names
from store.format import NOTES_FOLDER
from store.reader import Split, Store

ANNOTATION_REASON = "annotation: "  # what the reason of a row begins with whose image is sound
ENCODE = -1

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
UNKNOWN = -1  # no file, or one that cannot be looked at
NEVER_SEEN = -2  # recorded for what no run has looked at: differs from everything
NO_FILE = -3  # the annotation's file does not exist: for YOLO, an image without objects
NO_ANNOTATION = -4

READERS = 8
Stamps = npt.NDArray[np.int64]


@dataclass
class Counts:
    """Samples by what happened to them. `encode`: those whose features no store has yet."""

    unchanged: int = 0
    relabeled: int = 0  # another label, other boxes or another mask
    renamed: int = 0  # another key in the place of one that is gone, with its bytes
    copied: int = 0  # a new key with the bytes of one that is still there
    moved: int = 0  # in another split than before
    removed: int = 0
    changed: int = 0  # other bytes, or an image or annotation that was bad
    new: int = 0
    encode: int = 0

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass(frozen=True)
class Part:
    """One split of a store whose features can be reused, with what the last run recorded of its files."""

    split: Split
    stamps: Stamps
    class_names: tuple[str, ...]
    fresh: bool  # encoded for the data set as it is now, not yet part of the store

    @cached_property
    def content(self) -> npt.NDArray[np.uint8]:
        return self.split.read(names.CONTENT)

    @cached_property
    def rows(self) -> dict[str, int]:
        return {sample_key(key): row for row, key in enumerate(self.split.keys)}  # of two rows the later one

    @cached_property
    def valid(self) -> Flags:
        return self.split.valid

    @cached_property
    def bad_annotation(self) -> set[int]:
        """Rows whose annotation was wrong."""
        bad = np.flatnonzero(~self.valid).tolist()
        return {row for row in bad if self.split.reason(row).startswith(ANNOTATION_REASON)}

    @cached_property
    def never_encoded(self) -> set[int]:
        """Rows whose file was gone when it was their turn."""
        return {row for row in np.flatnonzero(~self.valid).tolist() if self.split.reason(row) == REMOVED}

    @cached_property
    def unreadable(self) -> set[int]:
        """Rows whose file could not be read at all."""
        return {row for row in np.flatnonzero(~self.valid).tolist() if not self.content[row].any()}

    @cached_property
    def labels(self) -> npt.NDArray[np.int32]:
        if names.LABEL in self.split.names:
            return self.split.read(names.LABEL)
        return np.full(len(self.split), names.NO_LABEL, np.int32)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        return self.split.read(names.SIZES)


@dataclass
class SplitChange:
    """One split as it will be. N rows in their new order.

    part, row: where each row's features are, `part` is ENCODE where nowhere yet. boxes, masks: rows whose entries
    differ from those; relabeled: rows whose targets mean something else, whatever the numbers of the classes are.
    invalid: row → reason of sound images whose annotation cannot be read.
    """

    name: str
    samples: RowSamples
    keys: list[str]
    part: Ints
    row: Ints
    labels: npt.NDArray[np.int32]
    stamps: Stamps
    boxes: Flags
    masks: Flags
    relabeled: Flags
    invalid: dict[int, str] = field(default_factory=dict)

    @property
    def to_encode(self) -> Ints:
        return np.flatnonzero(self.part == ENCODE)


@dataclass
class Changes:
    """All splits as they will be, the parts that they take rows from, and how that differs from the store."""

    parts: list[Part]
    splits: dict[str, SplitChange]
    counts: Counts
    classes: tuple[tuple[str, ...], tuple[str, ...]]  # before, now
    touched: bool  # recorded stamps are not those of now
    any: bool  # whether the store has to change

    def summary(self) -> tuple[dict[str, int], str] | None:
        """Counts and `describe`; None when nothing changed."""
        return (self.counts.as_dict(), self.describe()) if self.any else None

    def describe(self) -> str:
        """`3 relabeled, 1 renamed, …; class names: …`, without what did not happen."""
        shown = {
            name: count
            for name, count in self.counts.as_dict().items()
            if name not in ("encode", "unchanged")
        }
        texts = [", ".join(f"{count:,} {name}" for name, count in shown.items() if count)]
        before, now = self.classes
        if before != now:
            added, gone = [n for n in now if n not in before], [n for n in before if n not in now]
            parts = [f"{len(added)} added ({listed(added)})"] * bool(added)
            parts += [f"{len(gone)} removed ({listed(gone)})"] * bool(gone)
            texts.append(f"class names: {', '.join(parts) or 'in another order'}")
        return "; ".join(text for text in texts if text) or "other kinds of targets"


def listed(items: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(items) - shown:,} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def find_changes(
    store: Store,
    encoded: Store | None,
    samples: Mapping[str, Samples],
    class_names: tuple[str, ...],
    targets: Sequence[names.ArraySpec],
    *,
    check_content: bool = False,
    notes: Path | None = None,
    between: Callable[[], None] = lambda: None,
) -> Changes:
    """Compare a complete store with the samples by split that the data set has now.

    encoded: rows that were encoded since, for this data set. targets: the target arrays that the data set needs.
    check_content: read every file, and try bad images again; otherwise files with the recorded stamp are trusted.
    notes: the folder of the store's notes, None for the one that it has.
    Raises what `between` raises.
    """
    parts = [
        Part(
            split,
            load_stamps((source is store and notes) or source.path / NOTES_FOLDER, name, len(split)),
            source.manifest.class_names,
            fresh=source is encoded,
        )
        for source in ([store] if encoded is None else [store, encoded])
        for name, split in source.items()
    ]
    samples = {name: part for name, part in samples.items() if len(part)}
    finder = Finder(
        store, parts, samples, class_names, {spec.name for spec in targets}, check_content, between
    )
    splits = {name: finder.split(name) for name in samples}
    counts = finder.count(splits)
    other_arrays = finder.targets != {
        spec.name for spec in store.manifest.arrays if spec.name.startswith(names.TARGETS)
    }
    return Changes(
        parts=parts,
        splits=splits,
        counts=counts,
        classes=(store.manifest.class_names, class_names),
        touched=any(finder.touched(change) for change in splits.values()),
        any=other_arrays
        or class_names != store.manifest.class_names
        or list(splits) != [name for name in splits if name in store]
        or set(splits) != set(store.splits)
        or any(finder.differs(change) for change in splits.values()),
    )


class Finder:
    """Finds for every sample of the data set the row that has its features, and what is different about it."""

    def __init__(
        self,
        store: Store,
        parts: list[Part],
        samples: Mapping[str, Samples],
        class_names: tuple[str, ...],
        targets: set[str],
        check_content: bool,
        between: Callable[[], None],
    ) -> None:
        self.parts, self.samples, self.class_names, self.targets = parts, samples, class_names, targets
        self.check_content, self.between = check_content, between
        # A random view is a function of the key: under another key it would be another view.
        self.key_matters = store.manifest.views > 0 and not store.manifest.exact_flip
        self.old = {part.split.name: number for number, part in enumerate(parts) if not part.fresh}
        self.used: dict[int, set[int]] = {number: set() for number in range(len(parts))}
        self.fate: dict[str, list[str]] = {}  # split → what happened to the sample of each new row
        self.all_keys = {key for part in samples.values() for key in part.keys}
        self.kept: dict[str, set[int]] = {}  # split → rows whose keys the data set still has in it
        for name, part in samples.items():
            rows = self.parts[self.old[name]].rows if name in self.old else {}
            self.kept[name] = {rows[key] for key in part.keys if key in rows}

    def split(self, name: str) -> SplitChange:
        samples = self.samples[name]
        rows = RowSamples(samples)
        keys = samples.keys
        stamps, labels = stamps_of(rows)
        part, row, fate = self.match(name, rows, keys, stamps)
        order = self.place(name, part, row)
        self.fate[name] = [fate[index] for index in order.tolist()]
        change = SplitChange(
            name=name,
            samples=RowSamples(samples, None if (order == np.arange(len(order))).all() else order),
            keys=[keys[index] for index in order.tolist()],
            part=part[order],
            row=row[order],
            labels=labels[order],
            stamps=stamps[order],
            boxes=np.zeros(len(order), np.bool_),
            masks=np.zeros(len(order), np.bool_),
            relabeled=np.zeros(len(order), np.bool_),
        )
        for number in np.unique(change.part[change.part != ENCODE]).tolist():
            here = np.flatnonzero(change.part == number)
            stored = self.renumbered(self.parts[number], self.parts[number].labels[change.row[here]])
            change.relabeled[here] = stored != change.labels[here]
        self.compare_boxes_and_masks(change)
        return change

    # -- which row has a sample's features --------------------------------------------------------

    def match(
        self, name: str, samples: RowSamples, keys: Sequence[str], stamps: Stamps
    ) -> tuple[Ints, Ints, list[str]]:
        """Part and row of each sample's features (ENCODE: nowhere), and what happened to it since."""
        part, row = np.full(len(keys), ENCODE, np.int64), np.full(len(keys), ENCODE, np.int64)
        fate = [""] * len(keys)
        candidates = {index: found for index, key in enumerate(keys) if (found := self.with_key(name, key))}
        unsure: list[int] = []
        for index in range(len(keys)):
            chosen = self.trusted(candidates.get(index, []), stamps[index])
            if chosen is not None:
                part[index], row[index] = chosen
            elif index in candidates or self.may_be_stored(stamps[index]):
                unsure.append(index)
        digests = digests_of(samples, np.array(unsure, np.int64), self.between)
        for index, digest in digests.items():
            for number, place in candidates.get(index, []):
                same = self.parts[number].content[place].tobytes() == digest
                if same and self.usable(number, place, stamps[index]):
                    part[index], row[index] = number, place
                    break
        missing = [index for index in unsure if part[index] == ENCODE and any(digests[index])]
        if not self.key_matters:
            self.match_by_content(name, missing, digests, part, row)
        for index, key in enumerate(keys):
            fate[index] = self.fate_of(name, key, int(part[index]), int(row[index]))
        return part, row, fate

    def with_key(self, split: str, key: str) -> list[tuple[int, int]]:
        """(part, row) of the rows with this key: freshly encoded first, then of the same split, then of others."""
        found = [(number, part.rows[key]) for number, part in enumerate(self.parts) if key in part.rows]
        return sorted(found, key=lambda item: (not self.parts[item[0]].fresh, item[0] != self.old.get(split)))

    def trusted(
        self, candidates: list[tuple[int, int]], stamp: npt.NDArray[np.int64]
    ) -> tuple[int, int] | None:
        """The candidate whose file has the same stamp now, without reading it."""
        for number, row in candidates:
            part = self.parts[number]
            same = part.stamps.item(row, 0) == stamp.item(0) and part.stamps.item(row, 1) == stamp.item(1)
            same = same and row not in part.unreadable  # a right to read changes no stamp
            if same and not (self.check_content and not part.fresh) and self.usable(number, row, stamp):
                return number, row
        return None

    def usable(self, number: int, row: int, stamp: npt.NDArray[np.int64]) -> bool:
        """False for a bad row that may be good now: its annotation changed, or every bad image is to be tried."""
        part = self.parts[number]
        if part.valid[row]:
            return True
        if row in part.never_encoded or (self.check_content and not part.fresh):
            return False
        return not (row in part.bad_annotation and bool((part.stamps[row, 2:] != stamp[2:]).any()))

    def may_be_stored(self, stamp: npt.NDArray[np.int64]) -> bool:
        """Whether a file under a new key may have the bytes of a stored one; its length tells without reading it."""
        length = stamp.item(0)
        # The stored rows' own lengths may be unknown: a store of an older version, rows of a database.
        unknown = length == UNKNOWN or not self.lengths.isdisjoint((NEVER_SEEN, UNKNOWN))
        return not self.key_matters and (unknown or length in self.lengths)

    @cached_property
    def lengths(self) -> set[int]:
        """Lengths of all stored files."""
        return {length for part in self.parts for length in np.unique(part.stamps[:, 0]).tolist()}

    def match_by_content(
        self, name: str, missing: list[int], digests: Mapping[int, bytes], part: Ints, row: Ints
    ) -> None:
        """Valid rows with the same bytes, those first whose own key is gone from this split."""
        wanted = {digests[index] for index in missing}
        if not wanted:
            return
        found: dict[bytes, list[tuple[int, int]]] = {}
        for number, item in enumerate(self.parts):
            for place in np.flatnonzero(item.valid).tolist():
                digest = item.content[place].tobytes()
                if digest in wanted:
                    found.setdefault(digest, []).append((number, place))
        here = self.old.get(name)
        for index in missing:
            places = found.get(digests[index], [])
            free = [p for p in places if p[0] == here and p[1] not in self.kept[name]]
            unused = [p for p in free if p[1] not in self.used[p[0]]]
            for number, place in [*unused, *free, *places][:1]:
                self.used[number].add(place)
                part[index], row[index] = number, place

    def fate_of(self, split: str, key: str, number: int, row: int) -> str:
        """What happened to a sample, see Counts."""
        here = self.old.get(split)
        was_here = here is not None and key in self.parts[here].rows
        elsewhere = [n for s, n in self.old.items() if s != split and key in self.parts[n].rows]
        if not was_here and not elsewhere:
            if number == ENCODE or self.parts[number].fresh:
                return "new"
            source = sample_key(self.parts[number].split.keys[row])
            return "copied" if source in self.all_keys else "renamed"
        own = (here, self.parts[here].rows[key]) if here is not None and was_here else None
        old = own or (elsewhere[0], self.parts[elsewhere[0]].rows[key])
        if (number, row) != old:
            return "changed"
        return "unchanged" if was_here else "moved"

    # -- the order of rows ------------------------------------------------------------------------

    def place(self, name: str, part: Ints, row: Ints) -> Ints:
        """The samples' indices in the order of the new rows, see the module's text."""
        count = len(part)
        here = self.old.get(name)
        places = np.full(count, -1, np.int64)
        taken: set[int] = set()
        if here is not None:
            old = self.parts[here].rows
            for index, key in enumerate(self.samples[name].keys):
                places[index] = old.get(key, -1)
            taken = set(places[places >= 0].tolist())
            for index in np.flatnonzero((places < 0) & (part == here)).tolist():
                if int(row[index]) not in taken:
                    places[index] = row[index]
                    taken.add(int(row[index]))
        free = iter(number for number in range(count + len(taken) + 1) if number not in taken)
        for index in np.flatnonzero(places < 0).tolist():
            places[index] = next(free)
        beyond = np.flatnonzero(places >= count)
        inside = np.setdiff1d(np.arange(count), places)
        places[beyond[np.argsort(places[beyond])]] = inside
        return np.argsort(places)

    # -- targets ----------------------------------------------------------------------------------

    def renumbered(self, part: Part, classes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The numbers that the classes of a part have now; -2 for one that is gone, -1 stays none."""
        number = {text: index for index, text in enumerate(self.class_names)}
        numbers = np.array([*(number.get(text, -2) for text in part.class_names), -1], np.int32)
        return numbers[classes]

    def compare_boxes_and_masks(self, change: SplitChange) -> None:
        """Mark the rows whose boxes or masks are not those of the row that they are taken from."""
        wants_boxes, wants_masks = names.BOXES in self.targets, names.MASK in self.targets
        if not (wants_boxes or wants_masks):
            return
        for number in np.unique(change.part[change.part != ENCODE]).tolist():
            part = self.parts[number]
            here = np.flatnonzero(change.part == number)
            lacks = (wants_boxes and names.BOXES not in part.split.names) or (
                wants_masks and names.MASK not in part.split.names
            )
            now, before = change.stamps[here, 2:], part.stamps[change.row[here], 2:]
            known = (now == before).all(axis=1) & (now[:, 0] != UNKNOWN)
            renumbered = part.class_names != self.class_names
            suspects = here if lacks or renumbered else here[~known]
            for count, index in enumerate(suspects.tolist()):
                self.compare_row(change, index, part, wants_boxes, wants_masks)
                if count % 1024 == 0:
                    self.between()

    def compare_row(self, change: SplitChange, index: int, part: Part, boxes: bool, masks: bool) -> None:
        row = int(change.row[index])
        width, height = part.sizes[row].tolist()
        if not width:  # a bad image: it has no targets in the store, whatever the data set has
            change.boxes[index], change.masks[index] = boxes, masks
            change.boxes[index] &= names.BOXES not in part.split.names
            change.masks[index] &= names.MASK not in part.split.names
            return
        sample = change.samples[index]
        try:
            if boxes:
                found = boxes_to_store(sample, (width, height))[0] or Boxes.of([], [])
                known = names.BOXES in part.split.names
                stored = Boxes.of([], [])
                if known:
                    values, classes = (
                        part.split.ragged([row], name)[0] for name in (names.BOXES, names.BOX_CLASSES)
                    )
                    stored = Boxes(values, classes)
                change.boxes[index] = not known or not same_boxes(stored, found)
                mapped = Boxes(stored.values, self.renumbered(part, stored.classes))
                change.relabeled[index] |= not same_boxes(mapped, found)
            if masks:
                mask, known = sample.read_mask((width, height)) or b"", names.MASK in part.split.names
                before = bytes(part.split.ragged([row], names.MASK)[0]) if known else b""
                change.masks[index] = not known or mask != before
                change.relabeled[index] |= mask != before
        except AnnotationError as error:
            change.invalid[index] = f"{ANNOTATION_REASON}{error}"
            change.relabeled[index] = True

    # -- what it comes to -------------------------------------------------------------------------

    def count(self, splits: Mapping[str, SplitChange]) -> Counts:
        counts = Counts()
        for change in splits.values():
            for index, fate in enumerate(self.fate[change.name]):
                if fate == "unchanged" and change.relabeled[index]:
                    fate = "relabeled"
                setattr(counts, fate, getattr(counts, fate) + 1)
            counts.encode += len(change.to_encode)
        old_keys = {key for number in self.old.values() for key in self.parts[number].rows}
        counts.removed = max(0, len(old_keys - self.all_keys) - counts.renamed)
        return counts

    def touched(self, change: SplitChange) -> bool:
        here = self.old.get(change.name)
        return here is None or not np.array_equal(self.parts[here].stamps, change.stamps)

    def differs(self, change: SplitChange) -> bool:
        """Whether a split of the store has to be written again."""
        here = self.old.get(change.name)
        if here is None or len(self.parts[here].split) != len(change.keys):
            return True
        part = self.parts[here]
        in_place = (change.part == here) & (change.row == np.arange(len(change.row)))
        if not in_place.all() or change.boxes.any() or change.masks.any() or change.invalid:
            return True
        return not np.array_equal(part.labels, change.labels) or list(part.split.keys) != change.keys


def same_boxes(one: Boxes, other: Boxes) -> bool:
    return np.array_equal(one.values, other.values) and np.array_equal(one.classes, other.classes)


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
