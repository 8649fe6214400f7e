"""What is in a store, as plain data for `cli inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from store.files import read_json
from store.format import MEASURED_FILE, WORK_FOLDER, ArraySpec
from store.job import ROWS_STORE, load_job, pending_jobs, progress
from store.location import is_url
from store.reader import Split, Store, open_store


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
        described["reasons"] = reasons_of(split)
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


def reasons_of(split: Split, limit: int = 5) -> dict[str, str]:
    """key → reason of the first invalid rows."""
    rows = np.flatnonzero(~split.valid)[:limit].tolist()
    return {split.keys[row]: split.reason(row) for row in rows}


def describe_pending(store: Store) -> dict[str, dict[str, list[int]]]:
    """job → split → [committed rows, rows] of what is being written."""
    if is_url(store.location):
        return {}
    rows = store.path / WORK_FOLDER / ROWS_STORE  # samples that are encoded for a new version of the store
    return {
        name if folder == store.path else "new samples": {
            split: list(done) for split, done in progress(folder, load_job(folder, name)).items()
        }
        for folder in (store.path, rows)
        for name in pending_jobs(folder)
    }
