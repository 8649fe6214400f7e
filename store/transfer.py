"""Copy a store's rows, block by block, into a new store: the way in from HDF5 and between encodings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from store.create import check_free, create_store
from store.files import disk_errors, sync_folder
from store.finalize import finalize_store
from store.format import OWN_ARRAYS, REASONS, VALID, ArraySpec, Manifest
from store.keys import KeyTable
from store.metadata import parse_manifest, read_root, write_manifest
from store.plan import Plan
from store.writer import StoreWriter

BLOCK_BYTES = 32 * 1024 * 1024

Block = dict[str, Any]  # array → stored values [b, ...], or a list of b entries for a ragged array


class RowSource(Protocol):
    """Where rows come from: a store, or an HDF5 file of one."""

    manifest: Manifest

    @property
    def scales(self) -> Mapping[str, np.ndarray]: ...
    def keys(self, split: str) -> KeyTable: ...
    def block(self, split: str, start: int, stop: int) -> Block: ...


def blocks(specs: Sequence[ArraySpec], rows: int, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about 32 MB, for copying with bounded memory."""
    row_bytes = sum(spec.row_bytes * (64 if spec.ragged else 1) for spec in specs)
    step = min(shard_rows, 1024, max(1, BLOCK_BYTES // max(1, row_bytes)))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def copy_store(
    source: RowSource,
    target: Path,
    specs: Sequence[ArraySpec],
    *,
    convert: Callable[[Block], Block] | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
    centers: Mapping[str, np.ndarray] | None = None,
    finish: Callable[[Path], None] | None = None,
    statistics: bool = True,
) -> None:
    """Write all rows of `source` as a new store of `specs`; it appears under its name when it is whole.

    convert: what to do with each block of stored values on the way.
    finish: what else to write into the store before it appears.
    """
    check_free(target)
    building = target.with_name(f".{target.name}.converting")
    shutil.rmtree(building, ignore_errors=True)
    manifest = source.manifest
    plan = Plan(
        {split: source.keys(split) for split in manifest.splits},
        batch_rows=manifest.batch_rows,
        shard_rows=manifest.shard_rows,
    )
    mine = [spec for spec in specs if spec.name not in OWN_ARRAYS]
    create_store(building, manifest, plan, mine, scales=scales or source.scales, centers=centers)
    for split, rows in manifest.splits.items():
        copy_split(source, building, split, specs, rows, convert)
    finalize_store(building, statistics=statistics)
    write_manifest(building, with_added(building, manifest))
    if finish is not None:
        finish(building)
    with disk_errors(target):
        os.rename(building, target)
        sync_folder(target.parent)


def copy_split(
    source: RowSource,
    target: Path,
    split: str,
    specs: Sequence[ArraySpec],
    rows: int,
    convert: Callable[[Block], Block] | None,
) -> None:
    with StoreWriter(target, split) as writer:
        for start, stop in blocks(specs, rows, source.manifest.shard_rows):
            block = source.block(split, start, stop)
            valid = block.pop(VALID)
            reasons = [bytes(np.asarray(text)).decode() for text in block.pop(REASONS)]
            if convert is not None:
                block = convert(block)
            writer.append(block, valid=valid, reasons=reasons, stored=True)


def with_added(store: Path, original: Manifest) -> Manifest:
    """The new store's manifest, with the original's memory of arrays that were added later."""
    manifest = parse_manifest(read_root(store), str(store))
    names = {spec.name for spec in manifest.arrays}
    added = tuple(name for name in original.added if name in names)
    return manifest.model_copy(update={"added": added, "software": original.software})
