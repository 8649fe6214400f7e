"""The plan: which key has which row in which split, and where batches are cut.

One process makes it and writes it into the new store; every writer reads it from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from store.errors import StoreError
from store.keys import KeyTable


@dataclass(frozen=True)
class Plan:
    """Ordered keys per split. Row number = position. Batches start anew at every shard.

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


def batches(start: int, stop: int, batch_rows: int, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Batches (first row, end row) of the rows [start, stop), cut at every shard's start.

    Resuming at any cut gives the remaining cuts unchanged.
    """
    row = start
    while row < stop:
        shard_start = row - row % shard_rows
        within = row - shard_start
        end = min(stop, shard_start + min(shard_rows, within - within % batch_rows + batch_rows))
        yield row, end
        row = end
