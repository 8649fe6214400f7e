"""What stage two costs: the distillation step, the loop, memory, loading, and a cached teacher against a live one.

    python benchmarks/train.py                 # everything, about ten minutes on two cores
    python benchmarks/train.py --only step,loop --quick --json

Timings of two things are interleaved, one step of each in turn, so that a slow moment of the machine hits both; the
ratio of medians is reported. Random images and random weights: only speed and memory are measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.steps import build_parts, endless, loop_step
from benchmarks.train_data import SIDE, make_store, smooth_jpeg
from console.output import print_json, print_table
from train.loop.machine import peak_resident_mb

BATCH = 32


def build(store: Path, out: Path, workers: int = 0, **options: Any) -> Any:
    """The loop's parts for resnet18, without starting it."""
    kind = {"student": "resnet18", "image_size": SIDE, "batch_size": BATCH, "device": "cpu", "epochs": 100}
    return build_parts({"store": store, "out": out, "workers": workers, **kind, **options})


def interleave(steps: dict[str, Callable[[], None]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """CPU seconds of each step in every round, the order reversed in every other round.

    Everything measured runs in this process on one thread, so on an idle machine this is the wall time; on a busy
    one it stays comparable.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + warmup):
        names = list(steps) if number % 2 else list(reversed(steps))
        for name in names:
            started = time.process_time()
            steps[name]()
            if number >= warmup:
                times[name].append(time.process_time() - started)
    return times


def bare_step(built: Any) -> Callable[[], None]:
    """The same student, batches and loss in the plainest loop one would write."""
    from torch.nn import functional

    student, optimizer = built.parts.module.student, built.parts.optimizer.optimizer
    batches = endless(built.parts.train_loader)
    normalize, parameters = built.parts.normalize, list(built.parts.module.parameters())
    student.train()

    def step() -> None:
        batch = next(batches)
        loss = functional.cross_entropy(student(normalize(batch.images)).logits, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def ratio_row(name: str, times: dict[str, list[float]], ours: str, base: str, aim: float) -> dict[str, Any]:
    pairs = [a / b for a, b in zip(times[ours], times[base], strict=True)]
    return {
        "measurement": name,
        "ours": statistics.median(times[ours]),
        "baseline": statistics.median(times[base]),
        "unit": "CPU s/step",
        "ratio": statistics.median(pairs),
        "aim": f"<= {aim}",
    }


def measure_step(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """A distillation step against the same step of the control: pooled rows and 7×7 grids onto 4×4 cells."""
    store = make_store(folder / "step.zarr", 256)
    steps = {
        "distilled": loop_step(build(store, folder / "a", distillation_type="feature")),
        "task alone": loop_step(build(store, folder / "b", distillation_type="none")),
    }
    times = interleave(steps, 6 if quick else 30)
    return [ratio_row("distillation step / step without it", times, "distilled", "task alone", 1.05)]


def measure_loop(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Our loop against a bare PyTorch loop over the same loader."""
    store = make_store(folder / "loop.zarr", 256)
    steps = {
        "loop": loop_step(build(store, folder / "a", distillation_type="none")),
        "bare": bare_step(build(store, folder / "b", distillation_type="none")),
    }
    times = interleave(steps, 6 if quick else 30)
    return [ratio_row("our loop / bare PyTorch loop", times, "loop", "bare", 1.03)]


def measure_memory(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Peak resident memory of two processes: our distilling loop, and the bare loop without distillation."""
    store = make_store(folder / "memory.zarr", 512)
    peaks = {}
    for kind in ("bare", "loop"):
        command = [
            sys.executable,
            __file__,
            "--memory-of",
            kind,
            "--store",
            str(store),
            "--out",
            str(folder / kind),
        ]
        peaks[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    row = {"measurement": "resident memory, distilling loop / bare loop", "ours": peaks["loop"]}
    row |= {
        "baseline": peaks["bare"],
        "unit": "MB",
        "ratio": peaks["loop"] - peaks["bare"],
        "aim": "<= +150 MB",
    }
    return [row]


def memory_of(kind: str, store: Path, out: Path) -> None:
    """In a process of its own: twelve steps, then the peak resident memory in MB."""
    distillation = "feature" if kind == "loop" else "none"
    built = build(store, out, distillation_type=distillation)
    step = loop_step(built) if kind == "loop" else bare_step(built)
    for _ in range(12):
        step()
    print(peak_resident_mb())


def measure_loading(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Decoding and augmenting 480-pixel JPEG files to 224: our loader against timm's, one process each."""
    import timm.data
    from timm.data import create_dataset, create_loader

    del timm.data
    count = 96 if quick else 384
    rng = np.random.default_rng(0)
    root = folder / "files"
    for number in range(count):
        path = root / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(smooth_jpeg(rng, 480))
    theirs = create_loader(
        create_dataset("", root=str(root)), (3, 224, 224), BATCH, is_training=True, use_prefetcher=False,
        num_workers=0, color_jitter=0.4, scale=(0.35, 1.0), interpolation="bilinear", hflip=0.5,
        device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    ours = files_loader(root)
    batches = {"ours": iterate(ours), "timm": iterate(lambda: iter(theirs))}
    rounds = 4 if quick else 16
    times = interleave({name: lambda it=it: next(it) for name, it in batches.items()}, rounds)  # type: ignore[misc]
    row = ratio_row("decoding and augmentation, ours / timm", times, "ours", "timm", 1.0)
    return [{**row, "unit": f"CPU s/{BATCH} images"}]


def iterate(start: Callable[[], Iterator[Any]]) -> Iterator[None]:
    while True:
        for batch in start():
            if len(batch[0] if isinstance(batch, (list, tuple)) else batch) == BATCH:
                yield


def files_loader(root: Path) -> Callable[[], Iterator[Any]]:
    """Our data set over the same files: read, hash, decode, view, colours, to normalized tensors."""
    from hashlib import blake2b

    from store.format import Preprocessing
    from train.data.batches import Item, collate_views
    from train.data.images import ImageReader, ImageViews, ViewSettings
    from train.data.views import AUGMENTATIONS

    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))

    class Files:
        """As much of a split as the reader needs."""

        names: tuple[str, ...] = ()
        keys = files

        def gather(self, rows: Any, names: Any) -> Any:
            digests = [blake2b((root / files[row]).read_bytes(), digest_size=16).digest() for row in rows]
            return {names[0]: np.stack([np.frombuffer(digest, np.uint8) for digest in digests])}

    settings = ViewSettings(image_size=224, policy="squash", augmentation=AUGMENTATIONS["full"], seed=0)
    dataset = ImageViews(ImageReader(Files(), root, Preprocessing(image_size=224)), settings)
    mean, std = torch.tensor([123.7, 116.3, 103.5]), torch.tensor([58.4, 57.1, 57.4])

    def start() -> Iterator[Any]:
        for first in range(0, len(files) - BATCH + 1, BATCH):
            batch = collate_views([dataset.show(Item(0, row, 1.0)) for row in range(first, first + BATCH)])
            yield ((batch["images"].float() - mean) / std).movedim(-1, -3).contiguous()

    return start


STUDENTS = ("resnet18", "resnet34", "timm:mobilenetv3_small_100", "timm:efficientnet_lite0", "vit-tiny")


def measure_sweep(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Five students × epochs: the teacher once and cached, or in every step of every student.

    The teacher is EfficientNet-Lite2 (1280 wide, random weights: only its cost matters); a real one of 0.67
    billion parameters makes the difference far larger. Each part in a process of its own, for its peak memory;
    the teacher's pass over the images counts in the time of the cached side.
    """
    rows, epochs = (32, 2) if quick else (32, 20)
    store = make_store(folder / "sweep.zarr", rows, side=64)
    teacher, cached, online = (
        sweep_part(kind, store, folder / kind, epochs) for kind in ("teacher", "cached", "online")
    )
    seconds = teacher["seconds"] + cached["seconds"]
    name = f"{len(STUDENTS)} students × {epochs} epochs × {rows} images"
    return [
        {
            "measurement": f"{name}: time, stored / live teacher",
            "ours": seconds,
            "baseline": online["seconds"],
            "unit": "s",
            "ratio": seconds / online["seconds"],
            "aim": "< 1",
        },
        {
            "measurement": f"{name}: peak memory, training from the store / with a live teacher",
            "ours": cached["peak_mb"],
            "baseline": online["peak_mb"],
            "unit": "MB",
            "ratio": cached["peak_mb"] / online["peak_mb"],
            "aim": "< 1",
        },
    ]


def sweep_part(kind: str, store: Path, out: Path, epochs: int) -> dict[str, float]:
    """`sweep_of` in a process of its own."""
    command = [sys.executable, __file__, "--sweep-of", kind, "--store", str(store), "--out", str(out)]
    command += ["--epochs", str(epochs)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(text.splitlines()[-1])
    return result


def sweep_of(kind: str, store: Path, out: Path, epochs: int) -> None:
    """The teacher's one pass, or five students with targets from the store, or from a live teacher."""
    import timm

    torch.manual_seed(0)
    teacher = None
    if kind != "cached":
        teacher = timm.create_model("tf_efficientnet_lite2", num_classes=0).eval()
    started = time.perf_counter()
    if kind == "teacher":
        plain = build(store, out, image_size=64, distillation_type="none")
        for batch in plain.parts.train_loader.epoch(0):
            live_grid(teacher, plain, batch)
    for student in () if kind == "teacher" else STUDENTS:
        built = build(store, out, student=student, image_size=64, distillation_type="feature")
        step = loop_step(built) if teacher is None else loop_step(built, live_targets(teacher, built))
        for _ in range(epochs * len(built.parts.train_loader.batches.slices)):
            step()
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak_resident_mb()}))


