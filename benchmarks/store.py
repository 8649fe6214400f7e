"""The store against its peers: random gathers, shuffled epochs, writing, opening, memory.

    python benchmarks/store.py [--quick] [--json FILE] [--folder DIR] [--only gather,epoch,write,open]

Pooled features [200000, 1280] and grids [4000, 16, 16, 1280], float16, random batches of 64, warm page cache,
one thread. Rounds of all contestants are interleaved and medians reported; every gather is compared with
`np.take` on a raw memory map in the same rounds, and with a byte-identical second copy of that raw file,
whose ratio shows the noise. Peers that are not installed are skipped by name.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from store import (
    ArraySpec,
    Manifest,
    Plan,
    Preprocessing,
    StoreWriter,
    TeacherSpec,
    create_store,
    finalize_store,
    open_store,
)

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

    def blocks(self, rows: int | None = None) -> Iterator[np.ndarray]:
        step = max(1, min(BLOCK, (32 << 20) // self.row_bytes))
        rows = self.rows if rows is None else rows
        for start in range(0, rows, step):
            yield self.block(start, min(rows, start + step))


CASES = [Case("pooled", 200_000, (1280,), 20_000), Case("grid", 4_000, (16, 16, 1280), 1_000)]
QUICK = [Case("pooled", 20_000, (1280,), 2_000), Case("grid", 400, (16, 16, 1280), 100)]


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


def measure_gathers(case: Case, folder: Path, rounds: int, report: dict[str, Any]) -> None:
    """µs a batch for everybody; the ratio is to the raw memory map within the same rounds."""
    shutil.copy(folder / "raw.bin", folder / "copy.bin")
    ours = {
        "raw memory map": raw_gather(case, folder / "raw.bin"),
        "raw memory map, second copy": raw_gather(case, folder / "copy.bin"),
        "this store": store_gather(case, folder / "store.zarr"),
    }
    check_equal(case, ours)
    warm(folder)
    many = 200 if case.name == "pooled" else 20
    times = interleaved(case, ours, dict.fromkeys(ours, many), rounds * 3)
    limit = statistics.median(times["raw memory map"])
    rows = {name: entry(case, statistics.median(values), limit) for name, values in times.items()}
    for name, (module, make, batches) in PEERS.items():
        if not installed(module):
            report["skipped"].append(f"{name} ({module} is not installed)")
            continue
        gather = make(case, folder)
        check_equal(case, {"raw memory map": ours["raw memory map"], name: gather})
        pair = {"this store": ours["this store"], name: gather}
        times = interleaved(case, pair, {"this store": many, name: batches}, max(3, rounds // 3))
        rows[name] = entry(case, statistics.median(times[name]), limit)
        rows[name]["this_store_is_faster_by"] = statistics.median(times[name]) / statistics.median(
            times["this store"]
        )
        remove_peer(folder)
        gc.collect()
    report["gather"][case.name] = rows


def entry(case: Case, seconds: float, limit: float) -> dict[str, float]:
    return {
        "us_per_batch": seconds * 1e6,
        "rows_per_second": BATCH / seconds,
        "ratio_to_raw": limit / seconds,
    }


def interleaved(
    case: Case, contestants: dict[str, Gather], batches: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Seconds a batch, one figure a round, contestants taking turns in changing order."""
    random = np.random.default_rng(1)
    out = np.empty((BATCH, *case.row_shape), np.float16)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in random.permutation(list(contestants)).tolist():
            picks = [random.integers(0, case.rows, BATCH) for _ in range(batches[name])]
            began = time.perf_counter()
            for rows in picks:
                contestants[name](rows, out)
            times[name].append((time.perf_counter() - began) / len(picks))
    return times


