"""A store in a bucket against the same store on the local disk: epochs, the first batch, requests, memory, extraction.

    python benchmarks/remote.py [--quick] [--json] [--only read,extract] [--rate 12.5] [--latency 20] [--rounds 3]

The bucket is on LocalBucket, an S3 server in a process of its own, behind a line of `--rate` MB/s with `--latency` ms
before each request (`benchmarks/slow_line.py`). An epoch is that of `cli train`'s loader for resnet18: images are decoded,
pooled features and grids are gathered; there is no training step, so that nothing hides the store's time. Rounds of both are
interleaved, medians reported; second epochs also in CPU time of the process, which depends less on what else runs.

Shards of grids have 32 MB, as small a part of the store as real ones are. First epochs begin with an empty cache. Their limit is the larger of the local epoch and the download at the line's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fsspec

from benchmarks.slow_line import slow_line
from benchmarks.steps import build_parts
from benchmarks.train_data import SIDE, make_store
from console.output import print_json, print_table
from tests.s3_servers import KEY, SECRET, localbucket_server

BUCKET = "bench"
SHARD_ROWS = 256  # 32 MB of grids


class Epoch(NamedTuple):
    """Seconds until the loader was built, the first batch was there, and the epoch ended; MB that memory grew by."""

    build_s: float
    first_s: float
    epoch_s: float
    memory_mb: float


def use_endpoint(url: str) -> None:
    """s3:// is this server, here and in processes that are started."""
    settings = {"endpoint_url": url, "key": KEY, "secret": SECRET}
    os.environ["FSSPEC_S3"] = json.dumps(settings)
    fsspec.config.conf["s3"] = settings
    fsspec.get_filesystem_class("s3").clear_instance_cache()


# -- reading ---------------------------------------------------------------------------------------------


def build(store: str, out: Path) -> Any:
    options = {"student": "resnet18", "image_size": SIDE, "batch_size": 32, "device": "cpu", "epochs": 100}
    return build_parts({"store": store, "out": out, "workers": 0, **options}).parts.train_loader


def first_epoch(store: str, out: Path) -> Epoch:
    before = reset_peak()
    began = time.perf_counter()
    loader = build(store, out)
    built = time.perf_counter()
    batches = iter(loader.epoch(0))
    next(batches)
    first = time.perf_counter()
    for _ in batches:
        pass
    ended = time.perf_counter()
    loader.close()
    return Epoch(built - began, first - began, ended - began, peak_mb() - before)


def later_epoch(loader: Any, number: int) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in loader.epoch(number):
        pass
    return time.perf_counter() - wall, time.process_time() - cpu


