"""Check a store: every file is read, every checksum compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files.writing import PARTIAL_PREFIX
from store.errors import LockedError, RemoteError, StoreError
from store.finalize import commit_record
from store.format import (
    KEY_ARRAYS,
    KEY_OFFSETS,
    KEY_ROWS,
    KEY_VALUES,
    OFFSETS,
    WORK_FOLDER,
    ArraySpec,
    commits_file,
    ragged_groups,
)
from store.job import (
    ADDITIONS,
    CREATING,
    DONE,
    NEXT,
    REPLACED,
    ROWS_STORE,
    Commit,
    Job,
    describe_progress,
    job_folder,
    load_job,
    log_path,
    pending_jobs,
    read_commits,
)
from store.keys import KeyTable
from store.locks import SUFFIX, Owner, is_abandoned, read_owner
from store.metadata import ZARR_JSON, is_url, node_names, parse_manifest, read_json, read_root
from store.reader import Split, Store
from store.shards import PARTIAL, Layout, ShardFile, blocks, checksum_of, open_shard
from store.version import switch_is_done
from store.writer import all_finite

if TYPE_CHECKING:
    from store.mirror import Mirror


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, what. `leftover` marks what `repair` may delete."""

    path: str
    problem: str
    leftover: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def verify_store(path: str | os.PathLike[str]) -> list[Finding]:
    """Everything that is wrong with a store; empty when all is well.

    One at a URL is read through the local cache; shards that are there already are read at the URL once more.

    Raises StoreError when there is no store that could be checked (no or another format), or the URL does not work.
    """
    if is_url(path):
        return verify_remote(os.fspath(path))
    folder = Path(path)
    root = read_root(folder)
    manifest = parse_manifest(root, str(folder))
    findings = list(leftovers(folder))
    nodes = root.get("consolidated_metadata", {}).get("metadata", {})
    findings += check_metadata(folder, nodes)
    if not manifest.complete:
        findings.append(Finding(str(folder), f"incomplete: {describe_progress(folder)}"))
        return findings + list(check_jobs(folder))
    findings += check_jobs(folder)
    store = Store(str(folder), manifest, nodes)
    for split in store.values():
        try:
            findings += check_split(folder, split)
        except StoreError as error:
            findings.append(Finding(f"{folder}/{split.name}", str(error)))
    return findings


def repair_store(path: str | os.PathLike[str]) -> list[str]:
    """Delete uncommitted leftovers of runs that are gone, nothing else. Returns the deleted paths. Of local stores.

    Raises LockedError while another process writes: a temporary file may be in use.
    """
    for lock, owner in lock_files(Path(path)):
        if not is_abandoned(lock, owner):
            raise LockedError(f"{path}: being written: {owner}; repair when that run has ended")
    deleted = []
    for finding in leftovers(Path(path)):
        if finding.leftover:
            target = Path(finding.path)
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            deleted.append(finding.path)
    return deleted


def leftovers(folder: Path) -> Iterator[Finding]:
    """Temporary files that belong to no job in progress, and locks of dead writers."""
    owned: set[Path] = set()  # the open shard files of jobs that can be resumed
    for name in pending_jobs(folder):
        job = load_job(folder, name)
        for split in job.splits:
            for spec in job.direct:
                owned |= set((folder / split / spec.name).rglob(f"*{PARTIAL}"))
        owned |= set(unfinished(job_folder(folder, name)))
    versions = [folder / WORK_FOLDER / name for name in (ROWS_STORE, ADDITIONS, NEXT, f"{NEXT}{CREATING}")]
    for path in unfinished(folder):
        if path not in owned and not any(version in path.parents for version in versions):
            yield Finding(str(path), "temporary file of an interrupted run", leftover=True)
    for path, owner in lock_files(folder):
        if is_abandoned(path, owner):
            yield Finding(str(path), f"lock of a dead writer: {owner}", leftover=True)
    if switch_is_done(folder):
        for name in (REPLACED, NEXT):
            path = folder / WORK_FOLDER / name
            if path.exists():
                yield Finding(str(path), "left by the switch to a new version", leftover=True)
    for path in sorted(folder.glob(f"{WORK_FOLDER}/*")):
        if path.name.endswith((CREATING, DONE)):
            yield Finding(str(path), "a job that was never begun or is done", leftover=True)


