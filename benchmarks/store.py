"""The store against its peers: random gathers, shuffled epochs, writing, opening, memory.

    python benchmarks/store.py [--quick] [--json FILE] [--folder DIR] [--only gather,epoch,write,open]

Pooled features [200000, 1280] and grids [4000, 16, 16, 1280], float16, random batches of 64, warm page cache,
one thread. Rounds of all contestants are interleaved and medians reported; every gather is compared with
`np.take` on a raw memory map in the same rounds, and with a byte-identical second copy of that raw file,
whose ratio shows the noise. Everybody writes the same rows, whole shards of them, and syncs what it wrote.
Peers (lmdb, litdata, mosaicml-streaming, webdataset) that are not installed are skipped by name.
"""

from __future__ import annotations

import argparse
import gc
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.store_contestants import (
    BATCH,
    EPOCHS,
    NAME,
    PEERS,
    Case,
    Gather,
    begin_store,
    installed,
    raw_gather,
    store_gather,
    write_raw,
    write_rows,
    write_store,
)
from store.finalize import finalize_store
from store.format import ArraySpec
from store.shards import Layout, choose_shard_rows
from store.writer import StoreWriter

CASES = [Case("pooled", 200_000, (1280,), 20_000), Case("grid", 4_000, (16, 16, 1280), 1_000)]
QUICK = [Case("pooled", 20_000, (1280,), 2_000), Case("grid", 400, (16, 16, 1280), 100)]


# -- random gathers -----------------------------------------------------------------------------------


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
    """MB/s with fsync, everybody taking turns. Data are made beforehand, so that making them costs nobody."""
    case, layout = whole_shards(case)
    data = np.empty((case.rows, *case.row_shape), np.float16)
    for start, block in zip(range(0, case.rows, case.block_rows), case.blocks(), strict=True):
        data[start : start + len(block)] = block
    target = folder / "written"
    times: dict[str, list[float]] = {}
    random = np.random.default_rng(4)
    for _ in range(rounds):
        for name in random.permutation(list(WRITERS)).tolist():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            gc.collect()
            os.sync()  # what the last one left to the disk is not the next one's
            for step, seconds in WRITERS[name](case, layout, target, data).items():
                times.setdefault(f"{name}{step}", []).append(seconds)
    shutil.rmtree(target)
    raw, ours = (statistics.median(times[name]) for name in ("raw file, one fsync", "this store"))
    report["write"][case.name] = {
        name: {
            "mb_per_second": case.megabytes / statistics.median(values),
            "ratio_to_raw": raw / statistics.median(values),
            "this_store_is_faster_by": statistics.median(values) / ours,
        }
        for name, values in times.items()
    }


def whole_shards(case: Case) -> tuple[Case, Layout]:
    """About 1.4 GB of the case's rows, a whole number of our shards (or less than one), and their layout."""
    spec = ArraySpec(name=NAME[case.name], row_shape=case.row_shape, dtype="float16")
    shard_rows = choose_shard_rows([spec])
    rows = min(case.rows, int(1.4e9 / case.row_bytes))
    rows -= rows % shard_rows if rows > shard_rows else 0
    return Case(case.name, rows, case.row_shape, case.slow_rows), Layout.of(spec, rows, shard_rows)


def in_blocks(case: Case, data: np.ndarray) -> Iterator[np.ndarray]:
    return (data[start : start + case.block_rows] for start in range(0, case.rows, case.block_rows))


def time_raw_write(case: Case, layout: Layout, target: Path, data: np.ndarray) -> dict[str, float]:
    began = time.perf_counter()
    with (target / "raw.bin").open("wb", buffering=0) as file:
        for block in in_blocks(case, data):
            file.write(memoryview(block).cast("B"))  # type: ignore[arg-type]
        os.fsync(file.fileno())
    return {"": time.perf_counter() - began}


def time_store_write(case: Case, layout: Layout, target: Path, data: np.ndarray) -> dict[str, float]:
    """Every commit is synced and checksummed; keys and metadata are made by create_store before."""
    begin_store(case, target / "store.zarr")
    began = time.perf_counter()
    write_rows(case, target / "store.zarr", in_blocks(case, data))
    written = time.perf_counter()
    finalize_store(target / "store.zarr", statistics=False)
    finished = time.perf_counter()
    return {"": written - began, ", with completion": finished - began}


def time_zarr_write(case: Case, layout: Layout, target: Path, data: np.ndarray) -> dict[str, float]:
    """Whole shards of our own layout, one assignment each, the best that zarr-python can do; each synced."""
    import zarr

    array = zarr.create_array(
        target / "zarr",
        shape=data.shape,
        dtype=np.float16,
        chunks=(layout.chunk_rows, *case.row_shape),
        shards=(layout.shard_rows, *case.row_shape),
        compressors=None,
    )
    began = time.perf_counter()
    for shard in range(layout.shards):
        first = shard * layout.shard_rows
        array[first : first + layout.shard_rows] = data[first : first + layout.shard_rows]
        with (target / "zarr" / layout.shard_key(shard)).open("rb+") as file:
            os.fsync(file.fileno())
    return {"": time.perf_counter() - began}


WRITERS: dict[str, Callable[[Case, Layout, Path, np.ndarray], dict[str, float]]] = {
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
                measure_writes(case, folder, max(3, rounds - 2), report)
            shutil.rmtree(folder)
        if "open" in parts:
            measure_open(Path(name), 1_000_000 if options.quick else 10_000_000, report)
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
