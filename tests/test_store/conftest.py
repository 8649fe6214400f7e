"""Small real stores, made with the store's own writer."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for store_samples, here and in subprocesses' scripts

from store_samples import small_arrays, small_manifest, write_rows

from store.create import create_store
from store.finalize import finalize_store
from store.keys import Plan


@pytest.fixture(scope="session")
def memory_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on a memory disk where there is room: these tests sync hundreds of files."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 500_000_000:
        return shared
    return tmp_path_factory.mktemp("disk")


@pytest.fixture
def tmp_path(memory_disk: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory_disk, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


MakeStore = Callable[..., Path]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """make_store(train=100, val=10, complete=True, shard_rows=64) → path."""

    def make(
        name: str = "test.zarr",
        *,
        complete: bool = True,
        shard_rows: int = 64,
        batch_rows: int = 8,
        **splits: int,
    ) -> Path:
        path = tmp_path / name
        counts = splits or {"train": 100, "val": 10}
        keys = {split: [f"{split}/{row:05d}.jpg" for row in range(count)] for split, count in counts.items()}
        plan = Plan(keys, batch_rows=batch_rows, shard_rows=shard_rows)
        create_store(path, small_manifest(), plan, small_arrays())
        if complete:
            for split in counts:
                write_rows(path, split)
            finalize_store(path)
        return path

    return make
