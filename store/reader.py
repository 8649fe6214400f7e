"""Read a store: look rows up by key, gather stored values by row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from store.arrays import RowArray, open_array
from store.errors import RowRangeError, StoreError, UnknownNameError
from store.format import (
    COMPONENTS,
    KEY_HASHES,
    KEY_OFFSETS,
    KEY_ROWS,
    KEY_VALUES,
    REASONS,
    TEACHERS,
    TOKEN_SCALE,
    VALID,
    ArraySpec,
    Manifest,
    Model,
    Preprocessing,
    TeacherSpec,
    of_one_teacher,
    teacher_of,
    valid_array,
)
from store.job import describe_progress
from store.keys import KeyTable
from store.metadata import is_url, parse_manifest, read_root, to_json

if TYPE_CHECKING:
    from store.mirror import Mirror


@dataclass(frozen=True)
class Statistics:
    """Per channel, in true units, over valid rows: mean and std [D] float32."""

    mean: np.ndarray
    std: np.ndarray
    count: int


def open_store(
    path: str | os.PathLike[str],
    *,
    teacher: TeacherSpec | None = None,
    preprocessing: Preprocessing | None = None,
    allow_incomplete: bool = False,
) -> Store:
    """Open a store for reading; `path` is a folder, or a URL that fsspec knows, whose shards are kept here (mirror.py).

    teacher, preprocessing: what the store must have been made with, when given.
    Raises StoreError for what is no store, has another format version, is incomplete (how far it got), or
    was made otherwise than asked for (the fields that differ, with both values).
    """
    mirror = None
    if is_url(path):
        from store.mirror import Mirror

        location = os.fspath(path).rstrip("/")
        mirror = Mirror(location)
        root = mirror.root
    else:
        location = os.path.abspath(path)
        root = read_root(Path(location))
    manifest = parse_manifest(root, str(path))
    if not manifest.complete and not allow_incomplete:
        raise incomplete(location, manifest)
    check_same(str(path), teacher, manifest.teacher, "teacher")
    check_same(str(path), preprocessing, manifest.preprocessing, "preprocessing")
    nodes = root.get("consolidated_metadata", {}).get("metadata", {})
    return Store(location, manifest, nodes, mirror)


def incomplete(location: str, manifest: Manifest) -> StoreError:
    """The error for a store whose extraction has not ended."""
    data = manifest.data_root or "DATA"
    progress = "" if is_url(location) else f": {describe_progress(Path(location))}"
    return StoreError(
        f"{location}: incomplete{progress}; the command that began it resumes it, with all its options: "
        f"cli extract {data} --out {location} …"
    )


def check_same(where: str, asked: Model | None, have: Model, what: str) -> None:
    """Raises StoreError naming every field that differs, with both values."""
    if asked is None or asked == have:
        return
    mine, theirs = have.model_dump(), asked.model_dump()
    differences = [
        f"{name}: store has {mine[name]!r}, asked for {theirs[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    ]
    raise StoreError(f"{where}: made with another {what}: {'; '.join(differences)}; extract into a new store")


class Store(Mapping[str, "Split"]):
    """A store's manifest and its splits: `store["train"]`."""

    def __init__(
        self, location: str, manifest: Manifest, nodes: dict[str, Any], mirror: Mirror | None = None
    ) -> None:
        self.location, self.manifest = location, manifest
        self._nodes, self._mirror = nodes, mirror
        self.whole = self  # of what `of_teacher` gives: the store with all arrays
        self.teacher_name = manifest.teacher.name
        self._splits = {name: Split(location, name, manifest, nodes, mirror) for name in manifest.splits}

    def of_teacher(self, name: str) -> Store:
        """The store as if this teacher were its only one: its manifest, and its arrays under the first one's names.

        Raises StoreError naming the store's teachers.
        """
        whole = self.whole
        if name == whole.teacher_name:
            return whole
        if name not in whole.manifest.teachers:
            raise StoreError(
                f"{self.location}: no teacher {name!r}; it has {', '.join(whole.manifest.teacher_names)}"
            )
        seen = Store(self.location, whole.manifest.of_teacher(name), self._nodes, self._mirror)
        seen.whole, seen.teacher_name = whole, name
        for split_name, split in whole.items():
            seen[split_name].see_teacher(f"{TEACHERS}{name}/", split)
        return seen

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        return Path(self.location)

    def __fspath__(self) -> str:
        """The folder or URL, so that a store can be given wherever its path can."""
        return self.location

    @property
    def splits(self) -> list[str]:
        return list(self._splits)

    @property
    def fingerprint(self) -> str:
        """blake2b-128 of what the store is made from: data, teacher, preprocessing, classes."""
        fields = {"format_version", "teacher", "preprocessing", "class_names", "digest", "splits"}
        content = self.manifest.model_dump(mode="json", include=fields)
        return blake2b(to_json(content), digest_size=16).hexdigest()

    def require_plain(self, purpose: str) -> None:
        """Raises StoreError for a packed store."""
        packed = [spec.name for spec in self.manifest.arrays if spec.encoding != "plain"]
        if packed:
            raise StoreError(f"{self.location}: {packed} are packed; {purpose} needs the original store")

    def __getitem__(self, split: str) -> Split:
        if split not in self._splits:
            raise UnknownNameError(f"{self.location}: no split {split!r}; valid: {self.splits}")
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def __repr__(self) -> str:
        return f"Store({self.location!r}, { ({name: len(split) for name, split in self.items()}) })"


