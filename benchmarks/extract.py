"""`cli extract` against the bare forward passes of the same batches; bytes of each storage choice; memory.

    python benchmarks/extract.py [--quick] [--json] [--only overhead|memory|host] [--rounds 5] [--images 50000]

Overhead: JPEG files of 640×480 made from real photos, a random Qwen2.5-VL tower of a few blocks (deep enough that
decoding is under 5 % of it). The bare pass of each batch runs right after the extraction has encoded it, so that both
meet the same noise; medians over rounds. The first batch is left out: there decoders start and caches fill. Extraction
ends with the last commit (fsync included).

Memory: resident memory of the process and its decoders, sampled while many small JPEG files are encoded by a small
convolutional teacher; flat means that the last fifth needs no more than the second.

Host: CPU time per image and stage of what is left to the host beside a GPU, one core each, medians over rounds: decode,
collate, prepare (scale, cast and check; float32 features as they came before, and features in stored form as a GPU
delivers them now), checksum, and the writer's whole `append` with its file writes and syncs.

The figures for an H100 are arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository before this folder, whose files are named like packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch
from PIL import Image

from console.output import print_json, print_table
from extract.config import load_config
from extract.decode.pool import DecodedBatch, PixelBuffer
from extract.decode.sample import Encoding, decode_samples
from extract.encode import Pending
from extract.pipeline import sample_arrays
from extract.result import ExtractResult
from extract.run import run_extraction
from extract.sources.detect import open_source
from extract.teachers import Teacher, load_teacher
from extract.teachers.tiny import make_tiny_teacher
from store import format as names
from store.create import create_store
from store.format import (
    Manifest,
    Preprocessing,
    TeacherSpec,
    feature_arrays,
    image_arrays,
    logits_array,
    target_arrays,
)
from store.keys import Plan
from store.shards import crc32c
from store.writer import StoreWriter, channel_scale, prepare_rows, to_stored
from tests.assets import asset

SIZE, BATCH = 224, 4
BOUND = 1.10
FLAT_MB = 60  # growth that counts as flat: the commit log's small arrays and the allocator's slack
# Arithmetic for the real tower: parameters that a token passes, bf16 peak of an H100 SXM, and a usual share of it.
TOWER_PARAMETERS, H100_FLOPS, UTILISATION = 0.63e9, 989e12, 0.4
TOKENS = (SIZE // 14) ** 2
WIDTH, TOKEN_SCALE_BYTES = 1280, 4


def make_photos(folder: Path, count: int, size: tuple[int, int], quality: int = 90) -> None:
    """JPEG files from the real photos of the asset `foolbox`, cycled."""
    photos = [Image.open(file).convert("RGB") for file in sorted(asset("foolbox").rglob("*.jpg"))]
    folder.mkdir(parents=True)
    for number in range(count):
        photos[number % len(photos)].resize(size, Image.Resampling.LANCZOS).save(
            folder / f"{number:06d}.jpg", quality=quality
        )


def link_photos(source: Path, folder: Path, count: int) -> None:
    """Many names of a few files, in folders of a thousand."""
    files = sorted(source.iterdir())
    for number in range(count):
        target = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[number % len(files)], target)


class Interleaved:
    """An observer that runs the bare forward pass of each batch right after the extraction has encoded it.

    So whatever else the machine does slows both alike. Decoders and writer go on meanwhile, as they do during the
    extraction's own passes. wall, cpu: seconds of each bare pass.
    """

    def __init__(self, teacher: Teacher, batches: list[torch.Tensor]) -> None:
        self.teacher, self.batches = teacher, batches
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.first_cpu: float | None = None
        self.last_cpu = 0.0

    def progress(self, done: int, total: int, message: str) -> None:
        if done == 0:
            return
        self.last_cpu = cpu_seconds()
        if self.first_cpu is None:
            self.first_cpu = self.last_cpu
        started, cpu = time.perf_counter(), time.process_time()
        self.teacher.encode(self.batches[len(self.wall)])
        self.wall.append(time.perf_counter() - started)
        self.cpu.append(time.process_time() - cpu)

    def ratios(self, result: ExtractResult) -> tuple[float, float]:
        """Extraction over bare passes, wall and CPU time, without the first batch: there decoders start."""
        extraction = result.seconds - result.startup_seconds - sum(self.wall)
        cpu = self.last_cpu - (self.first_cpu or 0.0) - sum(self.cpu[:-1])
        return extraction / sum(self.wall[1:]), cpu / sum(self.cpu[1:])


def cpu_seconds() -> float:
    """CPU time of this process and its decoders."""
    processes = [psutil.Process(), *psutil.Process().children()]
    times = [process.cpu_times() for process in processes if process.is_running()]
    return sum(item.user + item.system for item in times)


# -- overhead -------------------------------------------------------------------------------------------


def measure_overhead(work: Path, images: int, depth: int, rounds: int) -> dict[str, Any]:
    photos, weights = work / "photos", make_tiny_teacher(work / "tower", depth=depth)
    make_photos(photos, images, (640, 480))
    teacher = load_teacher("qwen2.5-vl", str(weights), device="cpu", image_size=SIZE)
    samples = open_source(photos, val_fraction=0).splits["train"][:]
    pixels = np.zeros((images, 1, 3, SIZE, SIZE), np.uint8)
    encoding = Encoding(image_size=SIZE, resize="squash")
    decode_samples(encoding, samples[:2], pixels[:2])
    cpu = time.process_time()
    decode_samples(encoding, samples, pixels)
    decode_s = time.process_time() - cpu
    batches = [torch.from_numpy(pixels[first : first + BATCH, 0].copy()) for first in range(0, images, BATCH)]
    config = load_config(
        {
            "data": str(photos),
            "out": work / "store",
            "teacher_path": str(weights),
            "image_size": SIZE,
            "batch_size": BATCH,
            "device": "cpu",
            "val_fraction": 0,
            "overwrite": True,
        },
    )
    teacher.encode(batches[0])
    ratios, cpu_ratios, bare = [], [], []
    for _ in range(rounds):
        observer = Interleaved(teacher, batches)
        wall_ratio, cpu_ratio = observer.ratios(run_extraction(config, [observer]))
        ratios.append(wall_ratio)
        cpu_ratios.append(cpu_ratio)
        bare.append(sum(observer.cpu) / images)
    return {
        "images": images - BATCH,
        "depth": depth,
        "batch": BATCH,
        "torch_threads": torch.get_num_threads(),
        "bare_cpu_ms_per_image": 1000 * statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratios": cpu_ratios,
        "bound": BOUND,
        "decode_share": decode_s / images / statistics.median(bare),
        "decode_ms_per_image": 1000 * decode_s / images,
        "jpeg_bytes": statistics.mean(file.stat().st_size for file in photos.iterdir()),
    }


# -- memory ---------------------------------------------------------------------------------------------


class MemoryObserver:
    """Samples resident memory (MB) of this process and its children as images are encoded."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, float]] = []

    def progress(self, done: int, total: int, message: str) -> None:
        if not self.samples or done - self.samples[-1][0] >= total // 50:
            process = psutil.Process()
            sizes = [process.memory_info().rss]
            for child in process.children(recursive=True):
                try:
                    sizes.append(child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.samples.append((done, sum(sizes) / 1e6))

    def mean(self, low: float, high: float) -> float:
        """Mean over the samples between two shares of the run."""
        total = self.samples[-1][0]
        return statistics.mean(size for done, size in self.samples if low * total <= done <= high * total)


def measure_memory(work: Path, images: int) -> dict[str, Any]:
    import timm

    make_photos(work / "few", 20, (96, 72))
    link_photos(work / "few", work / "many", images)
    weights = work / "small.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    observer = MemoryObserver()
    options = {
        "data": str(work / "many"),
        "out": work / "many.zarr",
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(weights),
        "image_size": 64,
        "batch_size": 64,
        "device": "cpu",
    }
    result = run_extraction(load_config(options), [observer])
    early, late = observer.mean(0.2, 0.4), observer.mean(0.8, 1.0)
    return {
        "images": images,
        "images_per_second": result.images_per_second,
        "early_mb": early,
        "late_mb": late,
        "growth_mb": late - early,
        "bound_mb": FLAT_MB,
        "samples": observer.samples,
    }


# -- host -----------------------------------------------------------------------------------------------

HOST_ROWS, HOST_GRID = 64, 16
FEATURES = (names.POOLED, names.GRID)


def measure_host(work: Path, rounds: int, rows: int) -> dict[str, float]:
    """CPU ms per image of each stage; `writer` and `prepare` from float32 and from stored form."""
    times: dict[str, list[float]] = {}

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = function()
        times.setdefault(stage, []).append(1000 * (time.process_time() - began) / rows)
        return result

    make_photos(work / "host", rows, (640, 480))
    samples = open_source(work / "host", val_fraction=0).splits["train"][:]
    buffer = PixelBuffer((rows, 1, 3, SIZE, SIZE), shared=False)
    encoding = Encoding(image_size=SIZE, resize="squash")
    decode_samples(encoding, samples[:2], buffer.pixels[:2])
    specs = [*feature_arrays(WIDTH, grid=HOST_GRID), *target_arrays(label=True)]
    shapes = {spec.name: (rows, *spec.row_shape) for spec in specs}
    features = {
        name: np.random.default_rng(0).standard_normal(shapes[name], np.float32) * 100 for name in FEATURES
    }
    scales = {name: channel_scale(values) for name, values in features.items()}
    ready = {name: to_stored(values, scales[name], np.dtype(np.float16)) for name, values in features.items()}
    for number in range(rounds + 1):  # the first round warms up
        results = timed("decode", lambda: decode_samples(encoding, samples, buffer.pixels))
        batch = DecodedBatch(0, samples, buffer, [], results)
        pending = Pending({}, torch.tensor(True), torch.device("cpu"), None)
        rest = timed("collate", functools.partial(sample_arrays, batch, pending, encoding))
        rest = {name: rest[name] for name in (names.SIZES, names.CONTENT, names.LABEL)}
        timed("checksum", lambda: crc32c(ready[names.GRID]))
        for form, arrays, known in (("float32", features, ()), ("stored form", ready, FEATURES)):
            store = work / f"host-{number}-{form.split()[0]}.zarr"
            plan = Plan({"train": [sample.key for sample in samples]}, batch_rows=rows)
            create_store(store, host_manifest(), plan, specs, scales=scales)
            with StoreWriter(store, "train") as writer:
                block = {**arrays, **rest}
                prepare = functools.partial(
                    prepare_rows, writer.job, block, None, None, frozenset(known), known
                )
                timed(f"prepare, {form}", prepare)

                def write(writer: Any = writer, block: Any = block, known: Any = known) -> None:
                    writer.append(block, stored=frozenset(known), finite=known)
                    writer.commit()

                timed(f"writer in all, {form}", write)
            shutil.rmtree(store)
    return {stage: statistics.median(values[1:]) for stage, values in times.items()}


def host_manifest() -> Manifest:
    teacher = TeacherSpec(name="benchmark", fingerprint="0" * 32, layer="last", width=WIDTH)
    return Manifest(teacher=teacher, preprocessing=Preprocessing(image_size=SIZE), grid=HOST_GRID)


def print_host(host: dict[str, float]) -> None:
    print(f"host CPU ms per image and core ({HOST_GRID}×{HOST_GRID} grids of {WIDTH}, 640×480 JPEG):")
    for stage, milliseconds in host.items():
        print(f"  {stage:32} {milliseconds:8.3f}")
    for stage in ("prepare", "writer in all"):
        ratio = host[f"{stage}, stored form"] / host[f"{stage}, float32"]
        print(f"  {stage}: stored form costs {ratio:.2f} of float32")


# -- arithmetic -----------------------------------------------------------------------------------------


def storage_choices(jpeg_bytes: float | None) -> list[dict[str, Any]]:
    """Bytes an image of each thing that a store can hold, from the shapes and dtypes of its own format."""

    def features(**options: Any) -> int:
        return sum(spec.row_bytes for spec in feature_arrays(WIDTH, **options))

    pooled = features()
    choices: dict[str, float] = {"features/pooled (always)": pooled}
    choices |= {f"--grid {side}": features(grid=side) - pooled for side in (7, 8, 16)}
    choices["--views 4"] = features(views=4) - pooled
    choices["--views 4 with --grid 8"] = features(views=4, grid=8) - features(grid=8)
    choices["clips: a row of frames, each"] = pooled
    choices["--logits, 1,000 classes"] = logits_array("probe", 1000).row_bytes
    choices[f"--images raw ({SIZE} px)"] = sum(spec.row_bytes for spec in image_arrays("raw", SIZE))
    if jpeg_bytes is not None:
        choices["--images jpeg (the 640×480 files of this benchmark)"] = round(jpeg_bytes)
    choices["cli convert --int8: pooled"] = WIDTH + TOKEN_SCALE_BYTES
    choices["cli convert --int8: --grid 8"] = 64 * (WIDTH + TOKEN_SCALE_BYTES)
    choices["cli convert --pca 256: pooled"] = 256 * 2
    choices["cli convert --pca 256: --grid 8"] = 64 * 256 * 2
    return [
        {"stored": name, "bytes an image": size, "GB a million": size / 1e3} for name, size in choices.items()
    ]


def h100_arithmetic(decode_ms: float) -> dict[str, Any]:
    """What one H100 would ask of the host. Arithmetic, not a measurement."""
    rate = H100_FLOPS * UTILISATION / (2 * TOWER_PARAMETERS * TOKENS)
    return {
        "images_per_second": rate,
        "tflop_per_image": 2 * TOWER_PARAMETERS * TOKENS / 1e12,
        "assumes": f"{H100_FLOPS / 1e12:.0f} TFLOP/s bf16 at {UTILISATION:.0%}, {TOWER_PARAMETERS / 1e9:.2f} billion "
        f"parameters × {TOKENS} tokens × 2",
        "decoding_cores": rate * decode_ms / 1000,
        "pooled_mb_per_second": rate * 2560 / 1e6,
        "grid16_mb_per_second": rate * 256 * 2560 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the tower")
    parser.add_argument("--images", type=int, default=50_000, help="images of the memory run")
    parser.add_argument("--only", choices=["overhead", "memory", "host"], help="one of the measurements")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.images = 1, min(arguments.images, 2000)
    work = Path(tempfile.mkdtemp(prefix="extract-benchmark-"))
    report: dict[str, Any] = {}
    try:
        if arguments.only in (None, "host"):
            report["host"] = measure_host(work, arguments.rounds, 8 if arguments.quick else HOST_ROWS)
        if arguments.only in (None, "overhead"):
            images = 24 if arguments.quick else 48
            report["overhead"] = measure_overhead(work, images, arguments.depth, arguments.rounds)
            report["h100_arithmetic"] = h100_arithmetic(report["overhead"]["decode_ms_per_image"])
        if arguments.only in (None, "memory"):
            report["memory"] = measure_memory(work, arguments.images)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report["storage"] = storage_choices(report.get("overhead", {}).get("jpeg_bytes"))
    if arguments.json:
        print_json(report)
        return
    print_table(
        report["storage"], ["stored", "bytes an image", "GB a million"], "bytes of each storage choice"
    )
    if "host" in report:
        print_host(report["host"])
    if "overhead" in report:
        print_overhead(report["overhead"], report["h100_arithmetic"])
    if "memory" in report:
        print_memory(report["memory"])


def print_overhead(overhead: dict[str, Any], h100: dict[str, Any]) -> None:
    print(
        f"wall time of extract over that of the bare forward passes: {overhead['ratio']:.3f} (bound {BOUND}); "
        f"rounds {[round(ratio, 3) for ratio in overhead['ratios']]}"
    )
    print(
        f"  CPU seconds, decoders included: ratio {overhead['cpu_ratio']:.3f}, rounds "
        f"{[round(ratio, 3) for ratio in overhead['cpu_ratios']]}"
    )
    print(
        f"  {overhead['images']} JPEG files 640×480, batches of {overhead['batch']}, {overhead['depth']} blocks, "
        f"{overhead['torch_threads']} threads; CPU time: forward {overhead['bare_cpu_ms_per_image']:.0f} ms, decoding "
        f"{overhead['decode_ms_per_image']:.1f} ms an image: {overhead['decode_share']:.1%} of it"
    )
    print(
        f"arithmetic, not measured: an H100 ({h100['assumes']}) encodes {h100['images_per_second']:.0f} images/s, asks "
        f"for {h100['decoding_cores']:.1f} decoding cores like this one, and writes "
        f"{h100['pooled_mb_per_second']:.1f} MB/s pooled or {h100['grid16_mb_per_second']:.0f} MB/s of 16×16 grids"
    )


def print_memory(memory: dict[str, Any]) -> None:
    print(
        f"memory over {memory['images']:,} images ({memory['images_per_second']:.0f}/s): {memory['early_mb']:.0f} MB "
        f"in the second fifth, {memory['late_mb']:.0f} MB in the last: {memory['growth_mb']:+.0f} MB (bound {FLAT_MB})"
    )


if __name__ == "__main__":
    main()
