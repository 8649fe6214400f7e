"""Builds one store from start to end, taking up whatever an earlier, killed run left.

The crash tests run this in processes that they kill. Run as a script: crash_writer.py STORE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from store_samples import small_arrays, small_block, small_manifest

from store.create import add_arrays, create_store, extend_store
from store.finalize import finalize_store
from store.format import FEATURES_JOB, logits_array
from store.job import pending_jobs
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter

FIRST, ALL = 150, 230
LOGITS = "logits/probe"


def build(path: Path, *, codec: str = "none") -> None:
    """150 rows, logits, 80 more rows (which drops the logits), logits again: all ways of writing a store."""
    if not path.exists():
        arrays = [
            spec.model_copy(update={"codec": codec if spec.direct else "none"}) for spec in small_arrays()
        ]
        keys = {"train": [str(row) for row in range(FIRST)], "val": ["a", "b"]}
        create_store(path, small_manifest(), Plan(keys, batch_rows=8, shard_rows=64), arrays)
    write_features(path)
    if len(open_store(path)["train"]) == FIRST:
        add_logits(path, FIRST)
        extend_store(path, {"train": [str(row) for row in range(FIRST, ALL)]})
        write_features(path)
    add_logits(path, ALL)
    finalize_store(path)


def add_logits(path: Path, train_rows: int) -> None:
    if LOGITS in open_store(path)["train"].names:
        return
    job = add_arrays(path, [logits_array("probe", 3)])
    for split, rows in (("train", train_rows), ("val", 2)):
        with StoreWriter(path, split, job=job, commit_rows=50) as writer:
            for start in range(writer.next_row, rows, 10):
                stop = min(rows, start + 10)
                writer.append({LOGITS: np.arange(start, stop)[:, None] * np.ones(3, np.float32)})
    finalize_store(path, job=job)


def write_features(path: Path) -> None:
    if FEATURES_JOB in pending_jobs(path):
        for split in ("train", "val"):
            with StoreWriter(path, split, commit_rows=16) as writer:
                for start, stop in writer.batches():
                    writer.append(small_block(start, stop))
    finalize_store(path)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
