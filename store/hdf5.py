"""A store as one HDF5 file, and back: lossless, block by block, readable by plain h5py.

The file has the store's own tree: `/train/features/pooled` and so on, with `scale` and `statistics` as
attributes (float32), and the manifest as JSON in the root's attribute `manifest`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from files.writing import replacing
from store.errors import StoreError, disk_errors
from store.format import FORMAT_VERSION, KEY_OFFSETS, KEY_VALUES, ArraySpec, Manifest
from store.hdf5_file import MAX_ROW_BYTES, Hdf5Error, find_dataset, open_hdf5_file
from store.keys import KEY_SPECS, KeyTable
from store.reader import Store, open_store
from store.shards import blocks
from store.transfer import Columns, copy_store

MOST_SHARD_ROWS = 1 << 24  # of a file from elsewhere: a shard's index is made in memory


def store_to_hdf5(path: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Write a complete store into one new HDF5 file, which appears when it is whole.

    Raises StoreError when the file exists or the store cannot be read.
    """
    target = Path(file)
    with disk_errors(target):
        taken = target.exists()
    if taken:
        raise StoreError(f"{target}: exists; choose another name or delete it")
    store = open_store(path)
    store.require_plain("conversion to HDF5")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            write_hdf5(store, partial)


def write_hdf5(store: Store, path: Path) -> None:
    """The file's content."""
    import h5py

    with h5py.File(path, "w") as out:
        out.attrs["manifest"] = store.manifest.model_dump_json()
        out.attrs["fingerprint"] = store.fingerprint
        for split in store.values():
            for name in [*split.names, *KEY_SPECS]:
                array = split.array(name)
                layout = array.layout
                dataset = out.create_dataset(f"{split.name}/{name}", shape=layout.shape, dtype=layout.dtype)
                for start, stop in blocks(0, len(array), layout.row_bytes):
                    dataset[start:stop] = array.slice(start, stop)
                if name in split.scale:
                    dataset.attrs["scale"] = split.scale[name]
                if name in split.statistics:
                    dataset.attrs["mean"] = split.statistics[name].mean
                    dataset.attrs["std"] = split.statistics[name].std


def hdf5_to_store(file: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Make a new store from a file of `store_to_hdf5`.

    Raises StoreError when the file is not one, is damaged, or the store's path is taken.
    """
    source = Path(file)
    if not source.exists():
        raise StoreError(f"{source}: no such file")
    try:
        opened = open_hdf5_file(source)
    except Hdf5Error as error:
        raise StoreError(f"{source}: {error}") from error
    with opened:
        rows = Hdf5Rows(opened, source)
        copy_store(rows, Path(path), rows.manifest.arrays)
    found = open_store(path).fingerprint
    if found != rows.fingerprint:
        raise StoreError(
            f"{source}: the store that it makes has the fingerprint {found}, the one that it was made from "
            f"{rows.fingerprint}; the file is damaged"
        )


def read_manifest(text: Any, path: Path) -> Manifest:
    """The manifest in a file's attribute. Raises StoreError for another version and for what is damaged."""
    try:
        content = json.loads(text)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")
        manifest = Manifest.model_validate(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: manifest is damaged: {' '.join(str(error).split())[:300]}") from error
    if manifest.shard_rows > MOST_SHARD_ROWS:
        raise StoreError(
            f"{path}: manifest is damaged: shards of {manifest.shard_rows:,} rows, at most {MOST_SHARD_ROWS:,}"
        )
    return manifest


class Hdf5Rows:
    """The RowSource over an HDF5 file."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path
        text = file.attrs.get("manifest")
        if text is None:
            raise StoreError(f"{path}: HDF5, but not made by `cli convert STORE FILE.h5` (no manifest in it)")
        self.manifest = read_manifest(text, path)
        self.fingerprint = str(file.attrs.get("fingerprint"))
        self.arrays: dict[str, Any] = {}
        for split, rows in self.manifest.splits.items():
            for spec in (*self.manifest.arrays, *KEY_SPECS.values()):
                self.check_array(split, spec, rows)
        first = next(iter(self.manifest.splits), "")
        self.scales = {spec.name: self.scale(first, spec) for spec in self.manifest.arrays if spec.scaled}

    def array(self, split: str, name: str) -> Any:
        """The data set. Raises StoreError when it is missing or is not read (see `find_dataset`)."""
        where = f"{split}/{name}"
        if where not in self.arrays:
            try:
                found = find_dataset(self.file, where)
            except Hdf5Error as error:
                raise StoreError(f"{self.path}: {error}") from None
            if found is None:
                raise StoreError(f"{self.path}: data set {where} is missing; the file is damaged")
            self.arrays[where] = found
        return self.arrays[where]

    def check_array(self, split: str, spec: ArraySpec, rows: int) -> None:
        """Compare a data set with the manifest, before any of its values is read. Raises StoreError."""
        array = self.array(split, spec.name)
        if spec.name == KEY_OFFSETS:
            rows += 1
        ragged = spec.ragged or spec.name == KEY_VALUES
        expected = (len(array) if ragged else rows, *spec.row_shape)
        if array.shape != expected or array.dtype != np.dtype(spec.dtype):
            raise StoreError(
                f"{self.path}: {split}/{spec.name} is {array.dtype} {list(array.shape)}, its manifest has "
                f"{spec.dtype} {list(expected)}; the file is damaged"
            )
        if spec.ragged:
            self.check_offsets(split, spec, rows, len(array))

    def check_offsets(self, split: str, spec: ArraySpec, rows: int, entries: int) -> None:
        """Raises StoreError unless the offsets divide `entries` among `rows` rows of a possible size."""
        offsets = self.array(split, spec.offsets_name)
        if offsets.shape != (rows + 1,) or offsets.dtype != np.int64:
            raise StoreError(
                f"{self.path}: {split}/{spec.offsets_name} is {offsets.dtype} {list(offsets.shape)}, expected "
                f"int64 [{rows + 1}]; the file is damaged"
            )
        values = offsets[:]
        lengths = np.diff(values)
        if values[0] != 0 or values[-1] != entries or (lengths < 0).any():
            raise StoreError(
                f"{self.path}: {split}/{spec.offsets_name} does not divide the {entries} entries of "
                f"{spec.name}; the file is damaged"
            )
        largest = int(lengths.max(initial=0)) * spec.row_bytes
        if largest > MAX_ROW_BYTES:
            raise StoreError(
                f"{self.path}: {split}/{spec.name} has a row of {largest:,} bytes: the limit is {MAX_ROW_BYTES:,}"
            )

    def scale(self, split: str, spec: ArraySpec) -> np.ndarray:
        found = self.array(split, spec.name).attrs.get("scale")
        if found is None:
            raise StoreError(f"{self.path}: {split}/{spec.name} has no attribute scale; the file is damaged")
        return np.asarray(found)

    def keys(self, split: str) -> KeyTable:
        return KeyTable(*(self.array(split, name)[:] for name in KEY_SPECS))

    def slice(self, split: str, name: str, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array(split, name)[start:stop])

    def block(self, split: str, start: int, stop: int) -> Columns:
        return {
            spec.name: self.entries(split, spec, start, stop)
            if spec.ragged
            else self.array(split, spec.name)[start:stop]
            for spec in self.manifest.arrays
        }

    def entries(self, split: str, spec: ArraySpec, start: int, stop: int) -> list[np.ndarray]:
        offsets = self.array(split, spec.offsets_name)[start : stop + 1]
        values = self.array(split, spec.name)[offsets[0] : offsets[-1]]
        return np.split(values, offsets[1:-1] - offsets[0])
