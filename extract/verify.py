"""`cli verify`: is the store still what its data set and its teacher give?

With `--teacher-path`, some samples are encoded again and compared with what is stored, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from extract.encode import encode_samples
from extract.follow.changes import find_changes
from extract.plan import cut_splits, encoding_of, read_source_record, spread
from extract.sources.base import Sample, Source, SourceError
from extract.sources.detect import open_source
from extract.teachers import Teacher, load_teacher
from imaging.clips import ClipFrame
from imaging.decode import MOST_PIXELS, decode_image
from store import format as names
from store.errors import DistillError
from store.format import Manifest, target_arrays
from store.reader import Split, Store, open_store

# float16 keeps 11 bits and a batch of another size changes the last ones; everything else is a fault.
LEAST_COSINE = 0.9999
# On standardized features, where a flipped or shifted image shows: the plain cosine of such a one can be 0.995.
LEAST_STANDARDIZED = 0.99
BATCH = 16

Floats = npt.NDArray[np.float32]


class NoImages(DistillError):
    """The images that are to be encoded again are not there."""


@dataclass
class Audit:
    """Least cosines over all samples (pooled) and tokens (grid), recorded views included; what is wrong."""

    samples: int = 0
    pooled: float = 1.0
    grid: float | None = None
    pooled_standardised: float = 1.0
    grid_standardised: float | None = None
    findings: list[str] = field(default_factory=list)


def teacher_of(store: Store, teacher_path: str, device: str = "auto") -> Teacher:
    """The teacher at `teacher_path`, set up as the store's was. Raises TeacherError when it does not load.

    store: of a store with several teachers, what `Store.of_teacher` gives.
    """
    manifest = store.manifest
    return load_teacher(
        manifest.teacher.name,
        teacher_path,
        device=device,
        dtype=manifest.teacher.dtype,
        image_size=manifest.preprocessing.image_size,
        resize=manifest.preprocessing.resize,
        pool=manifest.teacher.options.get("pool", "mean"),
        layers=",".join(manifest.options.get(names.LAYERS, {})),
    )


def audit_store(
    path: str | Path,
    teacher_path: str,
    *,
    samples: int = 16,
    data: str | None = None,
    device: str = "auto",
    name: str | None = None,
    teacher: Teacher | None = None,
) -> Audit:
    """Encode `samples` valid rows, spread over the store, with the teacher at `teacher_path`.

    name: which of the store's teachers that is; None: the first one.
    teacher: that of `teacher_of`, where it is loaded already.

    The images come from the data set (`data`, or where it was when the store was made), or from the store itself.

    Raises:
        NoImages: when neither has them. TeacherError: when the teacher does not load.
    """
    store = open_store(path)
    store = store if name is None else store.of_teacher(name)
    audit = Audit()
    manifest = store.manifest
    teacher = teacher or teacher_of(store, teacher_path, device)
    stored, given = manifest.teacher.model_dump(), teacher.spec.model_dump()
    audit.findings += [
        f"teacher: {name} is {stored[name]} in the store, {given[name]} at {teacher_path}"
        for name in stored
        if stored[name] != given[name]
    ]
    chosen = choose_rows(store, samples)
    found = find_samples(store, chosen, data)
    reference = max(store.values(), key=len)
    for split, rows in chosen.items():
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            compare(
                audit,
                store[split],
                reference,
                some,
                encode_again(manifest, teacher, [found[split][row] for row in some]),
            )
    return audit


def choose_rows(store: Store, count: int) -> dict[str, list[int]]:
    """`count` valid rows, evenly spaced over all splits."""
    valid = [(split, int(row)) for split in store.splits for row in np.flatnonzero(store[split].valid)]
    chosen: dict[str, list[int]] = {}
    for place in spread(count, len(valid)):
        split, row = valid[place]
        chosen.setdefault(split, []).append(row)
    return chosen


def find_samples(
    store: Store, chosen: Mapping[str, list[int]], data: str | None
) -> dict[str, dict[int, Sample]]:
    """The sample of every chosen row, by key.

    Raises:
        NoImages: when neither the data set nor the store has it.
    """
    root, kind = data or store.manifest.data_root or "", store.manifest.source or "auto"
    record = read_source_record(store.path)
    try:
        source = open_source(
            root, kind, split=record.get("split") or None, val_fraction=0, **record.get("options", {})
        )
    except DistillError as error:
        if data is not None or store.manifest.images != "jpeg":
            raise NoImages(
                f"{store.path}: its images cannot be read ({error}): give the data set with --data"
            ) from None
        return {split: stored_images(store[split], rows) for split, rows in chosen.items()}
    where: dict[str, tuple[str, int]] = {}
    wanted = {store[split].keys[row] for split, rows in chosen.items() for row in rows}
    for name, samples in source.splits.items():
        where |= {key: (name, index) for index, key in enumerate(samples.keys) if key in wanted}
    missing = sorted(wanted - set(where))
    if missing:
        raise NoImages(
            f"{store.path}: {len(missing)} of its images are not in {source.root}, first {missing[0]}: "
            "give the data set with --data"
        )
    parts = source.splits
    return {
        split: {row: parts[where[key][0]][where[key][1]] for row in rows for key in [store[split].keys[row]]}
        for split, rows in chosen.items()
    }


def stored_images(split: Split, rows: list[int]) -> dict[int, Sample]:
    """Samples of the images, or of the clips' frames, that the store holds."""
    encoded = [data.tobytes() for data in split.ragged(rows, names.IMAGES_ENCODED)]
    if names.IMAGES_FRAMES not in split.names:
        return {row: Sample(split.keys[row], data) for row, data in zip(rows, encoded, strict=True)}
    spans = split.gather(np.asarray(rows), [names.IMAGES_FRAMES])[names.IMAGES_FRAMES]
    return {
        row: Sample(
            split.keys[row],
            frames=StoredClip(
                Path(split.keys[row]), data, tuple((first, length) for first, length in places.tolist())
            ),
        )
        for row, data, places in zip(rows, encoded, spans, strict=True)
    }


