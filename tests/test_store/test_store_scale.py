"""Large stores: ten million rows, ten thousand shards, a reader that holds only what it gathers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import small_manifest

from store.create import create_store
from store.finalize import finalize_store
from store.format import ArraySpec
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter

ROOT = Path(__file__).parent.parent.parent
READ = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from store import open_store
def private_mb():  # memory of this process's own: page cache that is merely mapped belongs to the system
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
def all_mb():  # not getrusage's maximum, which starts with the parent's
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024
before = private_mb()
began = time.perf_counter()
split = open_store(sys.argv[2])["train"]
opened = time.perf_counter() - began
name = split.names[0]
rss_open = all_mb()
rows = np.random.default_rng(0).integers(0, len(split), int(sys.argv[3]))
keys = [split.keys[int(row)] for row in rows[:20]]
assert split.rows_of(keys).tolist() == rows[:20].tolist()
batch = split.gather(rows, [name])[name]
print(json.dumps({"rows": len(split), "seconds": opened, "rss_open": rss_open, "rss": all_mb(),
                  "grown": private_mb() - before, "gathered": batch.nbytes / 1e6}))
"""


def write_wide(path: Path, rows: int, width: int, shard_rows: int | None) -> Path:
    spec = ArraySpec(name="features/pooled", row_shape=(width,), dtype="float16")
    keys = (f"images/class/{row:08d}.jpg" for row in range(rows))
    create_store(path, small_manifest(), Plan({"train": keys}, shard_rows=shard_rows), [spec])
    block = np.zeros((65_536, width), np.float16)
    with StoreWriter(path, "train", commit_rows=len(block)) as writer:
        for start in range(0, rows, len(block)):
            part = block[: min(len(block), rows - start)]
            part[:, 0] = np.arange(start, start + len(part)) % 1000
            writer.append({"features/pooled": part}, stored=True)
    finalize_store(path, statistics=False)
    return path


def read_elsewhere(path: Path, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-c", READ, str(ROOT), str(path), str(rows)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


@pytest.mark.slow
def test_ten_million_rows_open_in_a_second_and_200_mb(tmp_path: Path) -> None:
    read = read_elsewhere(write_wide(tmp_path / "s.zarr", 10_000_000, 4, None), 1000)
    assert read["rows"] == 10_000_000
    assert read["seconds"] < 1
    assert read["rss_open"] < 200
    assert read["rss"] < 200


def test_a_reader_holds_what_it_gathers(tmp_path: Path) -> None:
    """200 MB of features, of which 5 MB are asked for."""
    read = read_elsewhere(write_wide(tmp_path / "s.zarr", 100_000, 1024, None), 2500)
    assert read["gathered"] == pytest.approx(5.12)
    assert read["grown"] < 5.12 + 25


@pytest.mark.slow
def test_ten_thousand_shards_need_no_ten_thousand_files(tmp_path: Path) -> None:
    """With 256 file descriptors; both ways of mapping."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for width, maps in ((2048, "_OneMap"), (3, "_ShardMaps")):
        path = write_wide(tmp_path / f"{width}.zarr", 10_000, width, 1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            split = open_store(path)["train"]
            batch = split.gather(np.arange(9_999, -1, -1), ["features/pooled"])["features/pooled"]
            assert type(split.array("features/pooled").maps).__name__ == maps  # type: ignore[union-attr]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        np.testing.assert_array_equal(batch[:, 0], np.arange(9_999, -1, -1) % 1000)
        assert len(list((path / "train/features/pooled/c").iterdir())) == 10_000
