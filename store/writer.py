"""Append rows to a store: checked and brought into stored form, then large rows go directly into shard files, small
arrays into the commit log (see job.py).

A row is committed when its record is in its shard's log: at least every 1,024 rows or 60 seconds. What was not
committed when a process was killed is written again by the next run, and the resulting files are bit-identical.

The record is written at once, so that it survives a kill; a second thread syncs data and log a little later, while the
next rows are computed. Where rows come faster than the disk can sync, the commits of up to 128 MB share a sync: one
for each would cost most of the speed. Only a power failure can undo those, and the next run finds out (`_true_commits`).
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from files.writing import sync_folder
from store.errors import StoreError, disk_errors
from store.format import (
    FEATURES_JOB,
    OWN_ARRAYS,
    REASONS,
    VALID,
    ArraySpec,
    ragged_groups,
    teacher_of,
    valid_array,
)
from store.job import (
    Commit,
    Job,
    encode_commit,
    intact_commits,
    job_folder,
    load_job,
    log_path,
    read_commits,
)
from store.locks import RowLock
from store.shards import ShardFile, write_all

log = logging.getLogger(__name__)

Values = np.ndarray | Sequence[Any]

COMMIT_ROWS = 1024
COMMIT_SECONDS = 60.0
COMMIT_BYTES = 128 * 1024 * 1024  # large rows: bounds memory, and the disk works while rows are computed


class StoreWriter:
    """Appends rows of one split, in row order, from `next_row` on.

    row_range: (first row, end row), both at shard boundaries (the end may be the split's end); None is
        every row of the job. Writers of disjoint ranges may run at the same time, anywhere.
    wait_for_room: called before another shard is begun; may raise.

    Use as a context manager: leaving it normally commits, leaving it by an exception does not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str,
        row_range: tuple[int, int] | None = None,
        *,
        job: str = FEATURES_JOB,
        commit_rows: int = COMMIT_ROWS,
        commit_seconds: float = COMMIT_SECONDS,
        break_lock: bool = False,
        wait_for_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.split = Path(path), split
        self.wait_for_room = wait_for_room
        self.job: Job = load_job(self.path, job)
        if split not in self.job.splits:
            raise StoreError(f"{path}: no split {split!r}; valid: {sorted(self.job.splits)}")
        rows, first = self.job.splits[split].rows, self.job.splits[split].start
        size = self.job.shard_rows
        self.start, self.stop = (first - first % size, rows) if row_range is None else row_range
        whole = self.start % size == 0 and (self.stop % size == 0 or self.stop == rows)
        if not whole or not 0 <= self.start <= self.stop <= rows:
            raise StoreError(
                f"{path} {split}: row range {self.start}:{self.stop} is not made of whole shards of {size} rows "
                f"within 0:{rows}"
            )
        self.commit_rows, self.commit_seconds = commit_rows, commit_seconds
        self._shard: OpenShard | None = None
        self._failed = self._closed = False
        self._last_commit = time.monotonic()
        self._syncer = ThreadPoolExecutor(1, "store-sync")
        self._syncs: deque[tuple[Future[None], int]] = deque()  # under way, and their bytes
        wait_for_room()
        with disk_errors(self.path):
            folder = job_folder(self.path, job)
            self._lock = RowLock(folder, split, self.start, self.stop, break_lock=break_lock)
            try:
                self.next_row = self._resume()
            except BaseException:
                self._lock.release()
                raise

    # -- what the caller sees ---------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, int]]:
        """The (first row, end row) of every batch that is still to be appended."""
        return batches(self.next_row, self.stop, self.job.batch_rows, self.job.shard_rows)

    @property
    def array_names(self) -> list[str]:
        """The arrays that `append` expects."""
        return [spec.name for spec in self.job.arrays if spec.name not in OWN_ARRAYS]

    def append(
        self,
        arrays: Mapping[str, Values],
        *,
        valid: np.ndarray | None = None,
        reasons: Sequence[str] | None = None,
        stored: bool | Collection[str] = False,
        finite: Collection[str] = (),
    ) -> np.ndarray:
        """Append b rows. Returns valid [b] bool as stored.

        arrays: name → [b, ...] for fixed arrays, list of b arrays [n, ...] for ragged ones; every array of
            the job but `valid` and `reasons`. Scaled arrays are given in true units (any float dtype);
            with `stored=True`, or their name in `stored`, as they are in the store.
        valid: [b] bool, None for all valid. Features of invalid rows are stored as NaN, whatever is given.
        reasons: b texts, empty for valid rows.
        finite: names of arrays that the caller has found to be finite in stored form; they are not looked at again.

        A valid row with a value that float16 cannot hold at its scale becomes invalid, with the reason.
        Raises StoreError for wrong names, shapes, dtypes, too many rows, and for a disk that refuses.
        """
        self._check_usable()
        block = prepare_rows(self.job, arrays, valid, reasons, stored, finite)
        if self.next_row + block.rows > self.stop:
            raise StoreError(
                f"{self.path} {self.split}: {block.rows} rows at row {self.next_row} pass the end of the "
                f"range at {self.stop}"
            )
        with self._failing_for_good():
            self._lock.check()
            if self._shard is not None and self._shard.uncommitted + block.rows > self.commit_rows:
                self._commit()
            done = 0
            while done < block.rows:
                if self._shard is None:
                    self.wait_for_room()
                    shard = self.next_row // self.job.shard_rows
                    self._shard = OpenShard(self.path, self.job, self.split, shard, [])
                count = min(block.rows - done, self._shard.end - self.next_row)
                self._shard.append(block.part(done, done + count))
                done += count
                self.next_row += count
                if self.next_row == self._shard.end:
                    self._commit()
                    self._shard = None
            late = time.monotonic() - self._last_commit >= self.commit_seconds
            if (open_shard := self._shard) is not None and (
                late or open_shard.uncommitted >= self.commit_rows or open_shard.waiting >= COMMIT_BYTES
            ):
                self._commit()
        return block.fixed.get(VALID, np.ones(block.rows, dtype=bool))

    def commit(self) -> None:
        """Make every appended row durable; returns when it is."""
        self._check_usable()
        with self._failing_for_good():
            self._lock.check()
            self._commit()
            while self._syncs:
                self._syncs.popleft()[0].result()

    def close(self, *, commit: bool = True) -> None:
        """Commit (unless `commit` is False) and release files and lock. May be called twice."""
        try:
            if commit and not self._failed and not self._closed:
                self.commit()
        finally:
            self._closed = True
            self._syncer.shutdown()
            if self._shard is not None:
                self._shard.close()
                self._shard = None
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(commit=kind is None)

    # -- how it is done ---------------------------------------------------------------------------

    def _resume(self) -> int:
        """Open the first shard that is not complete. Returns the first row to append."""
        mine = range(self.start // self.job.shard_rows, -(-self.stop // self.job.shard_rows))
        for shard in [shard for shard in self.job.shards(self.split) if shard in mine]:
            log = log_path(self.path, self.job, self.split, shard)
            commits = read_commits(log)
            if commits and commits[-1].finished is not None:
                continue
            opened = OpenShard(self.path, self.job, self.split, shard, intact_commits(log))
            if opened.committed < opened.end:
                self._shard = opened
                return opened.committed
            opened.finish()  # killed between its last rows and its publication
        return self.stop

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """After an error in here the state on disk is unknown: this writer cannot be used any more."""
        self._failed = True
        with disk_errors(self.path):
            yield
        self._failed = False

    def _commit(self) -> None:
        """Record what was appended, and let the second thread sync it; wait while that is too far behind."""
        self._last_commit = time.monotonic()
        shard = self._shard
        if shard is None or not shard.uncommitted:
            return
        size = shard.waiting
        shard.commit()
        self._syncs.append((self._syncer.submit(self._sync, shard, shard.committed), size))
        while self._syncs:
            behind = len(self._syncs) > 1 and sum(size for _, size in self._syncs) > COMMIT_BYTES
            if not (behind or self._syncs[0][0].done()):
                break
            self._syncs.popleft()[0].result()  # raises what the sync raised

    def _sync(self, shard: OpenShard, stop: int) -> None:
        self._lock.check()
        shard.sync(stop)

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"{self.path}: this writer is closed; open a new one")
        if self._failed:
            raise StoreError(f"{self.path}: an earlier write failed; open a new writer to resume")


# -- one shard -----------------------------------------------------------------------------------------------------


class OpenShard:
    """One shard being written: a partial file for each direct array, memory for the rest, one log.

    Two threads share it: one appends and commits, the other syncs.
    """

    def __init__(self, store: Path, job: Job, split: str, shard: int, commits: list[Commit]) -> None:
        self._groups = ragged_groups(job.arrays)
        self._logged = [*self._groups, *(spec.name for spec in job.logged)]  # what every record has
        self.first, self.end = job.shard_range(split, shard)
        self.uncommitted = 0
        self.waiting = 0  # bytes that are in no commit yet
        self._parts: dict[str, list[bytes]] = {}
        self._broken = False
        self._log_path, self._log_fd = log_path(store, job, split, shard), -1
        self.files: dict[str, ShardFile] = {}
        for spec in job.direct:
            layout = job.layout(spec, job.splits[split].rows)
            self.files[spec.name] = ShardFile(store / split / spec.name, layout, shard)
        try:
            commits = self._true_commits(commits)
            self.committed = self._synced = commits[-1].stop if commits else self.first
            kept = min(job.splits[split].start, self.end)  # rows before it come from an earlier job
            if self.committed < kept:
                raise StoreError(
                    f"{self._log_path}: rows {self.committed}:{kept} were stored before and are damaged now "
                    "(crc32c differs); extract again with --overwrite"
                )
            # The log first: it must never hold checksums of bytes that are about to be cut off.
            self._log_fd = self._open_log(commits[-1].end if commits else 0)
            for name, file in self.files.items():
                file.resume(*(commits[-1].prefix[name] if commits else (0, 0)))
        except BaseException:
            self.close()
            raise

    def append(self, block: PreparedRows) -> None:
        for name, array in block.fixed.items():
            if name in self.files:
                self.files[name].append(array)
                self.waiting += array.nbytes
            else:
                self._keep(name, array.tobytes())
        for offsets, specs in self._groups.items():
            lengths = np.fromiter(map(len, block.ragged[specs[0].name]), "<i8", block.rows)
            self._keep(offsets, lengths.tobytes())
            for spec in specs:
                entries = block.ragged[spec.name] if lengths.any() else []
                self._keep(spec.name, b"".join(entry.tobytes() for entry in entries))
        self.uncommitted += block.rows

    def commit(self) -> None:
        """Record the rows appended so far: they outlive this process from now on, the power after `sync`."""
        stop = self.committed + self.uncommitted
        self._record(stop, None, {name: b"".join(blocks) for name, blocks in self._parts.items()})
        self.committed, self.uncommitted, self.waiting = stop, 0, 0
        self._parts.clear()

    def sync(self, stop: int) -> None:
        """Make commits up to row `stop` outlast a power failure, with all that have come since.

        After the shard's last row, its files are published, which a last record confirms. Does nothing when an
        earlier call did it.
        """
        if stop <= self._synced or self._broken:
            return
        self._broken = True  # until it went well: after a failed sync, another one proves nothing
        reached = self.committed
        if reached == self.end:
            self.finish()
        else:
            for file in self.files.values():
                file.sync()
            os.fsync(self._log_fd)
        self._synced, self._broken = reached, False

    def finish(self) -> None:
        """Publish the files of a shard whose rows are all committed."""
        finished = {name: file.finish(self.end - self.first) for name, file in self.files.items()}
        self._record(self.end, finished, dict.fromkeys(self._logged, b""))
        os.fsync(self._log_fd)
        for file in self.files.values():
            file.partial.unlink(missing_ok=True)  # nothing needs the rows of a compressed shard any more
        self.close()

    def _record(
        self, stop: int, finished: dict[str, tuple[int, int]] | None, parts: dict[str, bytes]
    ) -> None:
        prefix = {name: (file.written, file.crc) for name, file in self.files.items()}
        pieces = encode_commit(self.committed, stop, prefix, finished, parts)
        # One system call as a rule; it may write less than all.
        written = os.writev(self._log_fd, pieces)
        for piece in pieces:
            write_all(self._log_fd, piece[written:])
            written = max(0, written - len(piece))

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def _keep(self, name: str, data: bytes) -> None:
        self._parts.setdefault(name, []).append(data)
        self.waiting += len(data)

    def _true_commits(self, commits: list[Commit]) -> list[Commit]:
        """The commits whose data are in the files."""
        true = len(commits)
        for name, file in self.files.items():
            sums = file.checksums([commit.prefix[name][0] for commit in commits])
            while true and sums[true - 1] != commits[true - 1].prefix[name][1]:
                true -= 1
        if true < len(commits):
            log.warning(
                "%s: rows %d:%d are written again: their data did not reach the disk, or are damaged",
                self._log_path,
                commits[true].start,
                commits[-1].stop,
            )
        return commits[:true]

    def _open_log(self, end: int) -> int:
        """The log, cut after its last valid record."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._log_path.exists()
        fd = os.open(self._log_path, os.O_WRONLY | os.O_CREAT, 0o644)
        if os.fstat(fd).st_size != end:
            os.ftruncate(fd, end)
            os.fsync(fd)
        os.lseek(fd, end, os.SEEK_SET)
        if new:
            sync_folder(self._log_path.parent)
        return fd


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


# -- stored form ---------------------------------------------------------------------------------------------------
#
# Every error in a block of rows is found here, before a byte is written.
#
# float16 has a power-of-two scale per channel: stored = true / scale, exactly undone by a product. A few channels of
# Qwen's vision tower reach far beyond float16. A power of two shifts the exponent and changes no digit, so the relative
# error stays at most 2^-11 (float16's rounding) for every stored value of at least 2^-14 (its smallest normal number),
# that is 2^-29 of 2^15, the scaled maximum.

FLOAT16_INFINITY = 0x7C00  # the bits of +inf; those of NaN are larger; the sign is the bit above
FLOAT16_MINUS_INFINITY = 0xFC00
CACHED = 64 * 1024  # values that stay in the processor's cache between two passes
NO_BYTES = np.empty(0, np.uint8)


@dataclass
class PreparedRows:
    """Rows ready to be written. fixed: name → [b, ...]; ragged: name → list of b arrays."""

    rows: int
    fixed: dict[str, np.ndarray]
    ragged: dict[str, list[np.ndarray]]

    def part(self, start: int, stop: int) -> PreparedRows:
        return PreparedRows(
            stop - start,
            {name: array[start:stop] for name, array in self.fixed.items()},
            {name: entries[start:stop] for name, entries in self.ragged.items()},
        )


def prepare_rows(
    job: Job,
    arrays: Mapping[str, Values],
    valid: np.ndarray | None,
    reasons: Sequence[str] | None,
    stored: bool | Collection[str],
    finite: Collection[str] = (),
) -> PreparedRows:
    """Check a block of rows and bring it into stored form; arguments as of `StoreWriter.append`.

    Raises StoreError for what does not fit.
    """
    specs = {spec.name: spec for spec in job.arrays if spec.name not in OWN_ARRAYS}
    missing, unknown = sorted(set(specs) - set(arrays)), sorted(set(arrays) - set(specs))
    if missing or unknown:
        raise StoreError(
            f"append: missing arrays {missing}, unknown arrays {unknown}; expected {sorted(specs)}"
        )
    rows = len(next(iter(arrays.values()))) if arrays else len(valid if valid is not None else ())
    flags = np.ones(rows, dtype=bool) if valid is None else np.array(valid, dtype=bool)
    texts = list(reasons) if reasons is not None else [""] * rows
    if flags.shape != (rows,) or len(texts) != rows:
        raise StoreError(f"append: {rows} rows, but valid has shape {flags.shape} and {len(texts)} reasons")
    fixed: dict[str, np.ndarray] = {}
    ragged: dict[str, list[np.ndarray]] = {}
    for name, spec in specs.items():
        as_it_is = stored if isinstance(stored, bool) else name in stored
        if spec.ragged:
            ragged[name] = check_ragged(spec, arrays[name], rows, job, as_it_is)
            continue
        array = np.asarray(arrays[name])
        if array.shape != (rows, *spec.row_shape):
            raise StoreError(f"append {name}: shape {array.shape}, expected {(rows, *spec.row_shape)}")
        fixed[name] = in_stored_dtype(spec, array, job, as_it_is)
    # Rows of a copied store also have the flags of further teachers, which are as they were.
    unsure = {name: spec for name, spec in specs.items() if name not in finite and not teacher_of(name)[0]}
    mark_overflow(unsure, fixed, ragged, flags, texts)
    for name, spec in specs.items():
        sound = fixed.get(valid_array(name), flags)
        if not is_feature(spec) or sound.all():
            continue
        if spec.ragged:
            pairs = zip(ragged[name], sound, strict=True)
            ragged[name] = [entry if ok else np.full_like(entry, np.nan) for entry, ok in pairs]
        else:
            fixed[name] = fixed[name].copy()
            fixed[name][~sound] = np.nan
    if job.owns_rows:
        fixed[VALID] = flags
        ragged[REASONS] = [np.frombuffer(text.encode(), np.uint8) if text else NO_BYTES for text in texts]
    for group in ragged_groups(job.arrays).values():
        lengths = [list(map(len, ragged[spec.name])) for spec in group]
        if any(other != lengths[0] for other in lengths[1:]):
            raise StoreError(f"append: {[spec.name for spec in group]} differ in entries of a row")
    return PreparedRows(rows, fixed, ragged)


def check_ragged(spec: ArraySpec, values: Values, rows: int, job: Job, stored: bool) -> list[np.ndarray]:
    """b arrays [n, ...] in the stored dtype."""
    if len(values) != rows:
        raise StoreError(f"append {spec.name}: {len(values)} entries, expected one for each of {rows} rows")
    entries = []
    for entry in values:
        array = np.frombuffer(entry, np.uint8) if isinstance(entry, bytes) else np.asarray(entry)
        if array.size == 0:
            array = array.reshape(0, *spec.row_shape)
        if array.shape[1:] != spec.row_shape:
            raise StoreError(
                f"append {spec.name}: entry shape {array.shape}, expected (n, *{spec.row_shape})"
            )
        entries.append(in_stored_dtype(spec, array, job, stored))
    return entries


def in_stored_dtype(spec: ArraySpec, array: np.ndarray, job: Job, stored: bool) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    scale = None if stored else job.scale_of(spec.name)
    if scale is not None or dtype == np.float16:
        return to_stored(array, scale, dtype)
    if array.size and not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise StoreError(f"append {spec.name}: dtype {array.dtype}, expected {dtype}")
    return np.ascontiguousarray(array, dtype=dtype)


def is_feature(spec: ArraySpec) -> bool:
    own = teacher_of(spec.name)[1]
    return np.dtype(spec.dtype).kind == "f" and (spec.scaled or own.startswith(("features/", "views/")))


def mark_overflow(
    specs: Mapping[str, ArraySpec],
    fixed: Mapping[str, np.ndarray],
    ragged: Mapping[str, list[np.ndarray]],
    flags: np.ndarray,
    texts: list[str],
) -> None:
    """Make rows invalid whose float values are not finite in stored form."""
    for name, spec in specs.items():
        if np.dtype(spec.dtype).kind != "f" or (not spec.ragged and all_finite(fixed[name])):
            continue
        entries = ragged[name] if spec.ragged else list(fixed[name])
        for row in np.flatnonzero(flags).tolist():
            bad = ~np.isfinite(entries[row])
            if not bad.any():
                continue
            if not is_feature(spec):
                raise StoreError(f"append {name}: row {row} of the block is not finite")
            channel = int(np.argwhere(bad)[0][-1])
            flags[row] = False
            texts[row] = f"{name}: channel {channel} is not finite or too large for float16 at its scale"


def all_finite(array: np.ndarray) -> bool:
    """Like `np.isfinite(array).all()`, many times as fast for float16, whose isfinite numpy does one by one."""
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    signed, bits = (np.ascontiguousarray(array).reshape(-1).view(kind) for kind in (np.int16, np.uint16))
    return all(
        signed[start : start + CACHED].max() < FLOAT16_INFINITY
        and bits[start : start + CACHED].max() < FLOAT16_MINUS_INFINITY
        for start in range(0, len(bits), CACHED)
    )


# The calibration batch's largest value lands in (2^11, 2^12]: 16 times as much still fits below 65504.
CALIBRATED_EXPONENT = 12


def channel_scale(values: np.ndarray) -> np.ndarray:
    """Scale [D] float32 (powers of two) for features whose calibration batch is `values` [..., D].

    A channel is taken to be at least as large as the mean channel, so that one which happened to be
    silent in the calibration batch has room. Values that are not finite are left out.
    """
    flat = np.abs(values.reshape(-1, values.shape[-1]).astype(np.float64))
    largest = np.where(np.isfinite(flat), flat, 0.0).max(axis=0, initial=0.0)
    largest = np.maximum(largest, largest.mean())
    exponent = np.ceil(np.log2(np.where(largest > 0, largest, 2.0**CALIBRATED_EXPONENT)))
    exponent = np.clip(exponent - CALIBRATED_EXPONENT, -100, 100)
    scale: np.ndarray = np.exp2(exponent).astype(np.float32)
    return scale


def to_stored(values: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """values [..., D] / scale [D] in the stored dtype, C-contiguous. What does not fit becomes inf."""
    if scale is not None and not np.all(scale == 1):
        values = values.astype(np.float32, copy=False) * (1 / scale)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=dtype)
