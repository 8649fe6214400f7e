"""A new version of a complete store: rows that stay keep their shard files, all others are copied together.

It is written to `.work/next.creating` while the store stays readable (a killed run's is deleted and written again), and
renamed `.work/next` when it is complete. `publish_version` then puts it in the store's place:

    .work/next/            the new version, complete, under the same layout as a store
    .work/rows/            a store of rows that were encoded for it
    .work/replaced/        what the switch has moved out of the way

A store is many files, and no file system renames them all at once, so the order of the steps makes it safe:

1. The old manifest is marked incomplete: from here on readers refuse the store instead of mixing two versions.
2. Each split, and `.commits`, is moved: the old one to `.work/replaced`, the new one from `.work/next`.
3. The new root `zarr.json` is moved last. It says complete, so its arrival is what completes the switch.

Each step can be seen to be done from what is in `.work/next` still: what is gone from there has been moved. So a
switch that was killed is finished by calling `publish_version` again, which skips those steps.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from files.writing import publish, sync_file, sync_folder
from store.errors import disk_errors
from store.finalize import Checksums, commit_record, digest_of, drop_job, remove_done, write_statistics
from store.format import (
    COMMITS_FOLDER,
    IMAGES_ENCODED,
    REASONS,
    SIZES,
    TARGETS,
    VALID,
    WORK_FOLDER,
    ArraySpec,
    Manifest,
    offsets_spec,
    own_specs,
    ragged_groups,
)
from store.job import CREATING, DONE, NEXT, REPLACED, ROWS_STORE, pending_jobs
from store.keys import KeyTable, write_keys
from store.locks import FOLDER, RowLock
from store.metadata import (
    ZARR_JSON,
    parse_manifest,
    read_json,
    read_root,
    write_array_metadata,
    write_group,
    write_json,
    write_manifest,
)
from store.reader import Split, Store
from store.shards import ArrayWriter, Layout, ShardFile, blocks

# File systems without hard links, and a file with too many of them.
CANNOT_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RaggedChange:
    """New entries of a ragged group: `rows` bool [N]: which rows have some; `read` gives a row's, by array name."""

    rows: np.ndarray
    read: Callable[[int], Values]


@dataclass(frozen=True)
class VersionSplit:
    """One split of the new version. Row i is row `row[i]` of `sources[source[i]]`, N rows in all.

    fixed: whole new arrays [N, …], such as labels. ragged: offsets' name → new entries.
    invalid: row → reason of rows that lose their features.
    """

    keys: KeyTable
    sources: Sequence[Split]
    source: np.ndarray
    row: np.ndarray
    fixed: Values
    ragged: Mapping[str, RaggedChange]
    invalid: Mapping[int, str]