def reset_peak() -> float:
    """Forget the process's peak memory; returns what it has now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def measure_reading(
    work: Path, server: str, rows: int, rate: float, latency_s: float, rounds: int
) -> dict[str, Any]:
    path = work / "objects" / BUCKET / "random.zarr"
    make_store(path, rows, shard_rows=SHARD_ROWS)
    port = urlsplit(server).port
    assert port is not None
    for file in path.rglob("*"):  # the page cache holds it
        if file.is_file():
            file.read_bytes()
    use_endpoint(server)
    for key in (files := fsspec.filesystem("s3")).find(f"{BUCKET}/random.zarr"):
        files.info(key)  # LocalBucket computes the MD5 of a file when it is first asked for
    with slow_line(port, rate, latency_s) as line:
        use_endpoint(line.url)
        url, cache = f"s3://{BUCKET}/random.zarr", work / "cache"
        os.environ["QWEN_DISTILL_CACHE"] = str(cache)
        first_epoch(str(path), work / "run")  # imports
        local, remote, counts = [], [], []
        for _ in range(rounds):
            local.append(first_epoch(str(path), work / "run"))
            shutil.rmtree(cache, ignore_errors=True)
            before = line.count()
            remote.append(first_epoch(url, work / "run"))
            counts.append(line.since(before))
        loaders = [("local", build(str(path), work / "run")), ("remote", build(url, work / "run"))]
        later = []
        for number in range(2 * rounds + 1):
            order = loaders if number % 2 else loaders[::-1]
            later.append({name: later_epoch(loader, number + 1) for name, loader in order})
    return summarize_reading(path, rate, latency_s, local, remote, counts, later)


def summarize_reading(
    path: Path,
    rate: float,
    latency_s: float,
    local: list[Epoch],
    remote: list[Epoch],
    counts: list[Any],
    later: list[dict[str, tuple[float, float]]],
) -> dict[str, Any]:
    from store.reader import open_store

    train = open_store(path)["train"]
    names = [name for name in train.names if name.startswith(("features/", "images/"))]
    layouts = [train.array(name).layout for name in names]
    one_shard = sum(min(layout.rows, layout.shard_rows) * layout.row_bytes for layout in layouts) / rate
    download = statistics.median(count.bytes for count in counts) / rate
    local_epoch = statistics.median(epoch.epoch_s - epoch.build_s for epoch in local)
    # What building the loader takes longer than from the local disk is a part of the epoch: it downloads.
    build_s = statistics.median(epoch.build_s for epoch in local)
    remote_epoch = statistics.median(epoch.epoch_s - build_s for epoch in remote)
    gigabytes = statistics.median(count.bytes for count in counts) / 1e9

    def ratio(which: int) -> float:
        return statistics.median(times["local"][which] / times["remote"][which] for times in later)

    return {
        "line": {"mb_per_s": rate / 1e6, "latency_ms": latency_s * 1e3},
        "store_mb": gigabytes * 1e3,
        "local_epoch_s": local_epoch,
        "download_at_line_rate_s": download,
        "first_epoch_s": remote_epoch,
        "first_epoch_ratio": max(download, local_epoch) / remote_epoch,
        "second_epoch_ratio": ratio(0),
        "second_epoch_ratio_cpu": ratio(1),
        "first_batch_s": statistics.median(epoch.first_s for epoch in remote),
        "first_batch_local_s": statistics.median(epoch.first_s for epoch in local),
        "one_shard_s": one_shard,
        "requests_per_gb": statistics.median(count.requests for count in counts) / gigabytes,
        "memory_mb": statistics.median(epoch.memory_mb for epoch in remote),
        "memory_local_mb": statistics.median(epoch.memory_mb for epoch in local),
    }


def reading_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    extra = found["first_batch_s"] - found["first_batch_local_s"]
    return [
        row("second epoch, local ÷ bucket (wall time)", f"{found['second_epoch_ratio']:.3f}", "≥ 0.95"),
        row("the same in CPU time", f"{found['second_epoch_ratio_cpu']:.3f}", "≥ 0.95"),
        row(
            "first epoch, max(download at line rate, local epoch) ÷ bucket",
            f"{found['first_epoch_ratio']:.3f} ({found['first_epoch_s']:.1f} s; {found['download_at_line_rate_s']:.1f} s "
            f"and {found['local_epoch_s']:.1f} s)",
            "≥ 0.85",
        ),
        row(
            "time to the first batch, more than from the local disk",
            f"{extra:.1f} s",
            f"≤ {found['one_shard_s'] + 2:.1f} s (one shard of each array + 2 s)",
        ),
        row("requests per GB", f"{found['requests_per_gb']:.0f}", ""),
        row(
            "peak memory of build and first epoch, local; bucket",
            f"{found['memory_local_mb']:.0f}; {found['memory_mb']:.0f} MB",
            "",
        ),
    ]


def row(figure: str, measured: str, goal: str) -> dict[str, Any]:
    return {"figure": figure, "measured": measured, "goal": goal}


# -- extraction ------------------------------------------------------------------------------------------


def measure_extraction(
    work: Path, server: str, images: int, rate: float, latency_s: float, rounds: int
) -> dict[str, Any]:
    """Extraction to the bucket and to the local disk, of the same images with a small tower."""
    import numpy as np

    from benchmarks.train_data import smooth_jpeg
    from extract.teachers.tiny import make_tiny_teacher

    data = work / "data"
    generator = np.random.default_rng(0)
    files = [bytes(smooth_jpeg(generator, 224)) for _ in range(16)]
    for number in range(images):
        folder = data / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(files[number % 16])
    teacher = make_tiny_teacher(work / "teacher", depth=4)
    options = {
        "teacher_path": str(teacher),
        "device": "cpu",
        "image_size": 224,
        "shard_rows": 64,
        "grid": "8",
    }
    port = urlsplit(server).port
    assert port is not None
    with slow_line(port, rate, latency_s) as line:
        use_endpoint(line.url)
        (work / "objects" / BUCKET).mkdir(parents=True, exist_ok=True)
        extract(data, str(work / "warm.zarr"), options)
        seconds: list[dict[str, float]] = []
        sent = 0
        for number in range(rounds):
            targets = {
                "local": str(work / f"local-{number}.zarr"),
                "bucket": f"s3://{BUCKET}/new-{number}.zarr",
            }
            before = line.count()
            names = list(targets) if number % 2 else list(targets)[::-1]
            seconds.append({name: extract(data, targets[name], options) for name in names})
            sent = line.since(before).bytes
            shutil.rmtree(targets["local"])
    return {
        "ratio": statistics.median(times["local"] / times["bucket"] for times in seconds),
        "local_s": statistics.median(times["local"] for times in seconds),
        "bucket_s": statistics.median(times["bucket"] for times in seconds),
        "sent_mb": sent / 1e6,
        "upload_at_line_rate_s": sent / rate,
    }


def extract(data: Path, out: str, options: dict[str, Any]) -> float:
    """Seconds of the whole extraction."""
    from extract.config import load_config
    from extract.run import run_extraction

    config = load_config({"data": str(data), "out": out, **options})
    began = time.perf_counter()
    run_extraction(config)
    return time.perf_counter() - began


def extraction_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        row(
            "extraction, local ÷ bucket",
            f"{found['ratio']:.3f} ({found['local_s']:.1f} s; {found['bucket_s']:.1f} s; {found['sent_mb']:.0f} MB, "
            f"{found['upload_at_line_rate_s']:.1f} s at line rate)",
            "≥ 0.95",
        )
    ]


PARTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], list[dict[str, Any]]]]] = {
    "read": (measure_reading, reading_rows),
    "extract": (measure_extraction, extraction_rows),
}
#: Rows of the store that is read, images that are encoded.
SIZES, QUICK = {"read": 4096, "extract": 512}, {"read": 1024, "extract": 128}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less data, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS), help="read, extract")
    parser.add_argument("--rate", type=float, default=12.5, help="MB/s of the line, each direction")
    parser.add_argument("--latency", type=float, default=20.0, help="ms before each request")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sizes, rounds = (QUICK, 1) if given.quick else (SIZES, given.rounds)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="remote-benchmark-") as folder:
        work = Path(folder)
        (work / "objects").mkdir()
        with localbucket_server(work / "objects") as server:
            for part in given.only.split(","):
                measure, _ = PARTS[part]
                report[part] = measure(
                    work, server, sizes[part], given.rate * 1e6, given.latency / 1e3, rounds
                )
    if given.json:
        print_json(report)
        return
    rows = [line for part, found in report.items() for line in PARTS[part][1](found)]
    print_table(
        rows,
        ["figure", "measured", "goal"],
        f"line of {given.rate:g} MB/s, {given.latency:g} ms before each request",
    )


if __name__ == "__main__":
    main()
