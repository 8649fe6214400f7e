"""Stages 5 and 6 of benchmarks/gpu.py: what a training step costs, trainings of every family, and several processes."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_data import KINDS, extract_small, make_step_store
from benchmarks.gpu_tower import open_tower, synchronize
from benchmarks.steps import build_parts, endless, loop_step

if TYPE_CHECKING:
    from benchmarks.gpu import Note, Settings

ROOT = Path(__file__).resolve().parents[1]
STUDENTS = {"resnet50": "resnet50", "vit-base": "vit-base"}
QUICK_STUDENTS = {"resnet50": "resnet18", "vit-base": "vit-tiny"}


def measure_training(settings: Settings, note: Note) -> None:
    """Step times first, then trainings of every family from stores that the tower has filled on this device."""
    if settings.wants("steps"):
        measure_steps(settings, note)
    if settings.wants("yolo"):
        measure_yolo(settings, note)
    if settings.wants("families"):
        train_families(settings, note)


# -- what a step costs --------------------------------------------------------------------------------------


def measure_steps(settings: Settings, note: Note) -> None:
    """Plain, with stored features, a bare PyTorch loop, and with the teacher in the loop; in turn, the same images."""
    side, grid, batch, rows = (112, 4, 4, 16) if settings.quick else (224, 8, 256, 1024)
    store = make_step_store(settings.work / "steps.zarr", rows, side, grid)
    teacher = open_tower(settings, side, "auto", compile_tower=settings.cuda)
    for name, student in (QUICK_STUDENTS if settings.quick else STUDENTS).items():
        options = {
            "store": store,
            "student": student,
            "batch_size": batch,
            "image_size": side,
            "device": settings.device,
        }
        kinds: dict[str, Callable[[], None]] = {}
        memory: dict[str, float] = {}
        for kind in ("plain", "stored", "live", "bare"):
            distillation = "none" if kind in ("plain", "bare") else "feature"
            built = build(settings, {**options, "distillation_type": distillation}, f"{name}-{kind}")
            if kind == "bare":
                kinds[kind] = bare_step(built)
            else:
                kinds[kind] = loop_step(built, live_features(teacher, grid) if kind == "live" else None)
            started = time.perf_counter()
            kinds[kind]()
            synchronize(settings.device)
            note(**{f"first_step_{kind}_{name}_s": time.perf_counter() - started})
            memory[kind] = peak_memory_gb(settings, kinds[kind])
        times = time_steps(kinds, settings)
        note(**{f"step_{kind}_{name}_ms": 1e3 * statistics.median(values) for kind, values in times.items()})
        note(
            **{
                f"stored_over_plain_{name}": ratio(times, "stored", "plain"),
                f"loop_over_bare_{name}": ratio(times, "plain", "bare"),
                f"live_over_stored_{name}": ratio(times, "live", "stored"),
                f"images_per_second_{name}": batch / statistics.median(times["stored"]),
                f"extra_memory_gb_{name}": memory["stored"] - memory["plain"],
            }
        )
        if settings.cuda:
            note(**{f"busy_{name}": busy_share(kinds["stored"])})
            if name == "resnet50":
                note(syncs_per_step=synchronizations(kinds["stored"]))
                note(cudnn_tuned_over_heuristic=tuning_gain(kinds["plain"], settings))
        del kinds
        if settings.cuda:
            torch.cuda.empty_cache()


def build(settings: Settings, options: dict[str, Any], name: str) -> Any:
    """The parts of a training, with the decoded images of its first batches kept in memory."""
    built = build_parts({"out": settings.work / "runs" / name, "workers": 0, "augment": "none", **options})
    loader = built.parts.train_loader
    loader.batches.epoch, loader.batches.start = 0, 0
    loader.loader = InMemory(list(loader.loader))
    return built


class InMemory:
    """Decoded batches again and again, in place of the worker processes: steps are timed, not decoding."""

    _iterator = None

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(
            [dict(batch) for batch in itertools.chain.from_iterable(itertools.repeat(self.batches, 50))]
        )


def bare_step(built: Any) -> Callable[[], None]:
    """The same student, images, precision and optimizer in the plainest loop one would write for a GPU."""
    student, optimizer = built.parts.module.student, built.parts.optimizer.optimizer
    device, autocast = built.parts.accelerator.device, built.parts.accelerator.autocast
    batches = itertools.cycle(list(itertools.islice(endless(built.parts.train_loader), 2)))
    normalize, parameters = built.parts.normalize, list(built.parts.module.parameters())
    pinned = {}
    student.train()

    def step() -> None:
        batch = next(batches)
        if id(batch) not in pinned:
            host = batch.images.cpu(), batch.labels.cpu()
            pinned[id(batch)] = [part.pin_memory() if device.type == "cuda" else part for part in host]
        images, labels = (part.to(device, non_blocking=True) for part in pinned[id(batch)])
        with autocast():
            logits = student(normalize(images)).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def live_features(teacher: Any, grid: int) -> Callable[[Any], None]:
    """What a teacher in the loop does: it encodes each batch's images, and these are the targets."""
    from extract.encode import resample_grid

    @torch.no_grad()
    def change(batch: Any) -> None:
        images = batch.images.to(teacher.device).permute(0, 3, 1, 2).contiguous()
        batch.features["features/grid"] = resample_grid(teacher.encode(images).grid, grid).half().clone()

    return change


