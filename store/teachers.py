"""A further teacher's features, encoded into a store of their own and put into a complete store under the teacher's name.

    .work/teachers/<name>/     a store of the same rows in the same order, with this teacher's features

While it is filled, the store around it stays as it was and readable. `publish_teacher` then gives its files second
names below `<split>/teachers/<name>/`, adds their checksums, and writes the manifest last: it is what makes them part of
the store. The encoded store is deleted after that, so a publication that was killed is repeated from the beginning.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from store.create import drop_arrays
from store.errors import StoreError, disk_errors
from store.finalize import commit_record, remove_done
from store.format import (
    CONTENT,
    TEACHERS,
    WORK_FOLDER,
    ArraySpec,
    TeacherSection,
    commits_file,
    of_one_teacher,
)
from store.job import ADDITIONS, DONE
from store.metadata import ZARR_JSON, write_group, write_json, write_manifest
from store.reader import Split, Store, open_store
from store.shards import Layout
from store.version import link_file


def addition_path(store: Path, name: str) -> Path:
    """Where a further teacher's features are encoded."""
    return store / WORK_FOLDER / ADDITIONS / name


def pending_additions(store: Path) -> list[str]:
    """Names of the teachers whose features are being encoded."""
    return sorted(path.parent.name for path in (store / WORK_FOLDER / ADDITIONS).glob(f"[!.]*/{ZARR_JSON}"))


def check_new_teacher(store: Store, name: str, *, replace: bool = False) -> None:
    """Raises StoreError when the store has a teacher of this name.

    One whose publication was killed is no such teacher; with `replace`, only the first one is.
    """
    first = store.manifest.teacher.name
    begun = replace or name in pending_additions(store.path)
    if name in ([first] if begun else store.manifest.teacher_names):
        hint = "choose another name" + ("" if name == first else ", or --overwrite to encode it again")
        raise StoreError(
            f"{store.location}: has a teacher {name!r} already (teachers: {', '.join(store.manifest.teacher_names)}): "
            f"{hint}"
        )


def publish_teacher(path: Path, name: str) -> None:
    """Put the features at `addition_path`, all of them encoded, into the store; may be repeated after a kill.

    Arrays of an earlier teacher of this name are replaced.
    Raises StoreError when the rows, or the bytes of an image, are not those of the store.
    """
    store, folder = open_store(path), addition_path(path, name)
    added = open_store(folder)
    check_same_rows(store, added)
    prefix = f"{TEACHERS}{name}/"
    own = [spec for spec in added.manifest.arrays if of_one_teacher(spec.name)]
    with disk_errors(path):
        drop_arrays(store, [spec.name for spec in store.manifest.arrays if spec.name.startswith(prefix)])
        for split in store.splits:
            for array in stored_arrays(own):
                layout = added[split].array(array).layout
                link_array(folder / split / array, path / split, f"{prefix}{array}", layout)
        for split in store.splits:
            before = commit_record(folder, split)
            record = commit_record(path, split) | {
                f"{prefix}{array}": before[array] for array in stored_arrays(own)
            }
            write_json(path / commits_file(split), dict(sorted(record.items())))
        section = {field: getattr(added.manifest, field) for field in TeacherSection.model_fields}
        named = [spec.model_copy(update={"name": f"{prefix}{spec.name}"}) for spec in own]
        manifest = open_store(path).manifest  # another job may have added arrays meanwhile
        update = {
            "teachers": {**manifest.teachers, name: TeacherSection(**section)},
            "arrays": tuple(sorted([*manifest.arrays, *named], key=lambda spec: spec.name)),
            "added": tuple(sorted([*manifest.added, *(spec.name for spec in named)])),
        }
        write_manifest(path, manifest.model_copy(update=update))
        drop_addition(path, name)


def stored_arrays(specs: list[ArraySpec]) -> list[str]:
    """The arrays of these specs, offsets of ragged ones included."""
    return sorted({spec.name for spec in specs} | {spec.offsets_name for spec in specs if spec.ragged})


def link_array(source: Path, split: Path, name: str, layout: Layout) -> None:
    """Give an array's files second names in another split, metadata included."""
    target = split / name
    shutil.rmtree(target, ignore_errors=True)
    for parent in list(Path(name).parents)[-2::-1]:
        write_group(split / parent)
    target.mkdir(parents=True)
    for shard in range(layout.shards):
        link_file(source / layout.shard_key(shard), target / layout.shard_key(shard))
    link_file(source / ZARR_JSON, target / ZARR_JSON)


def check_same_rows(store: Store, added: Store) -> None:
    """Raises StoreError naming the first row whose key or content is not that of the store."""
    if store.manifest.splits != added.manifest.splits:
        raise other_images(
            store, f"its rows are {store.manifest.splits}, the teacher's {added.manifest.splits}"
        )
    for name, split in store.items():
        check_same_images(store, split, added[name])


def check_same_images(store: Store, split: Split, other: Split) -> None:
    for row, (key, other_key) in enumerate(zip(split.keys, other.keys, strict=True)):
        if key != other_key:
            raise other_images(store, f"row {row} of {split.name} is {key!r}, the teacher's {other_key!r}")
    differs = np.flatnonzero((split.read(CONTENT) != other.read(CONTENT)).any(axis=1))
    if len(differs):
        first = int(differs[0])
        reason = other.reason(first)
        raise other_images(
            store,
            f"{len(differs):,} images have other bytes now, first {split.name} {split.keys[first]}"
            + (f" ({reason})" if reason else ""),
        )


def other_images(store: Store, difference: str) -> StoreError:
    return StoreError(
        f"{store.location}: a further teacher needs the images that the store was made from: {difference}. Run the "
        "store's own extraction first, which follows the data set, then add the teacher with --overwrite"
    )


def drop_addition(store: Path, name: str) -> None:
    """Delete what was encoded for a further teacher. Renamed first: it is there whole or not at all."""
    folder = addition_path(store, name)
    if folder.exists():
        gone = folder.with_name(f".{name}{DONE}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
    work = store / WORK_FOLDER / ADDITIONS
    for gone in work.glob(f".*{DONE}"):
        shutil.rmtree(gone)
    if work.exists() and not any(work.iterdir()):
        work.rmdir()
    remove_done(store)
