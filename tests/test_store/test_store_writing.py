"""Create, write, resume, extend, add: what was appended is what is read, and equal runs make equal files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from store_samples import WIDTH, files_of, small_arrays, small_block, small_manifest, write_rows

from store.create import add_arrays, create_store, extend_store
from store.errors import LockedError, StoreError
from store.finalize import finalize_store
from store.format import logits_array
from store.job import read_commits
from store.keys import Plan
from store.reader import open_store
from store.shards import crc32c
from store.verify import verify_store
from store.writer import StoreWriter


def assert_same_files(one: Path, other: Path) -> None:
    first, second = files_of(one), files_of(other)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []


def assert_rows(store: Path, split: str, rows: int) -> None:
    """The split's rows 0..rows are exactly small_block's."""
    opened = open_store(store)[split]
    want: dict[str, Any] = small_block(0, rows)
    assert len(opened) == rows
    index = np.random.default_rng(0).permutation(rows)
    batch = opened.gather(index, ["features/pooled", "features/grid", "sizes", "content", "targets/label"])
    for name, array in batch.items():
        np.testing.assert_array_equal(array, want[name][index].astype(array.dtype), err_msg=name)
    for name in ("targets/boxes/values", "targets/boxes/classes"):
        for row, entry in zip(index, opened.ragged(index, name), strict=True):
            np.testing.assert_array_equal(entry, want[name][row])
    assert opened.valid.all()


def test_round_trip(make_store: Any) -> None:
    path = make_store(train=200, val=3)
    assert_rows(path, "train", 200)
    assert_rows(path, "val", 3)
    store = open_store(path)
    assert store.manifest.complete
    assert store.splits == ["train", "val"]
    assert store["train"].rows_of(["train/00007.jpg", "train/00199.jpg"]).tolist() == [7, 199]
    assert not (path / ".work").exists()


def test_statistics_are_in_true_units_over_valid_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", 100
    scale = np.exp2(np.arange(WIDTH) - 5).astype(np.float32)
    keys = [str(row) for row in range(rows)]
    create_store(
        path,
        small_manifest(),
        Plan({"train": keys}, shard_rows=64),
        small_arrays(),
        scales={"features/pooled": scale},
    )
    block = small_block(0, rows)
    block["features/pooled"] = block["features/pooled"] * scale * 50 + 7 * scale
    valid = np.arange(rows) % 5 != 0
    with StoreWriter(path, "train") as writer:
        writer.append(block, valid=valid, reasons=["" if ok else "no image" for ok in valid])
    finalize_store(path)
    split = open_store(path)["train"]
    statistics = split.statistics["features/pooled"]
    true = block["features/pooled"][valid].astype(np.float64)
    np.testing.assert_allclose(statistics.mean, true.mean(axis=0), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(statistics.std, true.std(axis=0), rtol=1e-3)
    assert statistics.count == 80
    stored = split.gather(np.flatnonzero(valid), ["features/pooled"])["features/pooled"]
    np.testing.assert_allclose(stored * scale, true, rtol=2.0**-11)
    assert split.reason(5) == "no image"
    assert split.reason(6) == ""
    assert np.isnan(split.gather([5], ["features/grid"])["features/grid"]).all()


def test_a_row_that_overflows_becomes_invalid(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    create_store(path, small_manifest(), Plan({"train": ["a", "b", "c"]}), small_arrays())
    block = small_block(0, 3)
    block["features/grid"][1, 0, 1, 3] = 1e6
    with StoreWriter(path, "train") as writer:
        assert writer.append(block).tolist() == [True, False, True]
    finalize_store(path)
    split = open_store(path)["train"]
    assert split.valid.tolist() == [True, False, True]
    assert split.reason(1).startswith("features/grid: channel 3 is not finite or too large")
    for name in ("features/pooled", "features/grid"):
        stored = split.gather([0, 1, 2], [name])[name]
        assert np.isnan(stored[1]).all()
        assert np.isfinite(stored[[0, 2]]).all()
        assert not np.isinf(stored).any()


@pytest.mark.parametrize("stop_at", [1, 8, 63, 64, 65, 150])
def test_resume_gives_the_same_files(make_store: Any, tmp_path: Path, stop_at: int) -> None:
    undisturbed = make_store("one.zarr", train=200)
    path = make_store("two.zarr", complete=False, train=200)
    writer = StoreWriter(path, "train", commit_rows=16)
    for start, stop in writer.batches():
        writer.append(small_block(start, stop))
        if stop >= stop_at:
            break
    writer.close(commit=False)  # uncommitted rows are lost
    with StoreWriter(path, "train") as writer:
        assert stop_at - 16 <= writer.next_row <= stop_at + 8
        assert writer.next_row % 8 == 0
    write_rows(path, "train")
    finalize_store(path)
    assert_same_files(undisturbed, path)


def test_disjoint_writers_make_the_same_files(make_store: Any) -> None:
    undisturbed = make_store("one.zarr", train=200)
    path = make_store("two.zarr", complete=False, train=200)
    writers = [StoreWriter(path, "train", rows) for rows in ((128, 200), (0, 64), (64, 128))]
    for writer in writers:
        for start, stop in writer.batches():
            writer.append(small_block(start, stop))
        writer.close()
    finalize_store(path)
    assert_same_files(undisturbed, path)


def test_finalising_an_unfinished_store_names_the_rows(make_store: Any) -> None:
    path = make_store(complete=False, train=200)
    write_rows(path, "train", row_range=(0, 64))
    with pytest.raises(StoreError, match=r"split 'train' is incomplete: rows 64:128 of 200 are not written"):
        finalize_store(path)
    with pytest.raises(StoreError, match="incomplete"):
        open_store(path)


def test_second_writer_on_the_same_rows_is_refused(make_store: Any) -> None:
    path = make_store(complete=False, train=200)
    with StoreWriter(path, "train", (64, 200)):
        with pytest.raises(LockedError, match=r"already being written: train rows 64:200, process \d+ on"):
            StoreWriter(path, "train")
        with pytest.raises(LockedError, match="already being written"):
            finalize_store(path)
        StoreWriter(path, "train", (0, 64)).close()
    StoreWriter(path, "train").close()


def test_a_broken_lock_stops_its_owner(make_store: Any) -> None:
    path = make_store(complete=False, train=200)
    first = StoreWriter(path, "train")
    first.append(small_block(0, 8))
    with StoreWriter(path, "train", break_lock=True) as second:
        second.append(small_block(0, 8))
        with pytest.raises(StoreError, match="lock was broken by another process"):
            first.commit()
        first.close()
    write_rows(path, "train")
    finalize_store(path)
    assert_rows(path, "train", 200)


@pytest.mark.parametrize(("before", "after"), [(100, 200), (64, 70), (64, 64), (3, 5), (130, 131), (0, 9)])
def test_appended_rows_equal_a_store_made_at_once(
    make_store: Any, tmp_path: Path, before: int, after: int
) -> None:
    path = make_store(train=before, val=10)
    new = [f"train/{row:05d}.jpg" for row in range(before, after)]
    extend_store(path, {"train": new, "test": ["test/00000.jpg"]})
    for split in ("train", "val", "test"):
        write_rows(path, split)
    finalize_store(path)
    assert_rows(path, "train", after)
    assert_rows(path, "val", 10)
    assert_rows(path, "test", 1)
    assert list(open_store(path)["train"].keys)[before:] == new
    assert_same_files(make_store("at_once.zarr", train=after, val=10, test=1), path)


def test_a_split_without_new_rows_is_not_written_again(make_store: Any) -> None:
    path = make_store(train=100, val=10)
    before = (path / "val/features/grid/c/0/0/0/0").stat()
    extend_store(path, {"train": ["new"]})
    with StoreWriter(path, "val") as writer:
        assert writer.next_row == 10
        assert list(writer.batches()) == []
    write_rows(path, "train")
    finalize_store(path)
    assert (path / "val/features/grid/c/0/0/0/0").stat().st_ino == before.st_ino
    assert_rows(path, "val", 10)


def test_appending_a_known_key_is_refused(make_store: Any) -> None:
    path = make_store(train=10)
    with pytest.raises(StoreError, match=r"key 'train/00003\.jpg' stands for rows"):
        extend_store(path, {"train": ["train/00003.jpg"]})
    assert_rows(path, "train", 10)


def test_logits_are_added_through_commits(make_store: Any) -> None:
    path = make_store(train=200, val=10)
    fingerprint = open_store(path).fingerprint
    logits = np.random.default_rng(0).standard_normal((200, 9)).astype(np.float32)
    job = add_arrays(path, [logits_array("probe", 9)])
    with StoreWriter(path, "train", job=job) as writer:
        writer.append({"logits/probe": logits[:70]})
    assert "logits/probe" not in open_store(path)["train"].names  # not before it is finalised
    assert add_arrays(path, [logits_array("probe", 9)]) == job  # resumes
    with StoreWriter(path, "train", job=job) as writer:
        assert writer.next_row == 70
        writer.append({"logits/probe": logits[70:]})
    with StoreWriter(path, "val", job=job) as writer:
        writer.append({"logits/probe": logits[:10]})
    finalize_store(path, job=job)
    store = open_store(path)
    np.testing.assert_array_equal(store["train"].read("logits/probe"), logits.astype(np.float16))
    assert store.fingerprint == fingerprint
    with pytest.raises(StoreError, match="exist; pass replace=True"):
        add_arrays(path, [logits_array("probe", 9)])
    assert verify_store(path) == []
    job = add_arrays(path, [logits_array("probe", 4)], replace=True)
    assert verify_store(path) == []
    assert "logits/probe" not in open_store(path)["train"].names
    assert_rows(path, "train", 200)
    # New rows have no logits: the probe is to be fitted again.
    for split, rows in (("train", 200), ("val", 10)):
        with StoreWriter(path, split, job=job) as writer:
            writer.append({"logits/probe": logits[:rows, :4]})
    finalize_store(path, job=job)
    extend_store(path, {"val": ["new"]})
    write_rows(path, "val")
    finalize_store(path)
    assert "logits/probe" not in open_store(path)["val"].names
    assert_rows(path, "val", 11)
    assert verify_store(path) == []


def test_wrong_blocks_are_refused_by_name(make_store: Any) -> None:
    path = make_store(complete=False, train=200)
    with StoreWriter(path, "train") as writer:
        block = small_block(0, 4)
        with pytest.raises(StoreError, match=r"missing arrays \['sizes'\], unknown arrays \['size'\]"):
            writer.append({("size" if name == "sizes" else name): array for name, array in block.items()})
        with pytest.raises(StoreError, match=r"features/pooled: shape \(4, 8\), expected \(4, 16\)"):
            writer.append({**block, "features/pooled": block["features/pooled"][:, :8]})
        with pytest.raises(StoreError, match="targets/label: dtype float64, expected int32"):
            writer.append({**block, "targets/label": np.zeros(4)})
        with pytest.raises(StoreError, match="differ in entries of a row"):
            writer.append({**block, "targets/boxes/classes": [np.zeros(9, np.int32)] * 4})
        with pytest.raises(StoreError, match="3 entries, expected one for each of 4 rows"):
            writer.append({**block, "targets/boxes/classes": [np.zeros(0, np.int32)] * 3})
        assert writer.next_row == 0
        writer.append(block)
    with pytest.raises(StoreError, match="is not made of whole shards of 64 rows"):
        StoreWriter(path, "train", (8, 64))
    with pytest.raises(StoreError, match=r"no split 'trian'; valid: \['train'\]"):
        StoreWriter(path, "trian")


def test_rows_beyond_the_plan_are_refused(make_store: Any) -> None:
    path = make_store(complete=False, train=10)
    with (
        StoreWriter(path, "train") as writer,
        pytest.raises(StoreError, match="pass the end of the range at 10"),
    ):
        writer.append(small_block(0, 11))


def committed(path: Path, expected: int) -> bool:
    """Whether another process would find this many rows, at the latest after a while: commits have a thread."""
    deadline = time.monotonic() + 60
    log = path / ".work/features/train/000000.log"
    while time.monotonic() < deadline:
        commits = read_commits(log)
        if commits and commits[-1].stop == expected:
            return True
        time.sleep(0.005)
    return False


def test_every_record_has_every_small_array(make_store: Any) -> None:
    """What is committed of an unfinished store can be read from its logs: record after record, no rows twice."""
    path = make_store(complete=False, train=100)
    write_rows(path, "train", commit_rows=16)
    rows = 0
    for log in sorted(path.glob(".work/features/train/*.log")):
        commits = read_commits(log, check_all=True)
        assert [commit.finished is not None for commit in commits] == [False] * (len(commits) - 1) + [True]
        for commit in commits:
            assert commit.start == rows
            rows = commit.stop
            assert commit.parts["valid"][1] == commit.stop - commit.start
            assert commit.parts["reasons/offsets"][1] == 8 * (commit.stop - commit.start)
    assert rows == 100


def test_commits_come_after_rows_or_seconds(make_store: Any) -> None:
    path = make_store(complete=False, shard_rows=4096, train=4000)
    block = small_block(0, 8)
    with StoreWriter(path, "train") as writer:
        for _ in range(128 + 3):
            writer.append(block)
        assert committed(path, 1024)
        writer.close(commit=False)
    with StoreWriter(path, "train", commit_seconds=0.0) as writer:
        assert writer.next_row == 1024
        writer.append(block)
        assert committed(path, 1032)


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1, 9_000_000])
def test_a_checksum_in_pieces_is_that_of_the_whole(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    whole = int(google_crc32c.extend(7, data.tobytes()))
    assert crc32c(data, 7) == crc32c(data.tobytes(), 7) == whole
    assert crc32c(data[: size // 2 * 2].view(np.float16), 7) == crc32c(data[: size // 2 * 2].tobytes(), 7)


def test_a_checksum_of_a_shard_lets_other_threads_run() -> None:
    """google_crc32c keeps the interpreter's lock for as long as one call takes."""
    sizes: list[int] = []
    whole = google_crc32c.extend

    def noted(start: int, data: memoryview) -> int:
        sizes.append(len(data))
        return int(whole(start, data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(google_crc32c, "extend", noted)
        crc32c(np.zeros(9 << 20, np.uint8))
    assert sizes == [4 << 20, 4 << 20, 1 << 20]