@dataclass(frozen=True, slots=True)
class StoredClip:
    """A clip whose frames are in the store: `data` holds their JPEG bytes at `spans` (start, length)."""

    path: Path
    data: bytes
    spans: tuple[tuple[int, int], ...]

    def read(self) -> bytes:
        return self.data

    def stored_bytes(self) -> int:
        return len(self.data)

    def read_clip(self, count: int, *, pairs: bool, max_pixels: int, bit_depth: int) -> list[ClipFrame]:
        """The stored frames: those that the extraction took."""
        files = [self.data[start : start + length] for start, length in self.spans]
        return [ClipFrame(decode_image(file, max_pixels=max_pixels), file) for file in files]


def encode_again(manifest: Manifest, teacher: Teacher, samples: list[Sample]) -> dict[str, Floats]:
    """The samples' features by name, as the extraction encodes them: pooled, grid, and those of recorded views."""
    # The images passed the extraction's own limit; they are not stored again.
    encoding = replace(encoding_of(manifest), max_pixels=MOST_PIXELS, images="none")
    results, arrays = encode_samples(teacher, encoding, samples)
    for sample, result in zip(samples, results, strict=True):
        if result.reason is not None:
            raise NoImages(f"{sample.key} was encoded once, but now: {result.reason}")
    return {name: array for name, array in arrays.items() if name != names.FRAMES}


def compare(
    audit: Audit, split: Split, reference: Split, rows: list[int], again: Mapping[str, Floats]
) -> None:
    """Add the rows' least cosines to the audit, and a finding for each row below the limits.

    `reference`: the split by whose statistics features are standardized: those of a small split are not reliable.
    """
    audit.samples += len(rows)
    for name, fresh in again.items():
        stored = split.gather(rows, [name])[name].astype(np.float32) * split.scale[name]
        plain = cosines(stored, fresh)
        statistics = reference.statistics.get(name)
        if statistics is not None:
            std = np.maximum(statistics.std, 1e-6 * np.abs(statistics.mean) + 1e-12)
            stored, fresh = (stored - statistics.mean) / std, (fresh - statistics.mean) / std
        standardized = cosines(stored, fresh)
        field_name = "pooled" if name in (names.POOLED, names.VIEWS_POOLED) else "grid"
        for suffix, values in (("", plain), ("_standardised", standardized)):
            before: Any = getattr(audit, field_name + suffix)
            least_value = float(values.min())
            setattr(audit, field_name + suffix, least_value if before is None else min(before, least_value))
        for row, least, least_standardized in zip(rows, plain, standardized, strict=True):
            if least < LEAST_COSINE or least_standardized < LEAST_STANDARDIZED:
                audit.findings.append(
                    f"{split.name} {split.keys[row]}: {name} differs from the teacher's answer: cosine {least:.5f} "
                    f"(standardized {least_standardized:.4f}), expected at least {LEAST_COSINE} ({LEAST_STANDARDIZED})"
                )


def cosines(a: Floats, b: Floats) -> Floats:
    """float32 [n]: the least cosine over each sample's tokens of a and b [n, ..., D]; 1 for two that are 0.

    A teacher that ends in a ReLU says 0 in every channel of some cells.
    """
    product = (a * b).sum(axis=-1, dtype=np.float64)
    squares = [(part.astype(np.float64) ** 2).sum(-1) for part in (a, b)]
    cosine = product / np.maximum(np.sqrt(squares[0] * squares[1]), 1e-30)
    cosine = np.where((squares[0] == 0) & (squares[1] == 0), 1.0, cosine)
    return np.asarray(cosine.reshape(len(a), -1).min(axis=1), np.float32)


# -- the data set: nothing is encoded, nothing is written ------------------------------------------------


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
    splits = source.splits
    kinds = frozenset().union(*(samples.target_kinds() for samples in splits.values()))
    targets = target_arrays(**{kind: kind in kinds for kind in ("label", "boxes", "mask")})
    changes = find_changes(
        store,
        None,
        splits,
        source.class_names,
        [spec for spec in targets if spec.name.startswith(names.TARGETS)],
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
    return open_source(
        place,
        record.get("source") or manifest.source or "auto",
        split=record.get("split") or None,
        val_fraction=record.get("val_fraction", 0.1),
        group_duplicates=record.get("group_duplicates"),
        recorded=lambda: cut_splits(path),
        **record.get("options", {}),
    )
