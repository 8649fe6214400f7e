"""The local side of a store that is written to a URL: its plan and what is committed, as the bucket has them.

    <folder>/store.zarr    the staging store: plan, commit logs, and the shards that are not uploaded yet
    <folder>/plan.json     which plan of the bucket it belongs to
    <folder>/lock          held by the one process that works here

The bucket has, while the store is being written, what a local one has at the same keys: the plan (keys, metadata, the job),
finished shards, and in `.work` the logs of their rows, with a record each (upload.py). The root's zarr.json calls it
incomplete. So any host can continue: `pull` brings plan and logs here; shards stay where they are.

In the end, small arrays, checksums and notes are put together here as for every store and sent (`publish`); the root's
zarr.json that says complete comes last, then `.work` is deleted.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from files.locking import locked
from files.writing import replace_file
from store.errors import LockedError, StoreError, disk_errors
from store.format import NOTES_FOLDER, WORK_FOLDER
from store.job import Job, features_job, log_path, read_commits
from store.metadata import ZARR_JSON, parse_manifest, read_root, recorded_checksum
from store.remote import FIRST_PAUSES_S, LONG_PAUSES_S, Entry, RemoteFiles, refuse_web_server, same_content
from store.remote_locks import LOCKS, RemoteLock
from store.shards import PARTIAL, Layout, crc32c
from store.statistics import Moments
from store.upload import (
    UPLOADS,
    Sent,
    Shard,
    Uploader,
    is_committed,
    is_finished,
    mapped,
    sent_path,
    shard_files,
)

PLAN = f"{WORK_FOLDER}/plan.json"
PLAN_WAIT_S = 1.0
# How many files up to this size are sent or deleted at the same time.
SMALL_BYTES, SMALL_FILES = 1024 * 1024, 10

log = logging.getLogger(__name__)


class Staging:
    """One store at a URL, and what of it is here. Made by `open_staging`.

    Attributes:
        store: the staging store, an ordinary store that is being written.
        complete: the store at the URL is complete.

    Raises StoreError for an address that cannot be written to.
    """

    def __init__(self, url: str, folder: Path, limit: int, *, break_lock: bool = False) -> None:
        refuse_web_server(url)
        self.url, self.folder, self.limit, self.break_lock = url, folder, limit, break_lock
        self.store = folder / "store.zarr"
        self.remote = RemoteFiles(url, LONG_PAUSES_S)
        self.complete = False

    @property
    def assembled(self) -> bool:
        """Whether the staging store is complete, and only its upload may not be."""
        if not (self.store / ZARR_JSON).exists() or features_job(self.store) is not None:
            return False
        return parse_manifest(read_root(self.store), str(self.store)).complete

    # -- the state of the bucket comes here -------------------------------------------------------

    def pull(self) -> bool:
        """Have the plan and the logs of all committed shards here; False when nothing is planned yet.

        Raises StoreError for an address that holds something else, or does not answer.
        """
        found = self._find()
        if ZARR_JSON not in found:
            self._forget()
            return False
        if self.complete:
            self._forget()
            self._clean(key for key in found)
            return True
        self._pull_plan()
        if not self.assembled:
            self._pull_logs(found)
        return True

    def look(self, staged: Path) -> int | None:
        """For a dry run: how many rows are committed, None when nothing is planned yet. Has the plan here, not the logs.

        staged: the staging folder of the run, whose rows count, too, if they are of this plan. Raises as `pull`, and
        when the address cannot be written to.
        """
        found = self._find()
        self.remote.check_writable(f"{LOCKS}/check-{secrets.token_hex(8)}")
        if ZARR_JSON not in found or self.complete:
            return 0 if self.complete else None
        self._pull_plan()
        job, mark = self.job, staged / "plan.json"
        is_own = mark.exists() and mark.read_bytes() == (self.folder / "plan.json").read_bytes()
        rows = 0
        for shard in self.shards:
            first, stop = job.shard_range(*shard)
            record = sent_path(self.store, job, shard)
            sent = self._read_sent(record) if self._key(record) in found else None
            if sent is not None and is_committed(job, shard, sent, found):
                rows += stop - first
            elif is_own and not sent_path(staged / "store.zarr", job, shard).exists():
                commits = read_commits(log_path(staged / "store.zarr", job, *shard))
                rows += commits[-1].stop - first if commits else 0
        return rows

    def check_overwrite(self) -> None:
        """Raises StoreError when `delete` would delete something that is not a store, or the address is not writable."""
        self._find_store()
        self.remote.check_writable(f"{LOCKS}/check-{secrets.token_hex(8)}")

    def _find(self) -> dict[str, Entry]:
        """The files at the URL, of which `complete` is known then. Raises StoreError."""
        found = self.remote.listing(pauses_s=FIRST_PAUSES_S)
        if ZARR_JSON in found:
            self.complete = self._is_complete()
        elif found and not any(key.startswith(f"{WORK_FOLDER}/") for key in found):
            raise StoreError(
                f"{self.url}: exists and is no store: a store needs a place of its own, choose another address"
            )
        return found

    def _is_complete(self) -> bool:
        try:
            root = json.loads(self.remote.read(ZARR_JSON))
        except (ValueError, FileNotFoundError) as error:
            raise StoreError(f"{self.url}/{ZARR_JSON}: not valid JSON ({error})") from error
        return parse_manifest(root, self.url).complete

    def _pull_plan(self) -> None:
        try:
            content = self.remote.read(PLAN)
            plan: dict[str, Any] = json.loads(content)
        except (FileNotFoundError, ValueError) as error:
            raise StoreError(
                f"{self.url}: an incomplete store that was not begun by an extraction to this address ({PLAN} is "
                "missing): choose another address, or pass --overwrite"
            ) from error
        mark = self.folder / "plan.json"
        if mark.exists() and mark.read_bytes() == content and (self.store / ZARR_JSON).exists():
            return
        self._forget()
        with self._pool(SMALL_FILES) as pool:
            list(pool.map(self._download, [key for key in plan["files"] if key != ZARR_JSON]))
        self._download(ZARR_JSON)
        replace_file(mark, content)

    def _pull_logs(self, found: Mapping[str, Entry]) -> None:
        """For each shard: here what the bucket has committed; what is here alone stays, to be continued or sent."""
        job = self.job
        with self._pool() as pool:
            list(pool.map(lambda shard: self._pull_shard(job, shard, found), self.shards))

    def _pull_shard(self, job: Job, shard: Shard, found: Mapping[str, Entry]) -> None:
        log_file, record = log_path(self.store, job, *shard), sent_path(self.store, job, shard)
        sent = Sent.read(record)
        if self._key(log_file) in found and self._key(record) in found:
            if sent is None:
                sent = self._read_sent(record)
            if sent is not None and is_committed(job, shard, sent, found):
                if not record.exists() or not is_finished(self.store, job, shard):
                    self._download(self._key(log_file))
                    # Written by a file system that shows parts of files?
                    if not is_finished(self.store, job, shard):
                        log_file.unlink()
                        return
                    for key in shard_files(job, shard).values():  # what was written of it here
                        for ending in ("", PARTIAL, f".zstd{PARTIAL}"):
                            (self.store / f"{key}{ending}").unlink(missing_ok=True)
                    replace_file(record, sent.to_json())
                return
        if record.exists():
            log.warning(
                "%s: rows of shard %d of %s are not in the bucket any more, or not as they were sent: they are "
                "encoded again",
                self.url,
                shard[1],
                shard[0],
            )
            log_file.unlink(missing_ok=True)
            record.unlink()

    def _read_sent(self, record: Path) -> Sent | None:
        try:
            return Sent.from_json(self.remote.read(self._key(record)))
        except (FileNotFoundError, StoreError):
            return None

    def pull_notes(self) -> Path:
        """The folder with a copy of the notes of a complete store."""
        with self._pool() as pool:
            list(pool.map(self._download, self.remote.listing(NOTES_FOLDER)))
        return self.store / NOTES_FOLDER

    # -- what is here goes to the bucket ----------------------------------------------------------

    def push_plan(self) -> None:
        """Make the plan of the staging store that of the URL. The caller holds `planning`."""
        # Files of a plan that was not sent to its end.
        self._delete_all(key for key in self.remote.listing() if not key.startswith(f"{LOCKS}/"))
        files = self._files()
        content = json.dumps({"plan": secrets.token_hex(16), "files": files}).encode()
        self.remote.write(PLAN, content)
        replace_file(self.folder / "plan.json", content)
        self._send([key for key in files if key != ZARR_JSON], {})
        self.remote.write(ZARR_JSON, (self.store / ZARR_JSON).read_bytes())

    @contextmanager
    def uploading(self, shards: tuple[int, int | None] | None) -> Iterator[Uploader]:
        """Send finished shards in the background; those of the range of numbers, None for all, are locked meanwhile."""
        every = self.shards
        first, end = shards or (0, None)
        end = len(every) if end is None else min(end, len(every))
        lock = RemoteLock(self.remote, "shards", first, end, break_lock=self.break_lock)
        try:
            mine = every[first:end]
            with Uploader(self.store, self.job, mine, self.url, self.limit, lock.check) as uploader:
                yield uploader
        finally:
            lock.release()

    @property
    def committed(self) -> bool:
        """Whether all shards were in the bucket, as they were sent, when `pull` was called."""
        return all(sent_path(self.store, self.job, shard).exists() for shard in self.shards)

    def moments(self) -> dict[tuple[str, str], dict[int, Moments]]:
        """(split, array) → shard → what the uploads have computed for the statistics."""
        job = features_job(self.store)
        known: dict[tuple[str, str], dict[int, Moments]] = {}
        for split, number in self.shards if job is not None else []:
            sent = Sent.read(sent_path(self.store, self.job, (split, number)))
            for name, moments in sent.moments.items() if sent is not None else ():
                known.setdefault((split, name), {})[number] = moments
        return known

    def fetch(self, arrays: Sequence[str]) -> None:
        """Have the shards of these arrays of the complete staging store here, too. Raises StoreError for damaged ones."""

        def download(key: str) -> None:
            data = b"".join(self.remote.blocks(key))
            array, _, rest = key.partition("/c/")
            expected = recorded_checksum(self._record, array, int(rest.partition("/")[0]))
            got = len(data), crc32c(np.frombuffer(data, np.uint8))
            if expected not in (None, got):
                raise StoreError(
                    f"{self.url}/{key}: is damaged: {got[0]} bytes with crc32c {got[1]:08x}, expected {expected}; pass "
                    "--overwrite to extract everything again"
                )
            with disk_errors(self.store / key):
                replace_file(self.store / key, data)

        keys = [key for key in self._shard_keys() if key.partition("/")[2].partition("/c/")[0] in arrays]
        found = self.remote.listing()
        missing = [key for key in keys if not (self.store / key).exists()]
        needed = sum(found[key].size for key in missing if key in found)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise StoreError(
                f"{self.folder}: {needed / 1e9:.2f} GB of features are to be read again, {free / 1e9:.2f} GB are free: "
                "free some space, or run the same command again with another --staging-dir or without --logits"
            )
        with self._pool() as pool:
            list(pool.map(download, missing))

    def _record(self, file: str) -> Mapping[str, Any]:
        path = self.store / file
        return json.loads(path.read_bytes()) if path.exists() else {}

    def publish(self) -> None:
        """Send everything that is not there yet, the root's zarr.json last, and delete what was only for the work."""
        found = self.remote.listing()
        files = self._files()
        expected = {*files, *self._shard_keys()}
        missing = sorted(key for key in expected if key not in found and not (self.store / key).exists())
        if missing:
            raise StoreError(
                f"{self.url}/{missing[0]}: was deleted from the bucket after its upload ({len(missing)} files in all): "
                "pass --overwrite to extract everything again"
            )
        self._send([key for key in files if key != ZARR_JSON], found)
        for key in found:
            if key not in expected and not key.startswith(f"{WORK_FOLDER}/"):
                self.remote.delete(key)
        self.remote.write(ZARR_JSON, (self.store / ZARR_JSON).read_bytes())
        self.complete = True
        # Every shard is there: no lock of one matters any more. This process's own goes with its owner.
        self._clean(key for key in self.remote.listing(WORK_FOLDER) if not key.startswith(f"{LOCKS}/store-"))
        self._forget()

    def delete(self) -> None:
        """Delete the store at the URL, for --overwrite. Raises LockedError while a process is writing to it."""
        found = self._find_store()
        locks = [
            self.lock("store", break_lock=self.break_lock),
            RemoteLock(self.remote, "shards", 0, 1 << 62, break_lock=self.break_lock),
        ]
        try:
            self._forget()
            self.remote.delete(ZARR_JSON)
            self._delete_all(key for key in found if not key.startswith(f"{LOCKS}/"))
        finally:
            for lock in locks:
                lock.release()

    def _find_store(self) -> dict[str, Entry]:
        """The files at the URL. Raises StoreError when they are something else than a store."""
        found = self.remote.listing(pauses_s=FIRST_PAUSES_S)
        if found and not any(key == ZARR_JSON or key.startswith(f"{WORK_FOLDER}/") for key in found):
            raise StoreError(
                f"--overwrite deletes stores only: {self.url} is something else, choose another --out"
            )
        return found

    @contextmanager
    def planning(self, between: Callable[[], None] = lambda: None) -> Iterator[None]:
        """One process at a time plans or completes the store; others wait. between: called while waiting; may raise."""
        told = False
        while True:
            try:
                lock = self.lock("store", break_lock=self.break_lock)
                break
            except LockedError as error:
                if not told:
                    told = True
                    log.info("%s", str(error).partition("; wait for it")[0])
                between()
                time.sleep(PLAN_WAIT_S)
        try:
            yield
        finally:
            lock.release()

    def lock(self, what: str, *, break_lock: bool = False) -> RemoteLock:
        return RemoteLock(self.remote, what, 0, 1, break_lock=break_lock)

    # -- how it is done ---------------------------------------------------------------------------

    @property
    def job(self) -> Job:
        job = features_job(self.store)
        if job is None:
            raise StoreError(
                f"{self.store}: no extraction is under way in this folder; delete it and try again"
            )
        return job

    @property
    def shards(self) -> list[Shard]:
        job = self.job
        return [(split, first // job.shard_rows) for split, first, _ in job.units()]

    def _shard_keys(self) -> Iterator[str]:
        """The keys of all shard files of a complete staging store, those that are in the bucket alone included."""
        nodes = read_root(self.store)["consolidated_metadata"]["metadata"]
        for name, node in nodes.items():
            if node["node_type"] == "array":
                layout = Layout.from_metadata(node, name)
                yield from (f"{name}/{layout.shard_key(shard)}" for shard in range(layout.shards))

    def _files(self) -> list[str]:
        """The keys of the files that are here, without what is being written and locks."""
        keys = [self._key(path) for path in self.store.rglob("*") if path.is_file()]
        return sorted(
            key for key in keys if not (key.endswith(PARTIAL) or f"/{LOCKS.rpartition('/')[2]}/" in key)
        )

    def _send(self, keys: list[str], found: Mapping[str, Entry]) -> None:
        """Write these files, but those that a listing of the bucket has already."""

        def send(key: str) -> None:
            path = self.store / key
            if not path.stat().st_size:
                self.remote.write(key, b"")
                return
            with mapped(path) as data:
                if not same_content(found.get(key), data):
                    self.remote.write(key, data)

        small = [key for key in keys if (self.store / key).stat().st_size <= SMALL_BYTES]
        for some, count in ((set(keys) - set(small), UPLOADS), (small, SMALL_FILES)):
            with self._pool(count) as pool:
                list(pool.map(send, some))

    def _download(self, key: str) -> None:
        path = self.store / key
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, b"".join(self.remote.blocks(key)))

    def _clean(self, keys: Iterable[str]) -> None:
        """Delete those of the files that only the work needed; the plan last, which tells what they are."""
        work = [key for key in keys if key.startswith(f"{WORK_FOLDER}/")]
        self._delete_all(key for key in work if key != PLAN)
        if PLAN in work:
            self.remote.delete(PLAN)

    def _delete_all(self, keys: Iterable[str]) -> None:
        with self._pool(SMALL_FILES) as pool:
            list(pool.map(self.remote.delete, keys))

    def _forget(self) -> None:
        """Delete the staging store. The mark goes first: without it, what is left is not used."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.store, ignore_errors=True)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.store).as_posix()

    def _pool(self, requests: int = UPLOADS) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(requests, "store-staging")


@contextmanager
def open_staging(url: str, folder: Path, limit: int, *, break_lock: bool = False) -> Iterator[Staging]:
    """The staging folder of a store at a URL, for this process alone.

    limit: bytes of shards that may wait in it. Raises StoreError for an address that cannot be written to,
    LockedError while another process of this machine works in the folder.
    """
    staging = Staging(url, folder, limit, break_lock=break_lock)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    def refuse(waited_s: float) -> None:
        raise LockedError(
            f"{url}: another process of this machine is writing it (staging folder {folder}); wait for it, or give each "
            "process its own --shard-range"
        )

    with locked(folder / "lock", refuse):
        yield staging
        if staging.complete:
            shutil.rmtree(folder, ignore_errors=True)
