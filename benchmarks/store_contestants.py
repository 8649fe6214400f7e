"""Who takes part in benchmarks/store.py: the store, a raw memory map, and the peers that are installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from store.create import create_store
from store.finalize import finalize_store
from store.format import ArraySpec, Manifest, Preprocessing, TeacherSpec
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter

BATCH = 64
BLOCK = 1024
NAME = {"pooled": "features/pooled", "grid": "features/grid"}
Gather = Callable[[np.ndarray, np.ndarray], None]  # rows [64], out [64, ...]


@dataclass(frozen=True)
class Case:
    """One shape of features. `slow_rows` bounds what peers that write a file a row are given."""

    name: str
    rows: int
    row_shape: tuple[int, ...]
    slow_rows: int

    @property
    def row_bytes(self) -> int:
        return 2 * int(np.prod(self.row_shape))

    @property
    def megabytes(self) -> float:
        return self.rows * self.row_bytes / 1e6

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop, all finite float16; the same whoever asks."""
        random = np.random.default_rng([len(self.row_shape), start])
        bits = random.integers(0, 0x7BFF, (stop - start, *self.row_shape), dtype=np.uint16)
        return bits.view(np.float16)

    @property
    def block_rows(self) -> int:
        return max(1, min(BLOCK, (32 << 20) // self.row_bytes))

    def blocks(self, rows: int | None = None) -> Iterator[np.ndarray]:
        rows = self.rows if rows is None else rows
        for start in range(0, rows, self.block_rows):
            yield self.block(start, min(rows, start + self.block_rows))


# -- making the data sets ---------------------------------------------------------------------------


def write_raw(case: Case, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for block in case.blocks():
            file.write(memoryview(block).cast("B"))  # type: ignore[arg-type]
        os.fsync(file.fileno())


def begin_store(case: Case, path: Path) -> None:
    teacher = TeacherSpec(name="benchmark", fingerprint="0", layer="last", width=case.row_shape[-1])
    manifest = Manifest(teacher=teacher, preprocessing=Preprocessing(image_size=224))
    spec = ArraySpec(name=NAME[case.name], row_shape=case.row_shape, dtype="float16", scaled=True)
    keys = (f"images/class/{row:07d}.jpg" for row in range(case.rows))
    create_store(path, manifest, Plan({"train": keys}), [spec])


def write_rows(case: Case, path: Path, blocks: Iterator[np.ndarray]) -> None:
    with StoreWriter(path, "train") as writer:
        for block in blocks:
            writer.append({NAME[case.name]: block}, stored=True)


def write_store(case: Case, path: Path) -> None:
    begin_store(case, path)
    write_rows(case, path, case.blocks())
    finalize_store(path, statistics=False)


# -- contestants in random gathers --------------------------------------------------------------------


def raw_gather(case: Case, path: Path) -> Gather:
    array = np.memmap(path, np.float16, "r", shape=(case.rows, *case.row_shape))

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        np.take(array, rows, axis=0, out=out, mode="clip")

    return gather


def store_gather(case: Case, path: Path) -> Gather:
    split, name = open_store(path)["train"], NAME[case.name]
    names = [name]

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        split.gather(rows, names, out={name: out})

    return gather


def zarr_gather(case: Case, folder: Path) -> Gather:
    import zarr

    array = zarr.open_array(folder / "store.zarr" / "train" / NAME[case.name], mode="r")

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        out[...] = array.oindex[rows]

    return gather


def tensorstore_gather(case: Case, folder: Path) -> Gather:
    import tensorstore

    path = folder / "store.zarr" / "train" / NAME[case.name]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    array = tensorstore.open(spec, open=True, read=True).result()

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        out[...] = array[rows].read().result()

    return gather


def h5py_gather(case: Case, folder: Path) -> Gather:
    import h5py

    path = folder / "rows.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("rows", (case.rows, *case.row_shape), np.float16)
        start = 0
        for block in case.blocks():
            dataset[start : start + len(block)] = block
            start += len(block)
    dataset = h5py.File(path, "r")["rows"]

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        once, place = np.unique(rows, return_inverse=True)  # h5py wants ascending rows, each once
        np.take(dataset[once], place, axis=0, out=out, mode="clip")

    return gather


def lmdb_gather(case: Case, folder: Path) -> Gather:
    import lmdb

    environment = lmdb.open(str(folder / "rows.lmdb"), map_size=4 << 40, lock=False, readahead=False)
    row = 0
    for block in case.blocks():
        with environment.begin(write=True) as transaction:
            for values in block:
                transaction.put(row.to_bytes(8, "big"), values.tobytes(), append=True)
                row += 1
    transaction = environment.begin(buffers=True)

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for place, row in enumerate(rows.tolist()):
            out[place] = np.frombuffer(transaction.get(row.to_bytes(8, "big")), np.float16).reshape(
                case.row_shape
            )

    return gather


def pt_gather(case: Case, folder: Path) -> Gather:
    import torch

    target = folder / "pt"
    target.mkdir()
    row = 0
    for block in case.blocks(case.slow_rows):
        for values in block:
            torch.save(torch.from_numpy(values), target / f"{row}.pt")
            row += 1

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for place, row in enumerate((rows % case.slow_rows).tolist()):
            out[place] = torch.load(target / f"{row}.pt", weights_only=True).numpy()

    return gather


def litdata_folder(case: Case, folder: Path) -> Path:
    """Rows as litdata's own chunks (no compression, 64 MB)."""
    from litdata.streaming.writer import BinaryWriter

    target = folder / "litdata"
    if not target.exists():
        target.mkdir()
        writer = BinaryWriter(str(target), chunk_bytes=64 << 20)
        row = 0
        for block in case.blocks():
            for values in block:
                writer.add_item(row, {"x": values})
                row += 1
        writer.done()
        writer.merge(num_workers=1)
    return target


def litdata_gather(case: Case, folder: Path) -> Gather:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(litdata_folder(case, folder)), shuffle=False)

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for place, row in enumerate(rows.tolist()):
            out[place] = dataset[row]["x"]

    return gather


def mosaic_folder(case: Case, folder: Path) -> Path:
    from streaming import MDSWriter

    target = folder / "mosaic"
    if not target.exists():
        columns = {"x": f"ndarray:float16:{','.join(map(str, case.row_shape))}"}
        with MDSWriter(out=str(target), columns=columns, size_limit=64 << 20) as writer:
            for block in case.blocks():
                for values in block:
                    writer.write({"x": values})
    return target


def mosaic_gather(case: Case, folder: Path) -> Gather:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(mosaic_folder(case, folder)), shuffle=False, batch_size=BATCH)

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for place, row in enumerate(rows.tolist()):
            out[place] = dataset[row]["x"]

    return gather


# name → (module it needs, how to open it, batches a round)
PEERS: dict[str, tuple[str, Callable[[Case, Path], Gather], int]] = {
    "lmdb": ("lmdb", lmdb_gather, 20),
    "h5py fancy (contiguous)": ("h5py", h5py_gather, 10),
    "tensorstore (same files)": ("tensorstore", tensorstore_gather, 10),
    "mosaicml-streaming ds[i]": ("streaming", mosaic_gather, 5),
    "one .pt a sample": ("torch", pt_gather, 2),
    "zarr-python oindex (same files)": ("zarr", zarr_gather, 2),
    "litdata ds[i]": ("litdata", litdata_gather, 1),
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# -- shuffled epochs ----------------------------------------------------------------------------------


def store_epoch(case: Case, folder: Path) -> int:
    """One pass in random order, gathered in this process into one buffer."""
    split, name = open_store(folder / "store.zarr")["train"], NAME[case.name]
    out = {name: np.empty((BATCH, *case.row_shape), np.float16)}
    order = np.random.default_rng(3).permutation(case.rows)
    whole = len(order) - len(order) % BATCH
    for start in range(0, whole, BATCH):
        split.gather(order[start : start + BATCH], [name], out=out)
    return whole


def litdata_epoch(case: Case, folder: Path) -> int:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(litdata_folder(case, folder)), shuffle=True, drop_last=True)
    return count(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=2), "x")


def webdataset_epoch(case: Case, folder: Path) -> int:
    import webdataset

    target = folder / "webdataset"
    if not target.exists():
        target.mkdir()
        size = min(128e6, case.megabytes * 1e6 / 40)  # 8 shards at least, so that every worker has some
        with webdataset.ShardWriter(str(target / "%06d.tar"), maxsize=size, verbose=0) as sink:
            row = 0
            for block in case.blocks(case.rows // 5):
                for values in block:
                    sink.write({"__key__": f"{row:08d}", "npy": values})
                    row += 1
    shards = sorted(map(str, target.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode().to_tuple("npy")
    return count(webdataset.WebLoader(dataset.batched(BATCH), batch_size=None, num_workers=2), 0)


def count(loader: Any, column: Any) -> int:
    return sum(len(batch[column]) for batch in loader)


EPOCHS: dict[str, tuple[str, Callable[[Case, Path], int]]] = {
    "this store": ("numpy", store_epoch),
    "litdata, 2 workers": ("litdata", litdata_epoch),
    "webdataset, 2 workers": ("webdataset", webdataset_epoch),
}
