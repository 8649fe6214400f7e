"""Stage 4 of benchmarks/gpu.py: `cli extract` against the bare tower, the GPU's idle time, a stop in the middle, `cli verify`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from benchmarks.gpu_tower import make_checkpoint, open_tower, tower_rate, write_photos

if TYPE_CHECKING:
    from benchmarks.gpu import Note, Settings

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "pooled": {"grid": 0},
    "grid8": {"grid": 8},
    "grid16": {"grid": 16},
    "letterbox": {"grid": 8, "resize": "letterbox"},
}


def measure_extraction(settings: Settings, note: Note) -> None:
    """Four extractions of the same files, then one that is stopped at a third and resumed."""
    size, count = (56, 48) if settings.quick else (224, 4096 if settings.brief else 8192)
    photos = settings.work / "photos"
    write_photos(photos, count)
    bare = bare_rate(settings, size)
    note(tower_images_per_second=bare)
    for name, options in RUNS.items():
        if not settings.wants(name):
            continue
        if settings.quick:
            options = {**options, "grid": min(4, int(options["grid"]))}
        run = extract_once(settings, photos, size, name, options)
        run["share"] = run.pop("rate") / bare
        note(**{f"{key}_{name}": value for key, value in run.items()})
        if name == "pooled":
            note(cores_per_1000=run["cpu_main_per_1000"] + run["cpu_decoders_per_1000"])
        if name not in ("grid8",):
            shutil.rmtree(settings.work / f"{name}.zarr")
    if not settings.brief:
        note(bare_again_images_per_second=bare_rate(settings, size))
    if settings.wants("resume"):
        note(resumed_identical=stop_and_resume(settings, photos, size))
    if settings.wants("verify"):
        note(verified=verify(settings, settings.work / "grid8.zarr", note))


def bare_rate(settings: Settings, size: int) -> float:
    """Images a second of the tower alone, with the batch and the settings that `cli extract` uses."""
    teacher = open_tower(settings, size, "auto", compile_tower=settings.cuda)
    return tower_rate(teacher, settings, size, 4 if settings.quick else 256, None)


def options_of(settings: Settings, photos: Path, size: int, out: Path) -> dict[str, Any]:
    return {
        "data": str(photos),
        "out": out,
        "teacher_path": str(make_checkpoint(settings)),
        "image_size": size,
        "device": settings.device,
        "val_fraction": 0,
        **({"batch_size": 4} if settings.quick else {}),
    }


def extract_once(
    settings: Settings, photos: Path, size: int, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Rate after the first batch, share of that time in which the GPU did nothing, CPU seconds by kind of thread."""
    from extract.config import load_config
    from extract.run import run_extraction

    out = settings.work / f"{name}.zarr"
    config = load_config({**options_of(settings, photos, size, out), **options})
    observer = RateObserver()
    with watched_encoder(settings) as passes:
        result = run_extraction(config, [observer])
    assert result.complete, "the store is incomplete"
    assert result.bad == 0, f"{result.bad} bad images"
    first, last = observer.first, observer.last
    thousands = (last.rows - first.rows) / 1000
    found = {
        "rate": 1000 * thousands / (last.at - first.at),
        "wall_s": result.seconds,
        "startup_s": result.startup_seconds,
        "cpu_main_per_1000": (last.main_s - first.main_s) / thousands,
        "cpu_decoders_per_1000": (last.decoders_s - first.decoders_s) / thousands,
        "cpu_threads_per_1000": {
            thread: round((seconds - first.threads_s.get(thread, 0.0)) / thousands, 3)
            for thread, seconds in last.threads_s.items()
        },
    }
    if settings.cuda:
        found["idle"] = idle_share(passes)
    return found


class Moment(NamedTuple):
    """Rows encoded at a time, and the CPU seconds that this process, its threads and its decoders had used."""

    at: float
    rows: int
    main_s: float
    decoders_s: float
    threads_s: dict[str, float]


class RateObserver:
    """The moments of the first and of the last batch: what comes before (start of the decoders, compilation) is left out."""

    first: Moment
    last: Moment

    def progress(self, done: int, total: int, message: str) -> None:
        if not done:
            return
        if not hasattr(self, "first"):
            self.first = current_moment(done)
        if done == total:
            self.last = current_moment(done)


def current_moment(rows: int) -> Moment:
    own, decoders = time.process_time(), 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
            decoders += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    threads: dict[str, float] = {}
    for thread in psutil.Process().threads():
        name = names.get(thread.id, "others")
        threads[name] = threads.get(name, 0.0) + thread.user_time + thread.system_time
    return Moment(time.perf_counter(), rows, own, decoders, threads)


@contextmanager
def watched_encoder(settings: Settings) -> Iterator[list[tuple[Any, Any]]]:
    """CUDA events around the device's work on each batch, in the order of the launches."""
    from extract.encode import Encoder

    passes: list[tuple[Any, Any]] = []
    launch = Encoder.launch

    def watched(self: Any, batch: Any) -> Any:
        if not settings.cuda:
            return launch(self, batch)
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
        pending = launch(self, batch)
        events[1].record()
        passes.append(events)
        return pending

    Encoder.launch = watched  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        Encoder.launch = launch  # type: ignore[method-assign]


def idle_share(passes: list[tuple[Any, Any]]) -> float:
    """Share of the time between the second batch's start and the last one's end that lies between two batches."""
    torch.cuda.synchronize()
    passes = passes[1:]
    total = passes[0][0].elapsed_time(passes[-1][1])
    gaps = sum(max(0.0, before[1].elapsed_time(after[0])) for before, after in itertools.pairwise(passes))
    return gaps / total


def stop_and_resume(settings: Settings, photos: Path, size: int) -> int:
    """1 when an extraction that got SIGTERM at a third of its rows, and went on in a new process, equals the undisturbed one."""
    from extract.config import load_config
    from extract.run import run_extraction
    from processes.stop import Stopped

    options = options_of(settings, photos, size, settings.work / "stopped.zarr")
    options["grid"] = 4 if settings.quick else 8
    try:
        run_extraction(load_config(options), [StopAt(len(list(photos.iterdir())) // 3)])
    except Stopped:
        pass
    else:
        raise AssertionError("the extraction ended before it could be stopped")
    words = [
        word for name, value in options.items() if name != "data" for word in (option_name(name), str(value))
    ]
    command = [sys.executable, str(ROOT / "cli.py"), "extract", options["data"], *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return int(same_arrays(settings.work / "stopped.zarr", settings.work / "grid8.zarr"))


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


class StopAt:
    """Sends this process SIGTERM once so many rows are encoded."""

    def __init__(self, rows: int) -> None:
        self.rows, self.sent = rows, False

    def progress(self, done: int, total: int, message: str) -> None:
        if done >= self.rows and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def same_arrays(left: Path, right: Path) -> bool:
    """Whether every array of two stores has the same bytes."""
    names = sorted(path.relative_to(left) for path in left.rglob("c/**/*") if path.is_file())
    others = sorted(path.relative_to(right) for path in right.rglob("c/**/*") if path.is_file())
    return (
        bool(names)
        and names == others
        and all((left / n).read_bytes() == (right / n).read_bytes() for n in names)
    )


def verify(settings: Settings, store: Path, note: Note) -> int:
    """1 when `cli verify` re-reads every checksum and encodes samples again without a finding."""
    command = [sys.executable, str(ROOT / "cli.py"), "verify", str(store), "--samples", "16", "--json"]
    command += ["--teacher-path", str(make_checkpoint(settings)), "--device", settings.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    note(verify=json.loads(done.stdout))
    return int(done.returncode == 0)
