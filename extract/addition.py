"""`--add-teacher NAME`: the features of a further teacher for the rows of a complete store.

They are encoded by the ordinary extraction, into a store of their own inside the one they are for, which is then put
together with it (store/teachers.py). So an addition resumes, stops and is shared between devices like any extraction, and
the store is as it was until all of it is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from console.output import get_logger
from extract.config import ConfigError, ExtractConfig
from extract.follow.version import changes_of
from extract.output import adopt_rows, extract_lock
from extract.plan import ExtractTask, planned_keys
from store import format as names
from store.errors import StoreError
from store.format import Manifest, of_one_teacher
from store.metadata import ZARR_JSON
from store.reader import open_store
from store.teachers import check_new_teacher, other_images, publish_teacher

log = get_logger("extract")


def begin_addition(config: ExtractConfig) -> ExtractConfig:
    """The configuration that encodes the teacher of `--add-teacher`; without that option, `config` as it is.

    Raises:
        StoreError: for an incomplete or packed store, a name that is taken, an addition that was begun for other rows.
        ConfigError: for options that the store has decided already.
    """
    name = config.add_teacher
    if name is None:
        return config
    store = open_store(config.out)
    store.require_plain("adding a teacher")
    check_new_teacher(store, name, replace=config.overwrite)
    fixed = decided_options(store.manifest)
    wrong = [
        f"--{option} {getattr(config, option)}: the store has {value}, which a further teacher keeps"
        for option, value in fixed.items()
        if option in config.model_fields_set and getattr(config, option) != value
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    folder = config.folder
    if (folder / ZARR_JSON).exists() and not config.overwrite:
        keys = planned_keys(folder)
        if any(list(keys.get(split, ())) != list(rows.keys) for split, rows in store.items()):
            raise StoreError(
                f"{store.location}: teacher {name!r} was begun for other rows than the store has now: start again with "
                "--overwrite"
            )
    bit_depth = store.manifest.preprocessing.bit_depth
    return config.model_copy(update={**fixed, "bit_depth": bit_depth})


def decided_options(manifest: Manifest) -> dict[str, Any]:
    """Options that every teacher of a store has in common: recorded views, and the frames of clips."""
    options: dict[str, Any] = {"views": names.FLIP if manifest.exact_flip else manifest.views}
    for name in ("seed", "frames"):
        if name in manifest.options:
            options[name] = manifest.options[name]
    return options


def addition_task(config: ExtractConfig, task: ExtractTask, *, check: bool = True) -> ExtractTask:
    """The task of encoding a further teacher: the base's rows in their order, and only what is this teacher's.

    A task without `config.base` stays as it is. Raises StoreError, if `check`, when the data set is not that of the store.
    """
    if config.base is None:
        return task
    if check:
        store = open_store(config.base)
        changes = changes_of(config, replace(task, path=config.base))
        if changes.any:
            raise other_images(store, f"the data set has changed: {changes.describe()}")
    kept = (names.SIZES, names.CONTENT)
    return replace(
        adopt_rows(task, config.base),
        path=config.folder,
        arrays=[spec for spec in task.arrays if of_one_teacher(spec.name) or spec.name in kept],
        shard_rows=open_store(config.base).manifest.shard_rows,
    )


def finish_addition(config: ExtractConfig) -> None:
    """Put the encoded features into the store.

    Raises:
        StoreError: when an image changed while they were encoded.
    """
    assert config.base is not None
    assert config.add_teacher is not None
    with extract_lock(config.base):
        publish_teacher(config.base, config.add_teacher)
    store = open_store(config.base)
    own = store.of_teacher(config.add_teacher)
    lost = sum(int(np.count_nonzero(store[name].valid & ~split.valid)) for name, split in own.items())
    if lost:
        log.warning(
            "%s: %d images have no features of teacher %s, and are left out where it teaches: see teachers/%s/reasons",
            *(config.base, lost, config.add_teacher, config.add_teacher),
        )