class Split:
    """One split: `len(split)` rows, found by key, read by row.

    Safe to share between threads, to fork and to pickle. Rows may come in any order and more than once.
    """

    def __init__(
        self,
        location: str,
        name: str,
        manifest: Manifest,
        nodes: dict[str, Any],
        mirror: Mirror | None = None,
    ) -> None:
        self.location, self.name, self.mirror = location, name, mirror
        self.specs: dict[str, ArraySpec] = {spec.name: spec for spec in manifest.arrays}
        self._rows = manifest.splits[name]
        self._metadata = {
            node.removeprefix(f"{name}/"): metadata
            for node, metadata in nodes.items()
            if node.startswith(f"{name}/") and metadata["node_type"] == "array"
        }
        self._stored: dict[str, str] = {}  # name → name in the store, where they differ
        self._whole: Split | None = None
        self._arrays: dict[str, RowArray] = {}

    def see_teacher(self, prefix: str, whole: Split) -> None:
        """From now on, show a further teacher's arrays under the first one's names; `whole` is the split with all arrays."""
        seen: dict[str, str] = {}
        for name in self._metadata:
            owner, own = teacher_of(name)
            if owner == prefix or not (owner or of_one_teacher(name)):
                seen[own] = name
        self._metadata = {name: self._metadata[stored] for name, stored in seen.items()}
        self._stored, self._whole = seen, whole

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        return f"Split({self.where!r}, {len(self)} rows, {self.names})"

    @property
    def path(self) -> Path:
        """The folder of a local split."""
        return Path(self.location) / self.name

    @property
    def where(self) -> str:
        return f"{self.location} {self.name}"

    @property
    def names(self) -> list[str]:
        """The arrays that `gather`, `ragged` and `read` know."""
        return [name for name in self._metadata if not name.startswith("keys/")]

    @cached_property
    def keys(self) -> KeyTable:
        """Keys in row order: a sequence of str, memory-mapped where that is possible."""
        arrays = [self.array(name) for name in (KEY_VALUES, KEY_OFFSETS, KEY_HASHES, KEY_ROWS)]
        return KeyTable(*(array.slice(0, len(array)) for array in arrays))

    @cached_property
    def valid(self) -> np.ndarray:
        """[N] bool: false for a bad image. Skip those rows."""
        own = self.read(VALID)
        return own if self._whole is None else own & self._whole.valid

    def stored_name(self, name: str) -> str:
        """The name of an array in the store; of a further teacher with its prefix."""
        return self._stored.get(name, name)

    def valid_for(self, array: str) -> np.ndarray:
        """[N] bool: rows of an array that hold features; of a further teacher, `valid` of its own."""
        own = valid_array(array)
        return self.valid if own == VALID else self.read(own)

    @cached_property
    def scale(self) -> dict[str, np.ndarray]:
        """array → [D] float32 powers of two: true value = stored value × scale.

        Packed arrays (int8, PCA) have none here: read those with `gather_features`.
        """
        return {
            name: np.array(metadata["attributes"]["scale"], np.float32)
            for name, metadata in self._metadata.items()
            if not self.packed(name) and "scale" in metadata["attributes"]
        }

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """array → mean and std [D] float32, true units, over valid rows."""
        found = {}
        for name, metadata in self._metadata.items():
            entry = metadata["attributes"].get("statistics")
            if entry:
                mean, std = np.array(entry["mean"], np.float32), np.array(entry["std"], np.float32)
                found[name] = Statistics(mean, std, entry["count"])
        return found

    def rows_of(self, keys: Iterable[str]) -> np.ndarray:
        """Rows [B] int64 of the keys. Raises KeyError naming an unknown key."""
        return self.keys.rows_of(keys, self.where)

    def gather(
        self,
        rows: Sequence[int] | np.ndarray,
        names: Sequence[str],
        out: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Stored values of the rows: name → [B, ...].

        out: name → C-contiguous [B, ...] buffers of the stored dtype to fill; without, new arrays are
            made, which costs up to half the speed for large rows.
        Raises IndexError for a row out of range, KeyError for an unknown array.
        """
        index = self._checked(rows)
        batch = {}
        for name in names:
            array = self.array(name)
            if name in self.specs and self.specs[name].ragged:
                raise UnknownNameError(f"{self.where}: {name!r} is ragged; read it with ragged()")
            target = self._target(name, (len(index), *array.layout.row_shape), array.layout.dtype, out)
            array.take(index, target)
            batch[name] = target
        return batch

    def gather_features(
        self,
        rows: Sequence[int] | np.ndarray,
        names: Sequence[str],
        out: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Like `gather`, except that packed arrays come in true units, float32.

        So for every array: true value = what this returns × scale, where `scale` has the array, else × 1.
        """
        packed = [name for name in names if self.packed(name)]
        batch = self.gather(rows, [name for name in names if name not in packed], out)
        for name in packed:
            values = self.true_values(rows, name)
            if out is not None:
                self._target(name, values.shape, values.dtype, out)[...] = values
            batch[name] = values if out is None else out[name]
        return batch

    def packed(self, name: str) -> bool:
        """Whether an array holds something else than values and a scale a channel."""
        return name in self.specs and self.specs[name].encoding != "plain"

    def true_values(self, rows: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
        """Features of the rows in true units, [B, ..., D] float32, however they are stored."""
        stored = self.gather(rows, [name])[name].astype(np.float32)
        attributes = self._metadata[name]["attributes"]
        if name + TOKEN_SCALE in self._metadata:
            stored *= self.gather(rows, [name + TOKEN_SCALE])[name + TOKEN_SCALE][..., None]
        if "scale" in attributes:
            stored *= np.array(attributes["scale"], np.float32)
        if name + COMPONENTS in self._metadata:
            components = self.array(name + COMPONENTS)  # [k, D]: the projection back to the teacher's width
            stored = stored @ components.slice(0, len(components))
        if "center" in attributes:
            stored += np.array(attributes["center"], np.float32)
        return stored

    def ragged(self, rows: Sequence[int] | np.ndarray, name: str) -> list[np.ndarray]:
        """The entries [n, ...] of each row, stored values."""
        index = self._checked(rows)
        values = self.array(name)
        if name not in self.specs or not self.specs[name].ragged:
            raise UnknownNameError(f"{self.where}: {name!r} is not ragged; read it with gather()")
        offsets = self.array(self.specs[name].offsets_name)
        starts, ends = (np.empty(len(index), np.int64) for _ in range(2))
        offsets.take(index, starts)
        offsets.take(index + 1, ends)
        return [
            np.array(values.slice(start, end))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]

    def read(self, name: str) -> np.ndarray:
        """A whole array in memory; for small ones (`valid`, `sizes`, labels, offsets)."""
        array = self.array(name)
        return np.array(array.slice(0, len(array)))

    def prefetch(self, rows: Sequence[int] | np.ndarray, names: Sequence[str]) -> None:
        """Ask the system to read these rows soon, for a cold page cache. Returns at once."""
        index = self._checked(rows)
        for name in names:
            self.array(name).prefetch(index)

    def reason(self, row: int) -> str:
        """Why a row is invalid; empty for a valid one."""
        return bytes(self.ragged([row], REASONS)[0]).decode()

    def array(self, name: str) -> RowArray:
        """One array, opened when it is first asked for. Raises KeyError for an unknown one."""
        array = self._arrays.get(name)
        if array is None:
            if name not in self._metadata:
                raise UnknownNameError(f"{self.where}: no array {name!r}; valid: {self.names}")
            opened: RowArray
            stored = self.stored_name(name)
            if self.mirror is not None:
                opened = self.mirror.open_array(self.name, stored, self._metadata[name])
            else:
                opened = open_array(self.location, self.name, stored, self._metadata[name])
            array = self._arrays.setdefault(name, opened)
        return array

    def _checked(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        index = np.asarray(rows)
        if index.size == 0:
            return np.empty(0, np.int64)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise RowRangeError(
                f"{self.where}: rows are {index.ndim}-d {index.dtype}, expected a list of integers"
            )
        if index.dtype != np.int64:
            index = index.astype(np.int64)
        # argmin and argmax take a tenth of min's and max's time, which is a tenth of a whole batch's.
        if index.item(index.argmin()) < 0 or index.item(index.argmax()) >= self._rows:
            bad = int(index[(index < 0) | (index >= self._rows)][0])
            raise RowRangeError(f"{self.where}: row {bad} is out of range: {self._rows} rows")
        return index

    def _target(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, out: Mapping[str, np.ndarray] | None
    ) -> np.ndarray:
        if out is None:
            return np.empty(shape, dtype)
        if name not in out:
            raise StoreError(f"gather {name}: no buffer for it in out, which has {sorted(out)}")
        target = out[name]
        if target.shape != shape or target.dtype != dtype:
            raise StoreError(
                f"gather {name}: buffer is {target.shape} {target.dtype}, expected {shape} {dtype}"
            )
        return target

    def __getstate__(self) -> dict[str, Any]:
        cached = ("keys", "valid")  # Large or memory-mapped: read again on the other side.
        return {key: value for key, value in self.__dict__.items() if key not in cached}
