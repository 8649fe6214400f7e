"""`cli extract DATA --out s3://bucket/a.zarr`: the same extraction into a staging folder, whose shards are uploaded
meanwhile (store/staging.py, store/upload.py).

Several hosts may work on one store, each with its own `--shard-range`; they share nothing but the bucket.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from console.log import get_logger
from console.stop import StopRequest
from extract.config import ConfigError, ExtractConfig
from extract.follow.changes import find_changes
from extract.logits import PROBE, add_logits, array_of, probed_arrays, training_split
from extract.metadata import note_probe
from extract.output import check_same, complete_store
from extract.plan import DifferentStore, make_task, open_data, open_teacher
from extract.result import ExtractObserver, ExtractResult
from extract.run import LocalExecutor, open_local
from files.writing import check_writable
from store import format as names
from store.reader import Store, open_store
from store.staging import Staging, open_staging
from store.summary import TARGET_ARRAYS

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
                check_logits(executor.config, staging)
                staging.push_plan()
                return
    if staging.complete:
        check_unchanged(executor.config, staging)
    elif not staging.assembled:
        executor.plan()
        check_logits(executor.config, staging)


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
        if not result.complete:
            return
        if executor.config.logits != "none":
            add_all_logits(executor, staging, result)
        staging.publish()


def add_all_logits(executor: LocalExecutor, staging: Staging, result: ExtractResult) -> None:
    """What `--logits` asks for, in the staging store: what a probe reads of the bucket's features comes back here."""
    config = executor.config
    if config.logits == PROBE:
        staging.fetch(probed_arrays(training_split(open_store(staging.store))))
    result.probe = add_logits(config, executor.observers, executor.stop)
    if result.probe is not None:
        note_probe(staging.store, result.probe)


def check_logits(config: ExtractConfig, staging: Staging) -> None:
    """Raises ConfigError for a probe of cells: it reads all grids, which do not stay on this disk."""
    planned = {spec.name for spec in staging.job.arrays}
    if config.logits == PROBE and planned & {TARGET_ARRAYS["boxes"], TARGET_ARRAYS["mask"]}:
        raise ConfigError(
            "--logits probe of boxes or masks reads the grids of all images, which a store at a URL does not keep on "
            "this disk: extract without it, copy the store to a folder (cli copy) and run cli probe there"
        )


def read_complete(config: ExtractConfig, result: ExtractResult) -> None:
    """Fill in what a complete store records, all of which is in the bucket."""
    store = open_store(config.out)
    if (
        config.logits != "none"
        and (array := array_of(config.logits, store)) not in training_split(store).names
    ):
        raise DifferentStore(
            f"{config.out}: is complete, without {array}. A store at a URL is not updated in place: copy it to a folder "
            "(cli copy), run the same command there, and copy it back; or pass --overwrite"
        )
    result.read_manifest(store.manifest)
    result.fingerprint = store.fingerprint
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
