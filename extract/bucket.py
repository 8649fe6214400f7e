"""`cli extract DATA --out s3://bucket/a.zarr`: the same extraction into a staging folder, whose shards are uploaded
meanwhile (store/staging.py, store/upload.py).

Several hosts may work on one store, each with its own `--shard-range`; they share nothing but the bucket.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from console.log import get_logger
from console.stop import StopRequest
from extract.config import ExtractConfig
from extract.follow.changes import find_changes
from extract.output import check_same, complete_store
from extract.plan import DifferentStore, make_task, open_data, open_teacher
from extract.result import ExtractObserver, ExtractResult
from extract.run import LocalExecutor, open_local
from files.writing import check_writable
from store import format as names
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
    assert config.url is not None
    check_writable(config.staging_folder, "--staging-dir")
    limit = staging_limit(config)
    with (
        open_staging(config.url, config.staging_folder, limit, break_lock=config.break_lock) as staging,
        open_local(config, observers, stop) as executor,
    ):
        if config.overwrite:
            staging.delete()
            executor.config = config = config.model_copy(update={"overwrite": False})
        result = ExtractResult(store=config.out)
        plan(executor, staging)
        if not staging.complete and not staging.assembled:
            encode(executor, staging, result)
        if not staging.complete:
            complete(executor, staging, result)
        if staging.complete and not result.complete:  # an earlier run or another host did it
            read_complete(config, result)
        return result


def plan(executor: LocalExecutor, staging: Staging) -> None:
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
        check_unchanged(executor.config, staging)
    elif not staging.assembled:
        executor.plan()


def encode(executor: LocalExecutor, staging: Staging, result: ExtractResult) -> None:
    """Encode what the bucket lacks of this process's shards, and return when it is there."""
    stop = executor.stop
    with staging.uploading(executor.config.shards) as uploader:
        executor.wait_for_room = lambda: uploader.wait_for_room(lambda: stop.requested)
        executor.between = uploader.check
        executor.encode(result)
        uploader.finish(executor.raise_if_stopped)


def complete(executor: LocalExecutor, staging: Staging, result: ExtractResult) -> None:
    """Put the store together, if all shards are in the bucket; one process does it."""
    with staging.planning(executor.raise_if_stopped):
        staging.pull()  # another host may have been faster
        if staging.complete:
            return
        own_all = executor.config.shards is None
        if not staging.assembled and (own_all or staging.committed):
            complete_store(staging.store, own_all=own_all, moments=staging.moments())
        result.read_store(staging.store)
        if result.complete:
            staging.publish()


def read_complete(config: ExtractConfig, result: ExtractResult) -> None:
    """Fill in what a complete store records, all of which is in the bucket."""
    store = open_store(config.out)
    result.complete, result.task = True, store.manifest.task
    result.random_weights = store.manifest.teacher.random_weights
    result.batch_size, result.fingerprint = store.manifest.batch_rows, store.fingerprint
    result.splits = dict(store.manifest.splits)
    result.rows = sum(result.splits.values())
    result.bad = sum(int((~split.valid).sum()) for split in store.values())


def check_unchanged(config: ExtractConfig, staging: Staging) -> None:
    """Raises DifferentStore when the complete store was made with other options, or the data set has changed since."""
    teacher = open_teacher(config)
    task = make_task(config, open_data(config), teacher)
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
        raise DifferentStore(
            f"{staging.url}: the data set has changed: {changes.describe()}. A store at a URL is not updated in place: "
            "copy it to a folder (cli copy), extract there with the same options, and copy it back; or pass --overwrite"
        )


def staging_limit(config: ExtractConfig) -> int:
    """Bytes of shards that may wait for their upload."""
    if config.staging_gb is not None:
        return int(config.staging_gb * 1e9)
    folder = config.staging_folder
    while not folder.exists():
        folder = folder.parent
    return int(FREE_SHARE * shutil.disk_usage(folder).free)