def time_steps(kinds: dict[str, Callable[[], None]], settings: Settings) -> dict[str, list[float]]:
    """Seconds of a step of each kind, from blocks of steps that take turns; the device is waited for at a block's end."""
    rounds, block = (1, 2) if settings.quick else (2, 4) if settings.brief else (3, 6)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name in kinds if turn % 2 else reversed(kinds):
            kinds[name]()
            synchronize(settings.device)
            started = time.perf_counter()
            for _ in range(block):
                kinds[name]()
            synchronize(settings.device)
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - started) / block)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(times[over]) / statistics.median(times[under])


def tuning_gain(step: Callable[[], None], settings: Settings) -> float:
    """Time of a step with cuDNN's tuned kernels over that with those of its heuristics."""
    before = torch.backends.cudnn.benchmark

    def chosen(tuned: bool) -> Callable[[], None]:
        def run() -> None:
            torch.backends.cudnn.benchmark = tuned
            step()

        return run

    kinds = {"tuned": chosen(True), "heuristic": chosen(False)}
    times = time_steps(kinds, settings)
    torch.backends.cudnn.benchmark = before
    return ratio(times, "tuned", "heuristic")


def peak_memory_gb(settings: Settings, step: Callable[[], None]) -> float:
    """Peak memory of two steps beyond what was allocated before, GB; 0 on a CPU."""
    if not settings.cuda:
        return 0.0
    step()  # optimizer state
    synchronize(settings.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    synchronize(settings.device)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def busy_share(step: Callable[[], None]) -> float:
    """Share of the wall time of 12 steps in which a kernel ran, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(12):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, spans[0][0]
    for begin, finish in spans:
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return busy / (end - spans[0][0])


def synchronizations(step: Callable[[], None], steps: int = 20) -> float:
    """Host synchronizations a step that PyTorch warns about, in steady state."""
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(item.message) for item in caught if "synchroniz" in str(item.message)]
    for item in caught[:3]:
        print(f"synchronization: {item.filename}:{item.lineno}", file=sys.stderr)
    return len(found) / steps


# -- YOLOv8 -------------------------------------------------------------------------------------------------


def measure_yolo(settings: Settings, note: Note) -> None:
    """A step of YOLOv8s with and without the distilled level P5, as ultralytics' trainer does it."""
    from benchmarks.detection_cost import make_store, set_up
    from train.yolo.targets import PENDING

    size, batch = (64, 2) if settings.quick else (640, 16)
    student = "yolov8/n" if settings.quick else "yolov8/s"
    store = make_store(settings.work / "yolo-steps.zarr")
    trainers = {
        levels: set_up(
            store, settings.work / "runs" / f"yolo-{levels}", size, levels, student, settings.device, batch
        )
        for levels in ("none", "P5")
    }
    batches = {levels: next(iter(trainer.train_loader)) for levels, trainer in trainers.items()}
    for values in batches.values():
        values.pop(PENDING, None)  # what the loader has begun to read
    kinds = {levels: yolo_step(trainers[levels], batches[levels]) for levels in trainers}
    times = time_steps(kinds, settings)
    note(step_plain_yolov8s_ms=1e3 * statistics.median(times["none"]))
    note(stored_over_plain_yolov8s=ratio(times, "P5", "none"))


def yolo_step(trainer: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """A step on the batch; as in a training, the grids of the next step are being read meanwhile."""
    from benchmarks.detection_cost import train_step

    targets = trainer.job.splits["train"].targets
    ahead: list[dict[str, Any]] = []

    def fetch() -> None:
        ahead.append(dict(batch))
        if targets is not None:
            targets.prefetch(ahead[-1])

    def step() -> None:
        if not ahead:
            fetch()
        fetch()
        train_step(trainer, ahead.pop(0))

    return step


# -- trainings ------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A short training: data set, student and options; `size` is the side of its images, px, on a GPU (64 in a quick run)."""

    data: str
    student: str
    size: int
    options: dict[str, Any]
    cuda_only: bool = False


TRAININGS: dict[str, Training] = {
    "resnet18": Training("classes", "resnet18", 224, {"control": True}),
    "resnet18_bf16": Training(
        "classes", "resnet18", 224, {"precision": "bf16", "mixup_alpha": 0.2}, cuda_only=True
    ),
    "resnet18_fp16": Training("classes", "resnet18", 224, {"precision": "fp16"}, cuda_only=True),
    "resnet18_fp32": Training(
        "classes", "resnet18", 224, {"precision": "fp32", "ema_decay": 0.99}, cuda_only=True
    ),
    "resnet18_compiled": Training("classes", "resnet18", 224, {"compile": True}, cuda_only=True),
    "vit_relation": Training("classes", "vit-tiny", 224, {"feature_loss_type": "relation"}),
    "unet_deterministic": Training("masks", "unet/small", 128, {"deterministic": True}),
    "lstm": Training("clips", "lstm/small", 64, {"batch_size": 4}),
    "yolov8n": Training("boxes", "yolov8/n", 320, {}),
}


def train_families(settings: Settings, note: Note) -> None:
    """Short trainings of every family, in every precision, with a control, compiled, evaluated and resumed."""
    failures: list[str] = []

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            found = None
        note(runs_failed=len(failures), failures=failures, **{f"run_{name}_s": time.perf_counter() - started})
        return found

    stores = {kind: attempt(f"extract_{kind}", partial(extract_small, settings, kind)) for kind in KINDS}
    for name, training in TRAININGS.items():
        if training.cuda_only and not settings.cuda:
            continue
        size = 64 if settings.quick else training.size
        attempt(
            name,
            partial(
                train,
                settings,
                name,
                stores[training.data],
                training.student,
                image_size=size,
                **training.options,
            ),
        )
    run, store = str(settings.work / "runs" / "resnet18"), str(stores["classes"])
    attempt("evaluate", partial(run_cli, "evaluate", run, store, "--device", settings.device))
    difference = attempt("resumed", partial(resumed_difference, settings, stores["classes"]))
    if difference is not None:
        note(resumed_difference=difference)


def train(settings: Settings, name: str, store: Path, student: str, **options: Any) -> dict[str, Any]:
    """A training of two epochs; its summary. Raises AssertionError for a loss that is not finite."""
    from train.config import load_config
    from train.run import run_training

    out = settings.work / "runs" / name
    values = {"epochs": 1 if settings.quick else 2, "batch_size": 8, "workers": 0, "device": settings.device}
    summary = run_training(load_config({"store": store, "student": student, "out": out, **values, **options}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines]
    assert losses, "no epoch was recorded"
    assert np.isfinite(losses).all(), f"losses {losses}"
    return summary


def resumed_difference(settings: Settings, store: Path) -> float:
    """Largest relative difference of the final weights between a run of two epochs and one that was resumed after the first."""
    # No warm-up: it is at most a fifth of the run, so it would differ between one epoch and two.
    options = {"image_size": 64, "precision": "fp32", "lr_scheduler": "constant", "warmup_epochs": 0}
    options |= {"deterministic": True}
    whole = train(settings, "whole", store, "resnet18", **{**options, "epochs": 2})
    train(settings, "parts", store, "resnet18", **{**options, "epochs": 1})
    parts = train(settings, "parts", store, "resnet18", **{**options, "epochs": 2, "resume": True})
    assert whole["epochs_done"] == parts["epochs_done"] == 2
    states = [
        torch.load(settings.work / "runs" / name / "last.pt", map_location="cpu", weights_only=True)[
            "model_state_dict"
        ]
        for name in ("whole", "parts")
    ]
    return max(difference(states[0][name], states[1][name]) for name in states[0])


def difference(left: Tensor, right: Tensor) -> float:
    scale = float(left.double().abs().max()) or 1.0
    return float((left.double() - right.double()).abs().max()) / scale


def run_cli(*words: str, **environment: str) -> None:
    """A command in a process of its own. Raises CalledProcessError."""
    subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


# -- 6. several processes ---------------------------------------------------------------------------------


def check_distributed(settings: Settings, note: Note) -> None:
    """One rank under torchrun against a single process, and a sweep of two trials at once on one device."""
    store = settings.work / "classes.zarr"
    if not store.exists():
        extract_small(settings, "classes")
    words = [
        "--student",
        "resnet18",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--precision",
        "fp32",
    ]
    words += ["--image-size", "64", "--device", settings.device]
    run_cli("train", str(store), *words, "--out", str(settings.work / "runs" / "single"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    rank = [
        *launcher,
        str(ROOT / "cli.py"),
        "train",
        str(store),
        *words,
        "--out",
        str(settings.work / "runs" / "rank"),
    ]
    subprocess.run(rank, check=True, stdout=subprocess.DEVNULL)
    losses = [
        json.loads((settings.work / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])[
            "train_loss"
        ]
        for name in ("single", "rank")
    ]
    note(rank_difference=abs(losses[0] - losses[1]) / abs(losses[0]))
    sweep = settings.work / "sweep"
    settled = [
        f"{name}={value}"
        for name, value in (("epochs", 1), ("batch_size", 8), ("workers", 0), ("image_size", 64))
    ]
    sets = [word for item in [*settled, f"device={settings.device}"] for word in ("--set", item)]
    code = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "sweep", str(store), "--out", str(sweep), "--students", "resnet18", "--jobs", "2", *sets],
        stdout=subprocess.DEVNULL,
    ).returncode  # fmt: skip
    outcomes = [json.loads(path.read_text()) for path in sorted(sweep.glob("trials/*/outcome.json"))]
    note(
        sweep_trials=len(outcomes),
        sweep_failed=sum(item.get("state") != "done" for item in outcomes) + (code != 0),
    )