def check_equal(case: Case, contestants: dict[str, Gather]) -> None:
    """Everybody returns the same bits; rows below `slow_rows`, which all of them have."""
    rows = np.random.default_rng(2).integers(0, case.slow_rows, BATCH)
    results = []
    for gather in contestants.values():
        out = np.empty((BATCH, *case.row_shape), np.float16)
        gather(rows, out)
        results.append(out.view(np.uint16))
    for name, result in zip(contestants, results, strict=True):
        assert np.array_equal(result, results[0]), name


def warm(folder: Path) -> None:
    """Read every file once, so that the page cache holds it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(64 << 20):
                    pass


def remove_peer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in ("rows.h5",):
            path.unlink()
        elif path.name in ("rows.lmdb", "pt", "litdata", "mosaic"):
            shutil.rmtree(path)


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


def measure_epochs(case: Case, folder: Path, rounds: int, report: dict[str, Any]) -> None:
    rows: dict[str, Any] = {}
    ready = {name: run for name, (module, run) in EPOCHS.items() if installed(module)}
    report["skipped"] += [f"epoch: {name}" for name in EPOCHS if name not in ready]
    for run in ready.values():
        run(case, folder)  # makes the peer's files and warms the page cache
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, run in ready.items():
            began = time.perf_counter()
            done = run(case, folder)
            times[name].append(done / (time.perf_counter() - began))
    best = statistics.median(times["this store"])
    for name, values in times.items():
        rate = statistics.median(values)
        rows[name] = {"rows_per_second": rate, "this_store_is_faster_by": best / rate}
    report["epoch"][case.name] = rows


# -- writing ------------------------------------------------------------------------------------------


def measure_writes(case: Case, folder: Path, rounds: int, report: dict[str, Any]) -> None:
    """MB/s with fsync. Data are made beforehand, so that making them costs nobody."""
    rows = min(case.rows, int(1.2e9 / case.row_bytes))
    case = Case(case.name, rows, case.row_shape, case.slow_rows)
    data = list(case.blocks())
    target = folder / "written"
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, write in WRITERS.items():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            gc.collect()
            for step, seconds in write(case, target, data).items():
                times.setdefault(f"{name}{step}", []).append(seconds)
    shutil.rmtree(target)
    raw = statistics.median(times["raw file, one fsync"])
    report["write"][case.name] = {
        name: {
            "mb_per_second": case.megabytes / statistics.median(values),
            "ratio_to_raw": raw / statistics.median(values),
        }
        for name, values in times.items()
    }


def time_raw_write(case: Case, target: Path, data: list[np.ndarray]) -> dict[str, float]:
    began = time.perf_counter()
    with (target / "raw.bin").open("wb", buffering=0) as file:
        for block in data:
            file.write(memoryview(block).cast("B"))  # type: ignore[arg-type]
        os.fsync(file.fileno())
    return {"": time.perf_counter() - began}


def time_store_write(case: Case, target: Path, data: list[np.ndarray]) -> dict[str, float]:
    """Every commit is synced and checksummed; keys and metadata are made by create_store before."""
    begin_store(case, target / "store.zarr")
    began = time.perf_counter()
    write_rows(case, target / "store.zarr", iter(data))
    written = time.perf_counter()
    finalize_store(target / "store.zarr", statistics=False)
    finished = time.perf_counter()
    return {"": written - began, ", with completion": finished - began}


def time_zarr_write(case: Case, target: Path, data: list[np.ndarray]) -> dict[str, float]:
    """Whole shards of our own layout, the best that zarr-python can do, then one sync of each file."""
    import zarr

    from store.layout import Layout, choose_shard_rows

    spec = ArraySpec(name=NAME[case.name], row_shape=case.row_shape, dtype="float16")
    layout = Layout.of(spec, case.rows, choose_shard_rows([spec]))
    rows = min(case.rows, layout.shard_rows)
    part = np.concatenate(data[: -(-rows // len(data[0]))])[:rows]  # one shard stands for all
    array = zarr.create_array(
        target / "zarr",
        shape=(rows, *case.row_shape),
        dtype=np.float16,
        chunks=(layout.chunk_rows, *case.row_shape),
        shards=(layout.shard_rows, *case.row_shape),
        compressors=None,
    )
    began = time.perf_counter()
    array[:] = part
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    return {"": (time.perf_counter() - began) * case.rows / rows}


WRITERS: dict[str, Callable[[Case, Path, list[np.ndarray]], dict[str, float]]] = {
    "raw file, one fsync": time_raw_write,
    "this store": time_store_write,
    "zarr-python, whole shards": time_zarr_write,
}


# -- opening and memory -------------------------------------------------------------------------------

OPEN_SCRIPT = """
import json, sys, time
sys.path.insert(0, {root!r})
import numpy as np
from store import open_store
from store.reader import Split
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024
before = memory()
began = time.perf_counter()
split = open_store({path!r})["train"]
opened = time.perf_counter() - began
after = memory()
began = time.perf_counter()
row = int(split.rows_of([{key!r}])[0])
batch = split.gather(np.random.default_rng(0).integers(0, len(split), 64), split.names[:1])
print(json.dumps(dict(rows=len(split), open_seconds=opened, first_batch_seconds=time.perf_counter() - began,
                      process_mb_before=before, process_mb_open=after, process_mb_after_batch=memory())))