def unfinished(folder: Path) -> list[Path]:
    """Files below `folder` under a temporary name."""
    return sorted([*folder.rglob(f"*{PARTIAL}"), *folder.rglob(f"{PARTIAL_PREFIX}*")])


def lock_files(folder: Path) -> Iterator[tuple[Path, Owner]]:
    for path in sorted(folder.glob(f"{WORK_FOLDER}/*/locks/*{SUFFIX}")):
        owner = read_owner(path)
        if owner is not None:
            yield path, owner


def check_metadata(folder: Path, nodes: dict[str, Any]) -> Iterator[Finding]:
    """The root's copy of every zarr.json equals the file."""
    on_disk = node_names(folder)
    for name in sorted(set(on_disk) ^ set(nodes)):
        where = "on disk but not in the root's zarr.json" if name in on_disk else "missing on disk"
        yield Finding(f"{folder}/{name}", f"node is {where}")
    for name in sorted(set(on_disk) & set(nodes)):
        try:
            if read_json(folder / name / ZARR_JSON) != nodes[name]:
                yield Finding(f"{folder}/{name}/{ZARR_JSON}", "differs from the copy in the root's zarr.json")
        except StoreError as error:
            yield Finding(f"{folder}/{name}/{ZARR_JSON}", str(error))


def check_jobs(folder: Path) -> Iterator[Finding]:
    """What is committed of jobs in progress: log records and the shard files whose checksums they hold."""
    for name in pending_jobs(folder):
        job = load_job(folder, name)
        for split in job.splits:
            for shard in job.shards(split):
                log = log_path(folder, job, split, shard)
                try:
                    commits = read_commits(log, check_all=True)
                except StoreError as error:
                    yield Finding(str(log), str(error))
                    continue
                rest = (log.stat().st_size if log.exists() else 0) - (commits[-1].end if commits else 0)
                if rest:
                    yield Finding(
                        str(log), f"{rest} bytes at the end are no intact commit; resuming drops them"
                    )
                if commits:
                    yield from check_commit(folder, job, split, shard, commits[-1])


def check_commit(folder: Path, job: Job, split: str, shard: int, last: Commit) -> Iterator[Finding]:
    """The bytes that a shard's last record has the checksum of."""
    for spec in job.direct:
        file = ShardFile(folder / split / spec.name, job.layout(spec, job.splits[split].rows), shard)
        published = last.finished is not None or not file.partial.exists()
        path = file.final if published else file.partial
        size, crc = (last.prefix if last.finished is None else last.finished)[spec.name]
        have = path.stat().st_size if path.exists() else 0
        if have < size:
            yield Finding(str(path), f"{have} bytes, {size} are committed")
            continue
        with path.open("rb") as opened:
            if checksum_of(opened.fileno(), size) != crc:
                yield Finding(str(path), "crc32c differs from the committed one; the data is damaged")


def check_split(folder: Path, split: Split) -> Iterator[Finding]:
    """Files against commit records, then counts, offsets, keys and values."""
    record = commit_record(folder, split.name)
    keys_record = read_json(folder / commits_file(split.name, keys=True))
    damaged = list(check_files(folder, split, {**record, **keys_record}))
    yield from damaged
    yield from check_contents(split, damaged=bool(damaged))


def check_contents(split: Split, *, damaged: bool) -> Iterator[Finding]:
    """Counts, offsets, keys and values. `damaged`: some files are, whose values would only repeat the finding."""
    yield from check_lengths(split)
    if damaged:
        return
    wrong_offsets = list(check_offsets(split))
    yield from wrong_offsets
    yield from check_keys(split)
    if not wrong_offsets:
        yield from check_values(split)


# -- a store at a URL ------------------------------------------------------------------------------------


def verify_remote(url: str) -> list[Finding]:
    """`verify_store` for a URL."""
    from store.mirror import Mirror

    mirror = Mirror(url.rstrip("/"))
    manifest = parse_manifest(mirror.root, url)
    if not manifest.complete:
        return [Finding(url, "incomplete: run its extraction to the end")]
    nodes = mirror.root.get("consolidated_metadata", {}).get("metadata", {})
    store = Store(mirror.url, manifest, nodes, mirror)
    findings = list(check_remote_metadata(mirror, nodes))
    for split in store.values():
        try:
            findings += check_remote_split(mirror, split)
        except RemoteError:
            raise
        except StoreError as error:
            findings.append(Finding(f"{mirror.url}/{split.name}", str(error)))
    return findings


