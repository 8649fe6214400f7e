"""What is in a store: its arrays for `cli inspect`, samples by kind and class, and what deserves a warning.

Shapes: `N` rows of a split, `C` classes. A target's kind is `label`, `boxes` or `mask`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from store.format import (
    BOX_CLASSES,
    BOXES,
    CONTENT,
    LABEL,
    MASK,
    MEASURED_FILE,
    NO_LABEL,
    WORK_FOLDER,
    ArraySpec,
)
from store.job import ROWS_STORE, load_job, pending_jobs, progress
from store.metadata import is_url, read_json
from store.reader import Split, Store, open_store
from store.teachers import addition_path, pending_additions

TARGET_ARRAYS = {"boxes": BOXES, "mask": MASK, "label": LABEL}
FEW_SAMPLES = 30  # below, one sample is worth more than three points of accuracy
SHOWN_CLASSES = SHOWN_REASONS = 5
# What a class without samples means, for the split that is measured on and for the one that is trained on.
UNDEFINED, UNLEARNED = "their metrics are undefined", "they cannot be learned"


def target_kind(split: Split) -> str | None:
    """What the rows of a split are labeled with; None for nothing."""
    return next((kind for kind, array in TARGET_ARRAYS.items() if array in split.names), None)


def labeled_rows(split: Split, kind: str | None) -> np.ndarray:
    """[N] bool: rows with a class label, at least one box, or a mask.

    Of the others in a detection data set, `unlabeled_rows` are those without labels, the rest is background.
    """
    if kind is None or TARGET_ARRAYS[kind] not in split.names:
        return np.zeros(len(split), dtype=bool)
    if kind == "label":
        return np.asarray(split.read(LABEL) != NO_LABEL)
    filled = np.asarray(np.diff(split.read(split.specs[TARGET_ARRAYS[kind]].offsets_name)) > 0)
    return filled & ~unlabeled_rows(split, kind) if kind == "boxes" else filled


def unlabeled_rows(split: Split, kind: str | None) -> np.ndarray:
    """[N] bool: rows without a target of this kind; of boxes those that are not labeled, which are no background."""
    if kind != "boxes":
        return ~labeled_rows(split, kind)
    marked = np.zeros(len(split), dtype=bool)
    if BOX_CLASSES in split.names:
        offsets, classes = split.read(split.specs[BOX_CLASSES].offsets_name), split.read(BOX_CLASSES)
        filled = np.flatnonzero(np.diff(offsets) > 0)
        marked[filled] = classes[offsets[filled]] == NO_LABEL
    return marked


def count_kinds(split: Split) -> dict[str, int]:
    """Rows that are `labeled`, `unlabeled`, `background` (without a box in a detection data set) or `bad`."""
    kind = target_kind(split)
    labeled, valid = labeled_rows(split, kind), split.valid
    unlabeled = unlabeled_rows(split, kind)
    return {
        "labeled": int((valid & labeled).sum()),
        "unlabeled": int((valid & unlabeled).sum()),
        "background": int((valid & ~labeled & ~unlabeled).sum()),
        "bad": int((~valid).sum()),
    }


def count_measured(split: Split, kind: str | None) -> int:
    """Valid rows that a metric is measured on: labeled ones; all of them for no target.

    A labeled image without boxes counts: what a detector finds there is wrong.
    """
    return int((split.valid if kind is None else split.valid & ~unlabeled_rows(split, kind)).sum())


def count_classes(split: Split, classes: int, kind: str | None) -> dict[str, np.ndarray]:
    """`samples` int64 [C]: valid rows that have the class; for boxes also `boxes` int64 [C].

    Empty for masks, whose classes are known only after every mask is decoded, and where there are no targets.
    """
    if kind is None or kind == "mask" or TARGET_ARRAYS[kind] not in split.names:
        return {}
    if kind == "label":
        labels = split.read(LABEL)[split.valid]
        return {"samples": np.bincount(labels[labels >= 0], minlength=classes)}
    rows = np.repeat(np.arange(len(split)), np.diff(split.read(split.specs[BOX_CLASSES].offsets_name)))
    numbers = split.read(BOX_CLASSES)
    kept = split.valid[rows] & (numbers != NO_LABEL)
    pairs = np.unique(np.stack([rows[kept], numbers[kept]]), axis=1)
    return {
        "samples": np.bincount(pairs[1], minlength=classes),
        "boxes": np.bincount(numbers[kept], minlength=classes),
    }


# -- copies ----------------------------------------------------------------------------------------------


def content_hashes(split: Split) -> np.ndarray:
    """uint64 [n]: the first half of the content digest of every valid row that has one.

    64 bits are enough for counting: among ten million different files a false pair has a probability of 3e-6.
    """
    if CONTENT not in split.names:
        return np.empty(0, np.uint64)
    content = split.read(CONTENT)[split.valid]
    return np.ascontiguousarray(content[content.any(axis=1), :8]).view(np.uint64).ravel()


def count_shared(store: Store, splits: Sequence[str] | None = None) -> dict[tuple[str, str], int]:
    """(split, other split) → samples of the *other* one whose bytes are also those of a sample of the first.

    `splits`: which ones, in the order in which the first of a pair is chosen; None for all, `train` first.
    Pairs without shared samples are left out.
    """
    order = list(splits) if splits is not None else sorted(store.splits, key=lambda name: name != "train")
    hashes = {name: content_hashes(store[name]) for name in order if name in store}
    found = {
        (first, other): int(np.isin(hashes[other], hashes[first]).sum())
        for first, other in combinations(hashes, 2)
    }
    return {pair: count for pair, count in found.items() if count}


# -- warnings --------------------------------------------------------------------------------------------


def shared_warnings(store: Store, splits: Sequence[str] | None = None) -> list[str]:
    """One sentence for each pair of splits that share images, see `count_shared`."""
    return [
        f"{count:,} of {len(store[other]):,} samples of {other} are exact copies of samples of {first}: "
        f"results on {other} are too optimistic, remove the copies from one of the two"
        for (first, other), count in count_shared(store, splits).items()
    ]


def size_warnings(split: Split, kind: str | None) -> list[str]:
    """A sentence when there are so few samples to measure on that a metric is unreliable."""
    counted = count_measured(split, kind)
    if counted >= FEW_SAMPLES:
        return []
    worth = f": one sample changes top-1 by {100 / counted:.3g} points" if counted and kind == "label" else ""
    return [f"{split.name} has {counted} samples to measure on, fewer than {FEW_SAMPLES}{worth}"]


def class_warnings(
    store: Store, splits: Sequence[str], kind: str | None, consequence: str = UNDEFINED
) -> list[str]:
    """A sentence for each split that lacks some of the store's classes; splits without any label are left out."""
    names = store.manifest.class_names
    counts = {split: count_classes(store[split], len(names), kind).get("samples") for split in splits}
    return [
        text
        for split, samples in counts.items()
        if samples is not None
        for text in absent_warnings(split, names, samples, consequence)
    ]


