"""Sample keys as arrays (UTF-8 bytes, offsets, a sorted hash index), and the plan: which key has which row.

The hash index finds a row without reading the keys, in a store of ten million samples as well. One process makes the
plan and writes the keys into the new store; every writer reads them from there.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from store.arrays import MappedArray
from store.errors import RowRangeError, StoreError, UnknownNameError
from store.format import COMMITS_FOLDER, KEY_HASHES, KEY_OFFSETS, KEY_ROWS, KEY_VALUES, ArraySpec
from store.metadata import write_array_metadata, write_json
from store.shards import ArrayWriter, Layout


def key_hash(key: str) -> int:
    """blake2b-64 of the key's UTF-8 bytes."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class KeyTable(Sequence[str]):
    """Keys in row order, as arrays (in memory or memory-mapped). Behaves as a sequence of str.

    values [M] uint8, offsets [N+1] int64, hashes [N] uint64 ascending, rows [N] int64.
    """

    values: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    rows: np.ndarray

    @classmethod
    def build(cls, keys: Iterable[str], where: str = "plan") -> KeyTable:
        """Encode keys and check that none comes twice. Raises StoreError naming the doubled key."""
        data = bytearray()
        ends, hashes = array("q", [0]), array("Q")  # 8 bytes a key, where a list takes 40
        for key in keys:
            try:
                encoded = key.encode()
            except UnicodeEncodeError as error:
                raise StoreError(f"{where}: key {key!r} is not valid Unicode; rename the file") from error
            data += encoded
            ends.append(len(data))
            hashes.append(int.from_bytes(blake2b(encoded, digest_size=8).digest(), "little"))
        unsorted = np.frombuffer(hashes, dtype=np.uint64)
        rows = np.argsort(unsorted, kind="stable").astype(np.int64)
        table = cls(np.frombuffer(data, np.uint8), np.frombuffer(ends, np.int64), unsorted[rows], rows)
        table.check_unique(where)
        return table

    def check_unique(self, where: str) -> None:
        """Raises StoreError when two rows have one key. Equal hashes alone are no proof."""
        for first in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]):
            same = np.flatnonzero(self.hashes == self.hashes[first])
            names = [self[int(row)] for row in self.rows[same]]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                rows = [int(row) for row in self.rows[same] if self[int(row)] == twice]
                raise StoreError(
                    f"{where}: key {twice!r} stands for rows {rows}; every sample needs its own key"
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise RowRangeError(f"row {row} out of range: {len(self)} keys")
        row %= len(self)
        return bytes(self.values[self.offsets[row] : self.offsets[row + 1]]).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            stop = min(len(self), start + 4096)
            ends = self.offsets[start : stop + 1].tolist()
            data = bytes(self.values[ends[0] : ends[-1]])
            for first, last in pairwise(ends):
                yield data[first - ends[0] : last - ends[0]].decode()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) is not None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, KeyTable):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.values, other.values)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def find(self, key: str) -> int | None:
        """The key's row, or None."""
        wanted = np.uint64(key_hash(key))
        place = int(np.searchsorted(self.hashes, wanted))
        while place < len(self) and self.hashes[place] == wanted:
            row = int(self.rows[place])
            if self[row] == key:
                return row
            place += 1
        return None

    def rows_of(self, keys: Iterable[str], where: str = "store") -> np.ndarray:
        """Row numbers [B] int64 of the keys. Raises KeyError naming the first unknown key."""
        rows = []
        for key in keys:
            row = self.find(key)
            if row is None:
                raise UnknownNameError(f"{where}: no key {key!r} among {len(self)} keys")
            rows.append(row)
        return np.array(rows, dtype=np.int64)


@dataclass(frozen=True)
class Plan:
    """Ordered keys per split. Row number = position. Every shard starts a new batch.

    `splits` takes any iterables of str (or ready KeyTables); `batch_rows` is the extractor's batch size,
    fixed for the whole store so that a resumed run encodes the very same batches.
    `shard_rows` None lets the store choose about 160 MB a shard of its largest array; a smaller power of
    two makes more, smaller units for parallel writers.
    """

    splits: Mapping[str, Iterable[str]]
    batch_rows: int = 32
    shard_rows: int | None = None
    tables: dict[str, KeyTable] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise StoreError(f"plan: batch_rows is {self.batch_rows}, expected at least 1")
        if self.shard_rows is not None and (self.shard_rows < 1 or self.shard_rows & (self.shard_rows - 1)):
            raise StoreError(f"plan: shard_rows is {self.shard_rows}, expected a power of two")
        for name, keys in self.splits.items():
            if not re.fullmatch(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*", name):
                raise StoreError(f"plan: split name {name!r}: use letters, digits, '_', '-' and '.'")
            table = keys if isinstance(keys, KeyTable) else KeyTable.build(keys, f"split {name!r}")
            self.tables[name] = table


KEY_SPECS = {
    KEY_VALUES: ArraySpec(name=KEY_VALUES, dtype="uint8"),
    KEY_OFFSETS: ArraySpec(name=KEY_OFFSETS, dtype="int64"),
    KEY_HASHES: ArraySpec(name=KEY_HASHES, dtype="uint64"),
    KEY_ROWS: ArraySpec(name=KEY_ROWS, dtype="int64"),
}


def write_keys(folder: Path, split: str, table: KeyTable) -> None:
    """The key arrays of a split, and their checksums in `.commits/<split>.keys.json`."""
    arrays = {
        KEY_VALUES: table.values,
        KEY_OFFSETS: table.offsets,
        KEY_HASHES: table.hashes,
        KEY_ROWS: table.rows,
    }
    checksums = {}
    for name, values in arrays.items():
        spec = KEY_SPECS[name]
        layout = Layout.of(spec, len(values), 0)
        writer = ArrayWriter(folder / split / name, layout)
        writer.append(np.ascontiguousarray(values, dtype=spec.dtype).tobytes())
        checksums[name] = writer.close()
        write_array_metadata(folder / split, name, layout, {})
    (folder / COMMITS_FOLDER).mkdir(exist_ok=True)
    write_json(folder / COMMITS_FOLDER / f"{split}.keys.json", checksums)


def open_keys(split: Path) -> KeyTable:
    """The memory-mapped keys of a split's folder."""
    arrays = [MappedArray.open(split, name) for name in (KEY_VALUES, KEY_OFFSETS, KEY_HASHES, KEY_ROWS)]
    return KeyTable(*(array.slice(0, len(array)) for array in arrays))