"""


def measure_open(folder: Path, rows: int, report: dict[str, Any]) -> None:
    """A store of ten million rows, opened by a fresh process."""
    path = folder / "many.zarr"
    case = Case("pooled", rows, (8,), rows)
    begin_store(case, path)
    block = case.block(0, 65_536)
    with StoreWriter(path, "train", commit_rows=65_536) as writer:
        for start in range(0, rows, len(block)):
            writer.append({NAME["pooled"]: block[: min(len(block), rows - start)]}, stored=True)
    finalize_store(path, statistics=False)
    root = str(Path(__file__).resolve().parent.parent)
    script = OPEN_SCRIPT.format(root=root, path=str(path), key=f"images/class/{rows // 2:07d}.jpg")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    report["open"] = json.loads(result.stdout)
    shutil.rmtree(path)


# -- report -------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    for section, title in (
        ("gather", "random batches of 64, warm"),
        ("epoch", "shuffled epoch"),
        ("write", "writing, fsync included"),
    ):
        for case, rows in report[section].items():
            print(f"\n{case}: {title}")
            for name, values in rows.items():
                print(f"  {name:36s}" + "  ".join(f"{key} {figure(value)}" for key, value in values.items()))
    if report["open"]:
        print("\nopening:", ", ".join(f"{key} {figure(value)}" for key, value in report["open"].items()))
    for name in report["skipped"]:
        print(f"skipped: {name}")


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in (
        "numpy",
        "zarr",
        "tensorstore",
        "h5py",
        "lmdb",
        "litdata",
        "mosaicml-streaming",
        "webdataset",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, fewer rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help="where to put up to 12 GB of data (a temporary folder)")
    parser.add_argument("--only", default="gather,epoch,write,open", help="parts to run")
    options = parser.parse_args()
    parts = set(options.only.split(","))
    rounds = 3 if options.quick else 9
    report: dict[str, Any] = {
        "versions": versions(),
        "skipped": [],
        "gather": {},
        "epoch": {},
        "write": {},
        "open": {},
    }
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="store-benchmark-") as name:
        for case in QUICK if options.quick else CASES:
            folder = Path(name) / case.name
            folder.mkdir()
            if parts & {"gather", "epoch"}:
                write_raw(case, folder / "raw.bin")
                write_store(case, folder / "store.zarr")
            if "gather" in parts:
                measure_gathers(case, folder, rounds, report)
            if "epoch" in parts:
                measure_epochs(case, folder, max(1, rounds // 3), report)
            if "write" in parts:
                measure_writes(case, folder, max(3, rounds // 2), report)
            shutil.rmtree(folder)
        if "open" in parts:
            measure_open(Path(name), 1_000_000 if options.quick else 10_000_000, report)
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
