"""verify finds what is wrong, and only that; repair deletes leftovers, and only those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import files_of, small_arrays, small_block, small_manifest, write_rows

from store.create import create_store
from store.errors import LockedError, StoreError
from store.finalize import finalize_store
from store.keys import Plan
from store.reader import open_store
from store.verify import repair_store, verify_store
from store.writer import StoreWriter


def data_files(store: Path) -> list[Path]:
    return [path for path in sorted(store.rglob("c/**/*")) if path.is_file()]


def test_a_good_store_has_no_findings(make_store: Any) -> None:
    path = make_store(train=200, val=3, empty=0)
    assert verify_store(path) == []


def test_invalid_rows_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    create_store(path, small_manifest(), Plan({"train": ["a", "b"]}), small_arrays())
    with StoreWriter(path, "train") as writer:
        writer.append(small_block(0, 2), valid=np.array([True, False]), reasons=["", "truncated"])
    finalize_store(path)
    assert verify_store(path) == []


def test_a_flipped_byte_in_any_data_file_is_found(make_store: Any) -> None:
    """Every file, at its first, last and a few random bytes."""
    path = make_store(train=100, val=3)
    generator = np.random.default_rng(0)
    for file in data_files(path):
        good = file.read_bytes()
        for position in {0, len(good) - 1, *generator.integers(0, len(good), 2).tolist()}:
            bad = bytearray(good)
            bad[position] ^= 1 << int(generator.integers(8))
            file.write_bytes(bad)
            findings = verify_store(path)
            assert any(str(file) in finding.path for finding in findings), (file, position)
        file.write_bytes(good)
    assert verify_store(path) == []


def test_findings_name_shard_and_rows(make_store: Any) -> None:
    path = make_store(train=200)
    shard = path / "train/features/pooled/c/1/0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    (path / "train/features/grid/c/2/0/0/0").unlink()
    label = path / "train/targets/label/c/0"
    label.write_bytes(label.read_bytes()[:-1])
    texts = [str(finding) for finding in verify_store(path)]
    assert any("features/pooled/c/1/0 (rows 64:128): crc32c differs" in text for text in texts)
    assert any("features/grid/c/2/0/0/0 (rows 128:192): shard is missing" in text for text in texts)
    assert any("targets/label/c/0 (rows 0:200)" in text and "are recorded" in text for text in texts)


def test_reading_damaged_shards_is_refused_by_name(make_store: Any) -> None:
    path = make_store(train=200)
    split = open_store(path)["train"]
    shard = path / "train/features/pooled/c/1/0"
    good = shard.read_bytes()
    shard.write_bytes(good[:-10])
    with pytest.raises(StoreError, match=r"features/pooled/c/1/0 \(rows 64:128\): .* bytes, expected"):
        split.gather([0, 70], ["features/pooled"])
    shard.unlink()
    with pytest.raises(StoreError, match=r"pooled/c/1/0 \(rows 64:128\): shard is missing"):
        open_store(path)["train"].gather([0, 70], ["features/pooled"])
    shard.write_bytes(good[:-10] + bytes(10))
    with pytest.raises(StoreError, match="index is damaged"):
        open_store(path)["train"].gather([70], ["features/pooled"])


def test_metadata_that_was_changed_is_found(make_store: Any) -> None:
    path = make_store(train=10)
    file = path / "train/features/pooled/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"][0] = 11
    file.write_text(json.dumps(metadata))
    assert any("differs from the copy" in finding.problem for finding in verify_store(path))


@pytest.mark.parametrize(
    ("name", "index", "value", "problem"),
    [
        ("features/pooled", (7, 3), np.nan, "row 7 is valid, but not finite"),
        ("features/grid", (7, 1, 1, 3), np.inf, "row 7 is valid, but not finite"),
        ("targets/boxes/values", (9, 2), np.nan, "row 7 is valid, but not finite"),
        ("targets/boxes/offsets", 3, 999, "do not ascend"),
        ("targets/boxes/offsets", 100, 151, "but targets/boxes/values has 150 entries"),
        ("keys/rows", 5, 6, "look-up index does not belong"),
        ("keys/values", 0, 255, "invalid start byte"),
        ("valid", 7, False, "row 7 is invalid, but has features"),
    ],
)
def test_wrong_values_with_right_checksums_are_found(
    make_store: Any, name: str, index: Any, value: Any, problem: str
) -> None:
    """Damage that came before the checksum: written through the commit record."""
    from store.metadata import read_json, write_json
    from store.shards import Layout, crc32c

    path = make_store(train=100)
    layout = Layout.from_metadata(read_json(path / "train" / name / "zarr.json"), name)
    first = index[0] if isinstance(index, tuple) else index
    shard, row = divmod(first, layout.shard_rows)
    file = path / "train" / name / layout.shard_key(shard)
    data = bytearray(file.read_bytes())
    values = np.frombuffer(data, layout.dtype, layout.rows_in(shard) * int(np.prod(layout.row_shape)))
    values = values.reshape(layout.rows_in(shard), *layout.row_shape)
    values[(row, *index[1:]) if isinstance(index, tuple) else row] = value
    file.write_bytes(data)
    for record_file in (path / ".commits/train.json", path / ".commits/train.keys.json"):
        record = read_json(record_file)
        if name in record:
            record[name][shard][1] = crc32c(bytes(data))
            write_json(record_file, record)
    assert any(problem in str(finding) for finding in verify_store(path)), verify_store(path)


def test_incomplete_store_says_how_far(make_store: Any) -> None:
    path = make_store(complete=False, train=200, val=10)
    write_rows(path, "train", row_range=(0, 64))
    expected = "incomplete: train 64 of 200 rows, val 0 of 10 rows"
    assert [expected in str(finding) for finding in verify_store(path)] == [True]
    with pytest.raises(
        StoreError,
        match=f"{expected}; the command that began it resumes it, with all its options: cli extract",
    ):
        open_store(path)


def test_repair_drops_leftovers_only(make_store: Any) -> None:
    path = make_store(train=100)
    before = files_of(path)
    (path / "train/features/pooled/c/9").mkdir()
    (path / "train/features/pooled/c/9/0.partial").write_bytes(b"x")
    (path / ".work/features.creating").mkdir(parents=True)
    (path / ".work/features.creating/job.json").write_text("{")
    (path / ".partial-zarr.json").write_text("{")  # killed while the manifest was replaced
    problems = [str(finding) for finding in verify_store(path)]
    assert len(problems) == 3
    assert len(repair_store(path)) == 3
    assert verify_store(path) == []
    assert files_of(path) == before


def test_repair_keeps_what_can_be_resumed(make_store: Any) -> None:
    path = make_store(complete=False, train=100)
    with StoreWriter(path, "train") as writer:
        writer.append(small_block(0, 70))
    before = files_of(path)
    assert any(name.endswith(".partial") for name in before)
    assert repair_store(path) == []
    assert files_of(path) == before


def test_lock_of_a_dead_writer_is_a_leftover(make_store: Any) -> None:
    path = make_store(complete=False, train=100)
    locks = path / ".work/features/locks"
    locks.mkdir()
    with StoreWriter(path, "train", (0, 64)) as writer:
        owner = json.loads(writer._lock.path.read_text())
        with pytest.raises(LockedError, match=r"being written: train rows 0:64, process \d+ on"):
            repair_store(path)  # a temporary file may be the live writer's
    (locks / "dead.lock").write_text(json.dumps({**owner, "pid": 2**22 + 1}))
    assert [Path(name).name for name in repair_store(path)] == ["dead.lock"]


def test_stray_file_in_an_array_is_found(make_store: Any) -> None:
    path = make_store(train=10)
    (path / "train/valid/c/7").write_bytes(b"?")
    assert [finding.problem for finding in verify_store(path)] == ["file does not belong to the array"]
    assert repair_store(path) == []


def test_damage_to_committed_rows_of_an_unfinished_store_is_found(make_store: Any) -> None:
    path = make_store(complete=False, train=100)
    with StoreWriter(path, "train") as writer:
        writer.append(small_block(0, 70))
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and "/c/" in str(file) and "keys" not in str(file)
    )
    files += sorted(path.glob(".work/features/train/*.log"))
    assert len(files) == 6  # two arrays and one log for each of two shards
    assert len(verify_store(path)) == 1  # incomplete
    for file in files:
        good = file.read_bytes()
        file.write_bytes(bytes([good[0], good[1] ^ 1]) + good[2:])
        assert [finding.path for finding in verify_store(path)][1:] == [str(file)]
        file.write_bytes(good)
    assert len(verify_store(path)) == 1