def write_version(
    store: Store,
    manifest: Manifest,
    arrays: Sequence[ArraySpec],
    splits: Mapping[str, VersionSplit],
    *,
    notes: Callable[[Path], None] = lambda folder: None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Write a new version of `store` beside it; `publish_version` puts it in the store's place.

    arrays: all arrays of the new version. notes: writes further files into the new version's folder.
    between: called every few megabytes; may raise to stop.
    Raises StoreError for a packed store and for a disk that refuses.
    """
    store.require_plain("a new version")
    folder = next_folder(store.path, CREATING)
    specs = [*(spec for spec in arrays if spec.name not in (VALID, REASONS)), *own_specs()]
    with disk_errors(store.path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lock = RowLock(folder, None, 0, 0)
        try:
            for name, split in splits.items():
                SplitVersion(store, folder, name, split, specs, between).write()
            counts = {name: len(split.keys) for name, split in splits.items()}
            update = {
                "complete": True,
                "splits": counts,
                "arrays": tuple(sorted(specs, key=lambda spec: spec.name)),
                "added": tuple(name for name in store.manifest.added if name in {s.name for s in specs}),
                "shard_rows": store.manifest.shard_rows,
                "batch_rows": store.manifest.batch_rows,
                "software": store.manifest.software,
                "digest": digest_of(folder, list(counts)),
            }
            notes(folder)
            write_manifest(folder, manifest.model_copy(update=update))
        except BaseException:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        lock.release()
        shutil.rmtree(folder / FOLDER)
        os.rename(folder, next_folder(store.path))
        sync_folder(folder.parent)


def bytes_to_write(
    store: Store, arrays: Sequence[ArraySpec], splits: Mapping[str, VersionSplit], *, linked: bool
) -> int:
    """About how many bytes `write_version` will add to the disk; `linked`: see `can_link`."""
    total = 0
    for name, split in splits.items():
        writer = SplitVersion(store, store.path, name, split, [*arrays, *own_specs()])
        total += sum(writer.bytes_of(spec, linked) for spec in writer.specs)
    return total


def can_link(store: Path) -> bool:
    """Whether the store's file system has hard links."""
    first, second = (store / WORK_FOLDER / f"link{number}.partial" for number in (1, 2))
    with disk_errors(store):
        first.parent.mkdir(exist_ok=True)
        try:
            first.write_bytes(b"")
            second.unlink(missing_ok=True)
            os.link(first, second)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
            return False
        finally:
            first.unlink(missing_ok=True)
            second.unlink(missing_ok=True)
            remove_done(store)
    return True


class SplitVersion:
    """Writes one split of a new version into `folder`."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        name: str,
        version: VersionSplit,
        specs: Sequence[ArraySpec],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.version, self.specs, self.between = store, version, specs, between
        self.root, self.name, self.folder = folder, name, folder / name
        self.rows = len(version.keys)
        self.old = store.get(name)
        own = [
            index
            for index, source in enumerate(version.sources)
            if (source.location, source.name) == (store.location, name)
        ]
        self.own = own[0] if own else -1
        self.invalid = np.zeros(self.rows, bool)
        self.invalid[list(version.invalid)] = True
        # Rows that are where they were, with their features.
        self.stays = (version.source == self.own) & (version.row == np.arange(self.rows)) & ~self.invalid
        self.before: dict[str, Checksums] = {} if self.old is None else commit_record(store.path, name)
        self.record: dict[str, Checksums] = {}
        self.offsets_read: dict[tuple[int, str], np.ndarray] = {}

    def write(self) -> None:
        write_group(self.folder)
        write_keys(self.root, self.name, self.version.keys)
        for spec in self.specs:
            if spec.direct:
                self.write_direct(spec)
            elif not spec.ragged:
                self.write_small(spec)
        for offsets, group in ragged_groups(self.specs).items():
            self.write_ragged(offsets, group)
        write_json(self.root / COMMITS_FOLDER / f"{self.name}.json", dict(sorted(self.record.items())))
        for spec in self.specs:
            if spec.scaled and spec.encoding == "plain":
                self.write_statistics(spec)

    # -- arrays of fixed width --------------------------------------------------------------------

    def write_direct(self, spec: ArraySpec) -> None:
        layout = self.layout(spec, self.rows)
        record = []
        for shard in range(layout.shards):
            first = shard * layout.shard_rows
            end = first + layout.rows_in(shard)
            if self.keeps_shard(spec, first, end):
                self.link(spec.name, layout.shard_key(shard))
                record.append(self.before[spec.name][shard])
                continue
            file = ShardFile(self.folder / spec.name, layout, shard)
            for start, stop in blocks(first, end, spec.row_bytes):
                file.append(self.values(spec, start, stop))
                self.between()
            record.append(file.finish(end - first))
        self.publish(spec, layout, record)

    def keeps_shard(self, spec: ArraySpec, first: int, end: int) -> bool:
        """Whether rows [first, end) of the old split are a shard of the same rows."""
        if self.old is None or self.old.specs.get(spec.name) != spec:
            return False
        return min(len(self.old), first + self.shard_rows) == end and bool(self.stays[first:end].all())

    def write_small(self, spec: ArraySpec) -> None:
        layout = self.layout(spec, self.rows)
        writer = ArrayWriter(self.folder / spec.name, layout)
        for start, stop in blocks(0, self.rows, spec.row_bytes):
            writer.append(np.ascontiguousarray(self.values(spec, start, stop), spec.dtype).tobytes())
        self.publish(spec, layout, writer.close())

    def values(self, spec: ArraySpec, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a fixed array, stored values."""
        if spec.name in self.version.fixed:
            return np.asarray(self.version.fixed[spec.name][start:stop])
        values = np.empty((stop - start, *spec.row_shape), spec.dtype)
        source, row = self.version.source[start:stop], self.version.row[start:stop]
        for index in np.unique(source).tolist():
            here = np.flatnonzero(source == index)
            values[here] = self.version.sources[index].gather(row[here], [spec.name])[spec.name]
        invalid = self.invalid[start:stop]
        if spec.name in (VALID, SIZES) or spec.direct:
            values[invalid] = np.nan if values.dtype.kind == "f" else 0
        return values

    # -- ragged arrays ----------------------------------------------------------------------------

    def write_ragged(self, offsets: str, specs: Sequence[ArraySpec]) -> None:
        """A ragged group: whole shards of rows that stay are kept, the rest is copied and read."""
        kept = self.kept_rows(offsets, specs)
        entries = self.entries_before(offsets, kept)
        whole = kept == self.rows and self.old is not None and kept == len(self.old)
        writers = {}
        for spec in specs:
            layout = self.layout(spec, 0)
            shards = -(-entries // layout.shard_rows) if whole else entries // layout.shard_rows
            for shard in range(shards):
                self.link(spec.name, layout.shard_key(shard))
            writers[spec.name] = ArrayWriter(
                self.folder / spec.name, layout, self.before.get(spec.name, [])[:shards]
            )
            if not whole and self.old is not None:
                for start, stop in blocks(shards * layout.shard_rows, entries, spec.row_bytes):
                    writers[spec.name].append(self.old.array(spec.name).slice(start, stop).tobytes())
        lengths = np.zeros(self.rows, np.int64)
        if kept:
            lengths[:kept] = np.diff(self.offsets(self.own, offsets)[: kept + 1])
        for first, end in self.runs(offsets, kept):
            source, row = int(self.version.source[first]), int(self.version.row[first])
            if self.read_again(offsets)[first]:
                found = self.new_entries(offsets, specs, first)
                lengths[first] = len(next(iter(found.values())))
                for name, values in found.items():
                    writers[name].append(values.tobytes())
                continue
            bounds = self.offsets(source, offsets)[row : row + end - first + 1]
            lengths[first:end] = np.diff(bounds)
            for spec in specs:
                array = self.version.sources[source].array(spec.name)
                for start, stop in blocks(int(bounds[0]), int(bounds[-1]), spec.row_bytes):
                    writers[spec.name].append(array.slice(start, stop).tobytes())
                    self.between()
        total = int(lengths.sum())
        for spec in specs:
            layout = self.layout(spec, total)
            writers[spec.name].layout = layout  # the number of entries is known only now
            self.publish(spec, layout, writers[spec.name].close())
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        spec = offsets_spec(offsets)
        layout = self.layout(spec, self.rows + 1)
        writer = ArrayWriter(self.folder / offsets, layout)
        writer.append(ends.tobytes())
        self.publish(spec, layout, writer.close())

    def kept_rows(self, offsets: str, specs: Sequence[ArraySpec]) -> int:
        """How many rows at the start have the entries that they had before."""
        if self.old is None or any(self.old.specs.get(spec.name) != spec for spec in specs):
            return 0
        same = self.stays.copy()
        if offsets in self.version.ragged:
            same &= ~self.version.ragged[offsets].rows
        return int(np.argmin(same)) if not same.all() else self.rows

    def entries_before(self, offsets: str, rows: int) -> int:
        return int(self.offsets(self.own, offsets)[rows]) if rows else 0

    def read_again(self, offsets: str) -> np.ndarray:
        """[N] bool: rows whose entries are not copied."""
        change = self.version.ragged.get(offsets)
        return self.invalid if change is None else self.invalid | change.rows

    def runs(self, offsets: str, kept: int) -> Iterator[tuple[int, int]]:
        """Rows from `kept` on as ranges whose entries are neighbors in one source; rows that are read come alone."""
        source, row, read = self.version.source, self.version.row, self.read_again(offsets)
        follows = (source[1:] == source[:-1]) & (row[1:] == row[:-1] + 1) & ~read[1:] & ~read[:-1]
        starts = np.concatenate([[kept], np.flatnonzero(~follows[kept:]) + kept + 1, [self.rows]])
        for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            if first < end:
                yield first, end

    def new_entries(self, offsets: str, specs: Sequence[ArraySpec], row: int) -> Values:
        """The entries by array of one row that is not copied.

        A row without features has its reason, no targets, NaN for each frame.
        """
        if not self.invalid[row]:
            read = self.version.ragged[offsets].read(row)
            return {spec.name: np.ascontiguousarray(read[spec.name], spec.dtype) for spec in specs}
        entries = {}
        for spec in specs:
            if spec.name == REASONS:
                entries[spec.name] = np.frombuffer(self.version.invalid[row].encode(), np.uint8)
            elif spec.name.startswith(TARGETS) or spec.name == IMAGES_ENCODED:
                entries[spec.name] = np.empty((0, *spec.row_shape), spec.dtype)
            else:
                source, old_row = int(self.version.source[row]), int(self.version.row[row])
                start, stop = self.offsets(source, offsets)[old_row : old_row + 2].tolist()
                stored = self.version.sources[source].array(spec.name).slice(start, stop)
                entries[spec.name] = np.full_like(stored, np.nan)
        return entries

    def offsets(self, source: int, name: str) -> np.ndarray:
        """int64 [n + 1] of a source's ragged group."""
        key = source, name
        if key not in self.offsets_read:
            self.offsets_read[key] = self.version.sources[source].read(name)
        return self.offsets_read[key]

    # -- files ------------------------------------------------------------------------------------

    @property
    def shard_rows(self) -> int:
        return self.store.manifest.shard_rows

    def layout(self, spec: ArraySpec, rows: int) -> Layout:
        return Layout.of(spec, rows, self.shard_rows)

    def publish(self, spec: ArraySpec, layout: Layout, checksums: Checksums) -> None:
        self.record[spec.name] = checksums
        attributes: dict[str, Any] = {}
        if spec.scaled:
            scale = self.version.sources[0].scale[spec.name]
            attributes["scale"] = [float(value) for value in scale]
        write_array_metadata(self.folder, spec.name, layout, attributes)

    def link(self, name: str, key: str) -> None:
        """Give a shard file of the old version a second name; a copy where the file system has no links."""
        old, new = self.store.path / self.name / name / key, self.folder / name / key
        link_file(old, new, self.between)

    def write_statistics(self, spec: ArraySpec) -> None:
        """The old version's when the array's files and `valid` are the same, else those of all its values."""

        def as_pairs(checksums: Checksums) -> list[tuple[int, int]]:
            return [(size, crc) for size, crc in checksums]  # JSON has lists where the writer has tuples

        names = [spec.name, VALID, *([spec.offsets_name] if spec.ragged else [])]
        path = self.folder / spec.name / ZARR_JSON
        if all(as_pairs(self.record[name]) == as_pairs(self.before.get(name, [])) for name in names):
            old = read_json(self.store.path / self.name / spec.name / ZARR_JSON)["attributes"]
            if "statistics" in old:
                metadata = read_json(path)
                metadata["attributes"]["statistics"] = old["statistics"]
                write_json(path, metadata)
                return
        write_statistics(self.root, self.name, spec, self.version.sources[0].scale[spec.name])

    def bytes_of(self, spec: ArraySpec, linked: bool) -> int:
        """About how many bytes writing an array takes."""
        if not spec.direct and not spec.ragged:
            return spec.row_bytes * self.rows
        if not spec.ragged:
            written = [
                end - first
                for first in range(0, self.rows, self.shard_rows)
                for end in [min(self.rows, first + self.shard_rows)]
                if not (linked and self.keeps_shard(spec, first, end))
            ]
            return spec.row_bytes * sum(written)
        counts = [
            len(source.array(spec.name)) for source in self.version.sources if spec.name in source.names
        ]
        kept = self.kept_rows(spec.offsets_name, [spec]) if linked else 0
        return spec.row_bytes * max(0, sum(counts) - self.entries_before(spec.offsets_name, kept))


def link_file(old: Path, new: Path, before_copy: Callable[[], None] = lambda: None) -> None:
    """Give a file a second name, which outlasts a power failure; a copy where the file system has no links."""
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
        before_copy()
        shutil.copyfile(old, new)
        sync_file(new)
    sync_folder(new.parent)


def next_folder(store: Path, end: str = "") -> Path:
    return store / WORK_FOLDER / f"{NEXT}{end}"


def publish_version(store: Path) -> None:
    """Put the version in `.work/next` in the store's place; finishes a switch that was killed. May be repeated.

    Arrays that are being added meanwhile (`logits/…`) are dropped.
    """
    with disk_errors(store):
        new = next_folder(store)
        if (new / ZARR_JSON).exists():
            switch(store, new)
        clear_version(store)


def switch(store: Path, new: Path) -> None:
    root = read_root(store)
    old_splits = parse_manifest(root, str(store)).splits
    new_splits = parse_manifest(read_root(new), str(new)).splits
    for job in pending_jobs(store):
        drop_job(store, job)
    if root["attributes"]["complete"]:
        root["attributes"]["complete"] = False
        write_json(store / ZARR_JSON, root)
    replaced = store / WORK_FOLDER / REPLACED
    replaced.mkdir(exist_ok=True)
    for name in [COMMITS_FOLDER, *dict.fromkeys([*old_splits, *new_splits])]:
        # Not in `.work/next` any more: it was moved before the kill, and what is in the store is the new one.
        moved = not (new / name).exists() and name in {COMMITS_FOLDER, *new_splits}
        if not moved and (store / name).exists():
            os.rename(store / name, replaced / name)
        if (new / name).exists():
            os.rename(new / name, store / name)
    for note in [path for path in new.glob(".*/*") if path.is_file()]:
        (store / note.parent.name).mkdir(exist_ok=True)
        os.replace(note, store / note.parent.name / note.name)
    # All moves must be on the disk before the manifest that calls the store complete.
    for folder in (store, new, replaced):
        sync_folder(folder)
    publish(new / ZARR_JSON, store / ZARR_JSON)


def clear_version(store: Path) -> None:
    """Delete what a finished switch has left, and a version that was never finished. `next` goes last: see above."""
    work = store / WORK_FOLDER
    for name in (f"{NEXT}{CREATING}", REPLACED, ROWS_STORE, NEXT):
        if name == ROWS_STORE and not (work / NEXT).exists():
            continue  # rows that are still being encoded
        if (work / name).exists():
            shutil.rmtree(work / f"{name}{DONE}", ignore_errors=True)
            os.rename(work / name, work / f"{name}{DONE}")
    if work.exists():
        remove_done(store)


def drop_rows_store(store: Path) -> None:
    """Delete the rows that were encoded for a new version that nothing asks for any more."""
    work = store / WORK_FOLDER
    for folder in [work / ROWS_STORE, *work.glob(f".{ROWS_STORE}.creating.*")]:
        if folder.exists():
            os.rename(folder, folder.with_name(f"{folder.name}{DONE}"))
    if work.exists():
        remove_done(store)


def switch_is_done(store: Path) -> bool:
    """Whether a new version has its place, and what it replaced was not deleted."""
    new = next_folder(store)
    return new.exists() and not (new / ZARR_JSON).exists()