def live_targets(teacher: Any, built: Any) -> Callable[[Any], None]:
    """What an online teacher does: it encodes each batch's augmented images, and these are the targets."""

    def change(batch: Any) -> None:
        batch.features = {"features/grid": live_grid(teacher, built, batch)}
        # The teacher sees the very view that the student sees, so nothing has to be carried.
        batch.views = built.parts.objective.teacher_views[batch.rows]

    return change


@torch.no_grad()
def live_grid(teacher: Any, built: Any, batch: Any) -> torch.Tensor:
    """The teacher's map [B, 7, 7, 1280] of a batch's images, at its own 224 pixels."""
    from torch.nn import functional

    images = functional.interpolate(built.parts.normalize(batch.images), (224, 224), mode="bilinear")
    grid: torch.Tensor = teacher.forward_features(images).permute(0, 2, 3, 1)
    return grid


MEASUREMENTS: dict[str, Callable[[Path, bool], list[dict[str, Any]]]] = {
    "step": measure_step,
    "loop": measure_loop,
    "memory": measure_memory,
    "loading": measure_loading,
    "sweep": measure_sweep,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="comma-separated: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    for name in ("--memory-of", "--sweep-of", "--store", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        return memory_of(arguments.memory_of, Path(arguments.store), Path(arguments.out))
    if arguments.sweep_of:
        return sweep_of(arguments.sweep_of, Path(arguments.store), Path(arguments.out), arguments.epochs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            place = Path(folder) / name
            place.mkdir()
            rows += MEASUREMENTS[name](place, arguments.quick)
    if arguments.json:
        print_json(
            {"rows": rows, "torch": torch.__version__, "cores": os.cpu_count(), "threads": arguments.threads}
        )
    else:
        print_table(rows, ["measurement", "ours", "baseline", "unit", "ratio", "aim"], "Stage two, CPU")
    return None


if __name__ == "__main__":
    main()