def check_remote_metadata(mirror: Mirror, nodes: dict[str, Any]) -> Iterator[Finding]:
    """The root's copy of every zarr.json equals the file."""
    for name, node in sorted(nodes.items()):
        where = f"{mirror.url}/{name}/{ZARR_JSON}"
        try:
            if json.loads(mirror.remote.read(f"{name}/{ZARR_JSON}")) != node:
                yield Finding(where, "differs from the copy in the root's zarr.json")
        except FileNotFoundError:
            yield Finding(where, "is missing")
        except ValueError as error:
            yield Finding(where, f"not valid JSON ({error}); the file is damaged")


def check_remote_split(mirror: Mirror, split: Split) -> Iterator[Finding]:
    """Every shard is there, as recorded, and no other file; then what the arrays hold."""
    damaged = False
    record: dict[str, Any] = {}
    for file in (commits_file(split.name), commits_file(split.name, keys=True)):
        try:
            record |= json.loads(mirror.remote.read(file))
        except FileNotFoundError:
            yield Finding(
                f"{mirror.url}/{file}",
                "cannot be read, so that no checksums can be compared: a web server may hide names that begin with a "
                "dot, or the copy lacks them",
            )
    for name in sorted({*split.names, *KEY_ARRAYS}):
        array, where = f"{split.name}/{name}", f"{mirror.url}/{split.name}/{name}"
        layout = split.array(name).layout
        if record and len(record.get(name, [])) != layout.shards:
            yield Finding(where, f"{len(record.get(name, []))} shards are recorded, expected {layout.shards}")
            damaged = True
            continue
        for shard in range(layout.shards):
            try:
                mirror.check(array, layout, shard)
            except RemoteError:
                raise
            except StoreError as error:
                damaged = True
                yield Finding(f"{where}/{layout.shard_key(shard)}", str(error).partition(": ")[2])
        expected = {f"{array}/{layout.shard_key(shard)}" for shard in range(layout.shards)}
        for key in mirror.remote.names(f"{array}/c") if not mirror.url.startswith("http") else ():
            if key not in expected:  # the links of a web server's page of files may be anything
                yield Finding(f"{mirror.url}/{key}", "file does not belong to the array")
    yield from check_contents(split, damaged=damaged)


# -- files on disk ---------------------------------------------------------------------------------------


def check_files(folder: Path, split: Split, record: dict[str, Any]) -> Iterator[Finding]:
    """Every shard file is there, with the recorded length and crc32c, and nothing else is."""
    arrays = set(split.names) | {name for name in record if name.startswith("keys/")}
    for name in sorted(arrays | set(record)):
        base = folder / split.name / name
        if name not in record or not (base / ZARR_JSON).exists():
            missing = "no commit record" if name not in record else "array is missing"
            yield Finding(str(base), missing)
            continue
        layout = Layout.from_metadata(read_json(base / ZARR_JSON), str(base))
        if len(record[name]) != layout.shards:
            yield Finding(str(base), f"{len(record[name])} shards are recorded, expected {layout.shards}")
            continue
        yield from check_shards(base, layout, record[name])
        expected = {base / layout.shard_key(shard) for shard in range(layout.shards)}
        for path in sorted(set((base / "c").rglob("*")) - expected):
            if path.is_file() and path.suffix != PARTIAL:
                yield Finding(str(path), "file does not belong to the array")


def check_shards(base: Path, layout: Layout, record: list[tuple[int, int]]) -> Iterator[Finding]:
    for shard, (size, crc) in enumerate(record):
        path = base / layout.shard_key(shard)
        first = shard * layout.shard_rows
        where = f"{path} (rows {first}:{first + layout.rows_in(shard)})"
        if not path.exists():
            yield Finding(where, "shard is missing")
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            have = os.fstat(fd).st_size
            if have != size:
                yield Finding(where, f"{have} bytes, {size} are recorded")
            elif checksum_of(fd, size) != crc:
                yield Finding(where, "crc32c differs from the recorded one; the data is damaged")
        finally:
            os.close(fd)
        if layout.codec == "none" and have == size:
            try:
                os.close(open_shard(base, layout, shard))
            except StoreError as error:
                yield Finding(where, str(error))