def absent_warnings(split: str, names: Sequence[str], samples: np.ndarray, consequence: str) -> list[str]:
    """A sentence when some classes have no sample (`samples` int64 [C]) and others have; of masks, training counts them."""
    absent = [name for name, count in zip(names, samples, strict=False) if not count]
    if not absent or not samples.any():
        return []
    more = f" and {len(absent) - SHOWN_CLASSES} more" if len(absent) > SHOWN_CLASSES else ""
    listed = ", ".join(absent[:SHOWN_CLASSES]) + more
    return [f"{split} has no sample of {len(absent)} of {len(names)} classes ({listed}): {consequence}"]


def split_warnings(store: Store, train: str, val: str, kind: str | None) -> list[str]:
    """Why results of training on one split and measuring on the other are less certain than they look."""
    return [
        *shared_warnings(store, [train, val]),
        *size_warnings(store[val], kind),
        *class_warnings(store, [val], kind),
        *class_warnings(store, [train], kind, UNLEARNED),
    ]


def store_warnings(store: Store) -> list[str]:
    """The same for all splits of a store, whatever is trained from it later."""
    others = [name for name in store.splits if name != "train"]
    kind = target_kind(store[store.splits[0]])
    return [
        *shared_warnings(store),
        *(text for name in others for text in size_warnings(store[name], kind)),
        *class_warnings(store, others, kind),
        *class_warnings(store, [name for name in store.splits if name == "train"], kind, UNLEARNED),
    ]


# -- everything, for `cli inspect` ---------------------------------------------------------------------------------


def describe_store(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Manifest, completeness, splits, arrays, shapes, bytes a sample and in all. Complete or not.

    Raises StoreError when there is no store.
    """
    store = open_store(path, allow_incomplete=True)
    described: dict[str, Any] = {
        "path": store.location,
        "complete": store.manifest.complete,
        "fingerprint": store.fingerprint if store.manifest.complete else None,
        "manifest": store.manifest.model_dump(mode="json"),
        "splits": {name: describe_split(split) for name, split in store.items()},
        "pending": describe_pending(store),
    }
    if not is_url(store.location):
        measured = store.path / MEASURED_FILE
        described["measured"] = read_json(measured) if measured.exists() else {}
    described["bytes"] = sum(split["bytes"] for split in described["splits"].values())
    described["bytes_on_disk"] = None if is_url(store.location) else bytes_on_disk(store.path)
    return described


def bytes_on_disk(folder: Path) -> int:
    """All files together, keys, padding, indices and metadata included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe_split(split: Split) -> dict[str, Any]:
    arrays = {name: describe_array(split, name) for name in sorted(split.names)}
    described: dict[str, Any] = {"rows": len(split), "arrays": arrays}
    if "valid" in split.names:
        described["invalid_rows"] = int(np.count_nonzero(~split.valid))
        first = np.flatnonzero(~split.valid)[:SHOWN_REASONS].tolist()
        described["reasons"] = {split.keys[row]: split.reason(row) for row in first}
    described["bytes"] = sum(array["bytes"] for array in arrays.values())
    described["bytes_per_sample"] = described["bytes"] / max(1, len(split))
    return described


def describe_array(split: Split, name: str) -> dict[str, Any]:
    """Bytes are those of the rows; of a compressed array, those of its files."""
    layout = split.array(name).layout
    spec: ArraySpec | None = split.specs.get(name)
    size = layout.rows * layout.row_bytes
    if layout.codec != "none" and not is_url(split.location):
        size = bytes_on_disk(split.path / name / "c")
    return {
        "shape": list(layout.shape),
        "dtype": layout.dtype.name,
        "ragged": bool(spec and spec.ragged),
        "codec": layout.codec,
        "encoding": spec.encoding if spec else "plain",
        "bytes": size,
        "bytes_per_sample": size / max(1, len(split)),
    }


def describe_pending(store: Store) -> dict[str, dict[str, list[int]]]:
    """job → split → [committed rows, rows] of what is being written."""
    if is_url(store.location):
        return {}
    # Samples that are encoded for a new version of the store, and further teachers' features.
    work = {"new samples": store.path / WORK_FOLDER / ROWS_STORE}
    work |= {f"teacher {name}": addition_path(store.path, name) for name in pending_additions(store.path)}
    return {
        what or job: {split: list(done) for split, done in progress(folder, load_job(folder, job)).items()}
        for what, folder in {"": store.path, **work}.items()
        for job in pending_jobs(folder)
    }
