"""A new version of a store: what is reused, what is written, and that no kill leaves a mixture."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from store_samples import files_of
from test_store_crash import KILLED, die_at_call, exit_code, in_child
from version_writer import (
    BROKEN,
    FIRST,
    RELABELED,
    REPLACED,
    arrays_with_images,
    build,
    first_version,
    new_rows,
    second_version,
)

from store.errors import StoreError
from store.reader import open_store
from store.verify import verify_store
from store.version import bytes_to_write, can_link, publish_version, write_version


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    new_rows(tmp_path / "encoded.zarr")
    return tmp_path / "encoded.zarr"


def test_rows_keep_their_values_or_get_those_of_their_source(tmp_path: Path, encoded: Path) -> None:
    first_version(tmp_path / "first.zarr")
    build(tmp_path / "second.zarr", encoded)
    assert verify_store(tmp_path / "second.zarr") == []
    old, new, fresh = (open_store(tmp_path / f"{n}.zarr") for n in ("first", "second", "encoded"))
    assert new.splits == ["train", "test"]
    assert list(new["test"].keys) == ["b.jpg"]
    train = new["train"]
    assert len(train) == FIRST
    for row, key in enumerate(train.keys):
        source = fresh["train"] if key.startswith("new") else old["train"]
        origin = (
            int(key.removeprefix("new").removesuffix(".jpg"))
            if key.startswith("new")
            else source.keys.find(key)
        )
        for name in ("features/pooled", "features/grid", "sizes", "content"):
            got = train.gather([row], [name])[name]
            expected = source.gather([origin], [name])[name]
            if row == BROKEN and name.startswith("features"):
                assert np.isnan(got).all()
            elif row == BROKEN and name == "sizes":
                assert not got.any()
            else:
                np.testing.assert_array_equal(got, expected)
        for name in ("targets/boxes/values", "targets/boxes/classes", "images/encoded/values"):
            got, expected = train.ragged([row], name)[0], source.ragged([origin], name)[0]
            if row == BROKEN:
                assert len(got) == 0
            elif row == RELABELED and "boxes" in name:
                assert len(got) == 2
            else:
                np.testing.assert_array_equal(got, expected)
    assert train.keys[REPLACED] == "new0.jpg"
    assert train.keys[130] == f"{FIRST - 1}.jpg"
    assert train.read("targets/label")[RELABELED] == 9
    assert np.flatnonzero(~train.valid).tolist() == [BROKEN]
    assert train.reason(BROKEN) == "annotation: broken"
    assert new.fingerprint != old.fingerprint


def test_shards_whose_rows_stay_are_the_same_files(tmp_path: Path, encoded: Path) -> None:
    path = tmp_path / "store.zarr"
    first_version(path)
    before = {file: file.stat().st_ino for file in (path / "train/features").rglob("c/*/*") if file.is_file()}
    store = open_store(path)
    splits = second_version(path, encoded)
    train = splits["train"]
    train.source[:], train.row[:] = 0, np.arange(FIRST)
    train.source[-1], train.row[-1] = 1, 1  # the last shard alone has another row
    train.invalid.clear()
    size = bytes_to_write(store, arrays_with_images(), splits, linked=can_link(path))
    write_version(store, store.manifest, arrays_with_images(), splits)
    publish_version(path)
    pooled = [file for file in before if "pooled" in file.parts]
    assert [file.stat().st_ino == before[file] for file in sorted(pooled)] == [True, True, True, False]
    assert 0 < size < sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_without_hard_links_files_are_copied(
    tmp_path: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "linked.zarr", encoded)

    def refuse(*args: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    build(tmp_path / "copied.zarr", encoded)
    assert files_of(tmp_path / "copied.zarr") == files_of(tmp_path / "linked.zarr")


def test_the_old_version_is_readable_until_the_switch(tmp_path: Path, encoded: Path) -> None:
    path = tmp_path / "store.zarr"
    first_version(path)
    store = open_store(path)
    fingerprint = store.fingerprint
    write_version(store, store.manifest, arrays_with_images(), second_version(path, encoded))
    assert open_store(path).fingerprint == fingerprint
    assert verify_store(path) == []
    publish_version(path)
    assert open_store(path).fingerprint != fingerprint
    assert not (path / ".work").exists()


def test_a_killed_switch_says_so_and_is_finished(tmp_path: Path, encoded: Path) -> None:
    path = tmp_path / "store.zarr"
    first_version(path)
    store = open_store(path)
    write_version(store, store.manifest, arrays_with_images(), second_version(path, encoded))

    def killed(number: int) -> None:
        die_at_call(number)
        publish_version(path)

    assert exit_code(in_child(lambda: killed(12))) == -KILLED
    with pytest.raises(StoreError, match="a killed run was putting a new version in its place"):
        open_store(path)
    publish_version(path)
    assert verify_store(path) == []


def kill_at_every_call(tmp_path: Path, encoded: Path, first: int, step: int) -> int:
    """Kill one run at call `first`, the next at `first` + step, … until a run ends by itself."""
    build(tmp_path / "undisturbed.zarr", encoded)
    undisturbed = files_of(tmp_path / "undisturbed.zarr")
    first_version(tmp_path / "first.zarr")
    number, killed = first, 0
    while True:
        path = tmp_path / f"killed{number}.zarr"

        def run(path: Path = path, number: int = number) -> None:
            shutil.copytree(tmp_path / "first.zarr", path)
            die_at_call(number)
            build(path, encoded)

        code = exit_code(in_child(run))
        assert code in (0, -KILLED)
        build(path, encoded)
        found = files_of(path)
        assert sorted(found) == sorted(undisturbed), number
        assert [name for name in found if found[name] != undisturbed[name]] == [], number
        shutil.rmtree(path)
        if code == 0:
            return killed
        killed += 1
        number += step


def test_killed_at_some_system_calls(tmp_path: Path, encoded: Path) -> None:
    assert kill_at_every_call(tmp_path, encoded, 30, 120) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_system_calls_all_over(tmp_path: Path, encoded: Path) -> None:
    """The states that a killed process can leave; all of them with CRASH_STEP=1."""
    assert kill_at_every_call(tmp_path, encoded, 1, int(os.environ.get("CRASH_STEP", "13"))) >= 19
