"""`cli extract DATA --out s3://bucket/a.zarr`: the same extraction into a staging folder, whose shards are uploaded
meanwhile (store/staging.py, store/upload.py).

Several hosts may work on one store, each with its own `--shard-range`; they share nothing but the bucket.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from console.output import get_logger
from extract.config import ExtractConfig
from extract.follow.changes import find_changes
from extract.logits import add_logits, array_of, probed_arrays, training_split
from extract.output import check_same, complete_store
from extract.plan import DifferentStore, ExtractTask, make_task, open_data, open_teacher
from extract.result import ExtractObserver, ExtractResult
from extract.run import Executor, open_executor
from files.writing import check_writable
from processes.stop import StopRequest
from store import format as names
from store.format import Manifest
from store.metadata import parse_manifest, read_root
from store.reader import Store, open_store
from store.staging import Staging, open_staging

log = get_logger("extract")

FREE_SHARE = 0.8  # of the disk's free space that shards may take where no limit is given


def extract_to_url(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest
) -> ExtractResult:
    """`run_extraction` for a URL at `--out`.

    Raises:
        StoreError: when requests fail for longer than they are repeated; the same command continues.
        DifferentStore: when a complete store was made otherwise, or the data set has changed since.
    """
    url, limit, overwrite = str(config.url), staging_limit(config), config.overwrite
    check_writable(config.staging_folder, "--staging-dir")
    config = config.model_copy(update={"overwrite": False})
    with (
        open_staging(url, config.staging_folder, limit, break_lock=config.break_lock) as staging,
        open_executor(config, observers, stop) as executor,
    ):
        if overwrite:
            staging.delete()
        result = ExtractResult(store=config.out)
        plan(executor, staging)
        if not staging.complete and not staging.assembled:
            encode(executor, staging, result)
        if not staging.complete:
            complete(executor, staging, result)
        if staging.complete and not result.complete:  # an earlier run or another host did it
            read_complete(config, result)
        return result


def plan(executor: Executor, staging: Staging) -> None:
    """Have the plan of the bucket here, or make one and send it; a complete store is only compared."""
    planned = staging.pull()
    if not planned:
        with staging.planning(executor.raise_if_stopped):
            planned = staging.pull()  # another host may have been faster
            if not planned:
                executor.plan()
                staging.push_plan()
                return
    if staging.complete:
        config = executor.config
        teacher = open_teacher(config)
        check_unchanged(config, make_task(config, open_data(config), teacher), staging)
    elif not staging.assembled:
        executor.plan()


def encode(executor: Executor, staging: Staging, result: ExtractResult) -> None:
    """Encode what the bucket lacks of this process's shards, and return when it is there."""
    with staging.uploading(executor.config.shards) as executor.uploader:
        executor.encode(result)
        executor.uploader.finish(executor.raise_if_stopped)


def complete(executor: Executor, staging: Staging, result: ExtractResult) -> None:
    """Put the store together, if all shards are in the bucket; one process does it."""
    with staging.planning(executor.raise_if_stopped):
        staging.pull()  # another host may have been faster
        if staging.complete:
            return
        own_all = executor.config.shards is None
        if not staging.assembled and (own_all or staging.committed):
            complete_store(staging.store, own_all=own_all, moments=staging.moments())
        result.read_store(staging.store)
        if not result.complete:
            return
        if executor.config.logits != "none":
            add_all_logits(executor, staging, result)
        staging.publish()


def add_all_logits(executor: Executor, staging: Staging, result: ExtractResult) -> None:
    """What `--logits` asks for, in the staging store: what a probe reads of the bucket's features comes back here."""
    config = executor.config
    if config.logits == names.PROBE:
        staging.fetch(probed_arrays(training_split(open_store(staging.store))))
    result.probe = add_logits(config, executor.observers, executor.stop)


def read_complete(config: ExtractConfig, result: ExtractResult) -> None:
    """Fill in what a complete store records, all of which is in the bucket."""
    store = open_store(config.out)
    if config.logits != "none":
        array = array_of(config.logits, store)
        if array not in training_split(store).names:
            raise not_in_place(f"{config.out}: is complete, without {array}")
    result.read_manifest(store.manifest)
    result.fingerprint = store.fingerprint
    result.splits = dict(store.manifest.splits)
    result.rows = sum(result.splits.values())
    result.bad = sum(int((~split.valid).sum()) for split in store.values())


def check_unchanged(config: ExtractConfig, task: ExtractTask, staging: Staging) -> None:
    """Raises DifferentStore when the complete store was made with other options, or the data set has changed since."""
    store: Store = open_store(staging.url)
    check_same(staging.url, task, store.manifest, config.grid == "auto")
    changes = find_changes(
        store,
        None,
        {name: samples.samples for name, samples in task.splits.items()},
        task.manifest.class_names,
        [spec for spec in task.arrays if spec.name.startswith(names.TARGETS)],
        check_content=config.check_content,
        notes=staging.pull_notes(),
    )
    if changes.any:
        raise not_in_place(f"{staging.url}: the data set has changed: {changes.describe()}")


def not_in_place(found: str) -> DifferentStore:
    return DifferentStore(
        f"{found}. A store at a URL is not updated in place: copy it to a folder (cli copy), run the same command with "
        "the folder at --out, and copy it back; or pass --overwrite"
    )


# -- the dry run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundStore:
    """What is at a URL before an extraction. committed: rows; manifest: of the store; None when nothing is planned."""

    complete: bool
    committed: int | None
    manifest: Manifest | None

    @property
    def state(self) -> str:
        """What a run does there."""
        if self.manifest is None:
            return "starts"
        return "complete" if self.complete else "resumes"


def look_at_url(config: ExtractConfig) -> FoundStore:
    """What a run would find at its URL, which stays as it is.

    Raises StoreError for what ends the run, too: no such bucket, no permission to read or to write, something else there.
    """
    assert config.url is not None
    with tempfile.TemporaryDirectory(prefix="extract-dry-run-") as folder:
        staging = Staging(config.url, Path(folder), 0)
        if config.overwrite:
            staging.check_overwrite()
            return FoundStore(False, None, None)
        committed = staging.look(config.staging_folder)
        if staging.complete:
            return FoundStore(True, committed, open_store(config.url).manifest)
        if committed is None:
            return FoundStore(False, None, None)
        return FoundStore(False, committed, parse_manifest(read_root(staging.store), config.url))


def check_found(config: ExtractConfig, task: ExtractTask, found: FoundStore) -> None:
    """Raises DifferentStore where the run would: other options, or a complete store of a data set that has changed."""
    assert config.url is not None
    if found.manifest is not None:
        check_same(config.url, task, found.manifest, config.grid == "auto")
    if found.complete:
        with tempfile.TemporaryDirectory(prefix="extract-dry-run-") as folder:
            check_unchanged(config, task, Staging(config.url, Path(folder), 0))


def staging_limit(config: ExtractConfig) -> int:
    """Bytes of shards that may wait for their upload."""
    if config.staging_gb is not None:
        return int(config.staging_gb * 1e9)
    folder = config.staging_folder
    while not folder.exists():
        folder = folder.parent
    return int(FREE_SHARE * shutil.disk_usage(folder).free)
