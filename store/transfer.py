"""Copy a store's rows, block by block, into a new store: the way in from HDF5 and between encodings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from store.create import check_free, create_store, new_folder
from store.errors import StoreError
from store.finalize import finalize_store
from store.format import OWN_ARRAYS, REASONS, VALID, ArraySpec, Manifest
from store.keys import KeyTable, Plan
from store.metadata import parse_manifest, read_root, write_manifest
from store.writer import StoreWriter

BLOCK_BYTES, BLOCK_ROWS = 32 * 1024 * 1024, 1024

Block = dict[str, Any]  # array → stored values [b, ...], or a list of b entries for a ragged array


class RowSource(Protocol):
    """Where rows come from: a store, or an HDF5 file of one."""

    manifest: Manifest

    @property
    def scales(self) -> Mapping[str, np.ndarray]: ...
    def keys(self, split: str) -> KeyTable: ...
    def block(self, split: str, start: int, stop: int) -> Block: ...
    def slice(self, split: str, name: str, start: int, stop: int) -> np.ndarray: ...


def blocks(source: RowSource, split: str) -> Iterator[tuple[int, int]]:
    """Row ranges of about 32 MB, ragged entries included: copying takes bounded memory."""
    specs, rows = source.manifest.arrays, source.manifest.splits[split]
    fixed = sum(spec.row_bytes for spec in specs if not spec.ragged)
    start = 0
    while start < rows:
        stop = min(rows, start + BLOCK_ROWS)
        ends = np.arange(stop - start + 1) * fixed
        for spec in specs:
            if spec.ragged:
                offsets = source.slice(split, spec.offsets_name, start, stop + 1)
                ends += (offsets - offsets[0]) * spec.row_bytes
        fit = int(np.searchsorted(ends, BLOCK_BYTES, side="right")) - 1
        yield start, start + max(1, fit)
        start += max(1, fit)


def copy_store(
    source: RowSource,
    target: Path,
    specs: Sequence[ArraySpec],
    *,
    convert: Callable[[Block], Block] | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
    centers: Mapping[str, np.ndarray] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write all rows of `source` as a new store of `specs`; it appears under its name when it is whole.

    convert: what to do with each block of stored values on the way.
    finish: what else to write into the store before it appears.
    """
    check_free(target)
    manifest = source.manifest
    plan = Plan(
        {split: source.keys(split) for split in manifest.splits},
        batch_rows=manifest.batch_rows,
        shard_rows=manifest.shard_rows,
    )
    mine = [spec for spec in specs if spec.name not in OWN_ARRAYS]
    with new_folder(target) as building:
        create_store(building, manifest, plan, mine, scales=scales or source.scales, centers=centers)
        for split in manifest.splits:
            copy_split(source, building, split, convert)
        finalize_store(building)
        write_manifest(building, with_added(building, manifest))
        if finish is not None:
            finish(building)


def copy_split(source: RowSource, target: Path, split: str, convert: Callable[[Block], Block] | None) -> None:
    with StoreWriter(target, split) as writer:
        for start, stop in blocks(source, split):
            block = source.block(split, start, stop)
            valid = np.asarray(block.pop(VALID))
            reasons = [bytes(np.asarray(text)).decode() for text in block.pop(REASONS)]
            if convert is not None:
                block = convert(block)
            lost = np.flatnonzero(valid & ~writer.append(block, valid=valid, reasons=reasons, stored=True))
            if len(lost):
                raise StoreError(
                    f"{target} {split}: row {start + lost[0]} has features that are not finite, or too large in "
                    "the new form; check the source with `cli verify`, or choose another form"
                )


def with_added(store: Path, original: Manifest) -> Manifest:
    """The new store's manifest, with the original's memory of arrays that were added later.

    The digest is the original's: the data are the same, whichever version of this program made it.
    """
    manifest = parse_manifest(read_root(store), str(store))
    names = {spec.name for spec in manifest.arrays}
    added = tuple(name for name in original.added if name in names)
    update = {"added": added, "software": original.software, "digest": original.digest or manifest.digest}
    return manifest.model_copy(update=update)