def check_lengths(split: Split) -> Iterator[Finding]:
    """First axes agree with the manifest's number of rows, row shapes with its arrays."""
    for name, spec in split.specs.items():
        where = f"{split.location}/{split.name}/{name}"
        if name not in split.names:
            yield Finding(where, "array is in the manifest, but missing")
            continue
        layout = split.array(name).layout
        if layout.row_shape != spec.row_shape or layout.dtype != np.dtype(spec.dtype):
            yield Finding(
                where, f"{layout.dtype} {layout.row_shape}, manifest has {spec.dtype} {spec.row_shape}"
            )
        if not spec.ragged and layout.rows != len(split):
            yield Finding(where, f"{layout.rows} rows, manifest has {len(split)}")


def check_offsets(split: Split) -> Iterator[Finding]:
    for name, specs in ragged_groups(split.specs.values()).items():
        where = f"{split.location}/{split.name}/{name}"
        offsets = split.array(name)
        yield from check_ascending(where, offsets.slice(0, len(offsets)), len(split))
        end = int(offsets.slice(len(split), len(split) + 1)[0])
        for spec in specs:
            if len(split.array(spec.name)) != end:
                yield Finding(
                    where, f"ends at {end}, but {spec.name} has {len(split.array(spec.name))} entries"
                )


def check_ascending(where: str, offsets: np.ndarray, rows: int) -> Iterator[Finding]:
    if len(offsets) != rows + 1:
        yield Finding(where, f"{len(offsets)} offsets, expected {rows + 1}")
    elif offsets[0] != 0 or (np.diff(offsets) < 0).any():
        yield Finding(where, f"{OFFSETS} do not ascend from 0")


def check_keys(split: Split) -> Iterator[Finding]:
    """Keys are valid UTF-8, unique, and the look-up index is theirs."""
    where = f"{split.location}/{split.name}/{KEY_VALUES}"
    keys = split.keys
    yield from check_ascending(f"{split.location}/{split.name}/{KEY_OFFSETS}", keys.offsets, len(split))
    try:
        again = KeyTable.build(keys, where)
    except (StoreError, UnicodeDecodeError) as error:
        yield Finding(where, str(error))
        return
    if not (np.array_equal(again.hashes, keys.hashes) and np.array_equal(again.rows, keys.rows)):
        yield Finding(
            f"{split.location}/{split.name}/{KEY_ROWS}", "the look-up index does not belong to the keys"
        )


def check_values(split: Split) -> Iterator[Finding]:
    """Float values of valid rows are finite, features of invalid rows are not."""
    for name, spec in split.specs.items():
        if np.dtype(spec.dtype).kind == "f":
            check = check_ragged_values if spec.ragged else check_fixed_values
            for problem in islice(check(split, spec), 1):
                yield Finding(f"{split.location}/{split.name}/{name}", problem)


def check_fixed_values(split: Split, spec: ArraySpec) -> Iterator[str]:
    valid = split.valid_for(spec.name)
    for first, rows in row_blocks(split, spec.name):
        flags = valid[first : first + len(rows)]
        if flags.all() and all_finite(rows):
            continue  # The usual case, in a tenth of the time.
        finite = np.isfinite(rows).reshape(len(rows), -1)
        for row in np.flatnonzero(flags & ~finite.all(axis=1)).tolist():
            yield f"row {first + row} is valid, but not finite"
        if spec.scaled:
            for row in np.flatnonzero(finite.any(axis=1) & ~flags).tolist():
                yield f"row {first + row} is invalid, but has features"


def check_ragged_values(split: Split, spec: ArraySpec) -> Iterator[str]:
    offsets, valid = split.read(spec.offsets_name), split.valid_for(spec.name)
    for first, entries in row_blocks(split, spec.name):
        finite = np.isfinite(entries).reshape(len(entries), -1).all(axis=1)
        for entry in (first + np.flatnonzero(~finite)).tolist():
            row = int(np.searchsorted(offsets, entry, side="right")) - 1
            if valid[row]:
                yield f"row {row} is valid, but not finite"


def row_blocks(split: Split, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of an array, about 32 MB at a time."""
    array = split.array(name)
    for start, stop in blocks(0, len(array), array.layout.row_bytes):
        yield start, array.slice(start, stop)
