"""The same student learns the same teacher's features on the same photos: with LightlyTrain and with this project.

LightlyTrain shows every image to the teacher in every epoch, this project once (`cli extract`). Both have the same
teacher architecture with the same weights file (random weights, which LightlyTrain makes: only time and memory are
compared), the student resnet18 from random weights, the same image size and batch size, and their own defaults otherwise.

LightlyTrain is no dependency of this project. Install it into an environment of its own:

    python3 -m venv peer && peer/bin/pip install lightly-train==0.18.0
    python benchmarks/peers.py --data DIR --peer-python peer/bin/python [--teacher small|base] [--photos 480]
        [--epochs 3] [--rounds 2] [--batch-size 32] [--device cpu] [--total-epochs 20] [--work DIR] [--json]

DIR is a folder of photos in any depth; `--photos` of them are taken, evenly spread, and a tenth more for our validation
after each epoch (LightlyTrain has none). The two take turns, `--rounds` times. An epoch's time is the interval between the
records that both write to `metrics.jsonl`; the first one, with the start, is left out. Totals for one and for five students
of `--total-epochs` are computed from the medians: start and epochs, and for us one extraction. Memory is the peak of the
proportional set size of all processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_SIZE = 224  # LightlyTrain's default
# LightlyTrain's name of the teacher, and timm's.
TEACHERS = {
    "small": ("dinov2/vits14-noreg", "timm:vit_small_patch14_dinov2"),
    "base": ("dinov2/vitb14-noreg", "timm:vit_base_patch14_dinov2"),
}
STUDENTS = 5
POLL_S = 0.2
MEMORY_EVERY = 10  # polls


class Usage(NamedTuple):
    """What a command took: seconds on the clock, CPU seconds, MB; and both times of each epoch but the first."""

    wall: float
    cpu: float
    memory: float
    epoch_wall: list[float]
    epoch_cpu: list[float]


# -- inside LightlyTrain's environment, where nothing of this project is imported ---------------------------


def inside_peer(order: dict[str, Any]) -> None:
    """Make the weights file, or train."""
    import lightly_train
    import torch
    from lightly_train._models import package_helpers

    if order["make_weights"]:
        torch.manual_seed(0)
        made = package_helpers.get_wrapped_model(order["teacher"], num_input_channels=3, load_weights=False)
        torch.save(made.get_model().state_dict(), order["weights"])
        return
    lightly_train.pretrain(
        out=order["out"],
        data=order["photos"],
        model="torchvision/resnet18",
        method="distillation",
        method_args={"teacher": order["teacher"], "teacher_weights": order["weights"]},
        epochs=order["epochs"],
        batch_size=order["batch_size"],
        transform_args={"image_size": (IMAGE_SIZE, IMAGE_SIZE)},
        accelerator=order["device"],
        overwrite=True,
    )


# -- measuring ----------------------------------------------------------------------------------------------


def run_measured(command: list[str], log: Path, metrics: Path | None = None) -> Usage:
    """Run a command and its processes to the end; `metrics`: the file that gets a record for each epoch.

    Raises SystemExit with the end of its output when it fails.
    """
    import psutil

    start, memory, polls, cpu = time.perf_counter(), 0.0, 0, 0.0
    marks: dict[int, tuple[float, float]] = {}
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            if polls % MEMORY_EVERY == 0:
                memory = max(memory, sum_over(process, lambda item: item.memory_full_info().pss))
            cpu = max(cpu, sum_over(process, cpu_seconds))
            for epoch in epochs_in(metrics):
                marks.setdefault(epoch, (time.perf_counter(), cpu))
            polls += 1
            time.sleep(POLL_S)
    if child.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"{command[0]} ended with exit code {child.returncode}:\n{tail}")
    times = [marks[epoch] for epoch in sorted(marks)]
    pairs = list(itertools.pairwise(times))
    return Usage(
        time.perf_counter() - start,
        cpu,
        memory / 1e6,
        [after[0] - before[0] for before, after in pairs],
        [after[1] - before[1] for before, after in pairs],
    )


def sum_over(process: Any, figure: Any) -> float:
    """A figure of a process and its descendants, of those that are still there."""
    import psutil

    total = 0.0
    try:
        for item in (process, *process.children(recursive=True)):
            try:
                total += figure(item)
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def cpu_seconds(process: Any) -> float:
    """User and system time, with those of children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def epochs_in(metrics: Path | None) -> list[int]:
    if metrics is None or not metrics.exists():
        return []
    records = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # being written
            continue
    return [int(record["epoch"]) for record in records if "epoch" in record]


# -- both sides ---------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.peer_name, self.timm_name = TEACHERS[arguments.teacher]
        self.weights = work / f"{arguments.teacher}.pth"
        self.photos = link_photos(arguments.data, work / "photos", arguments.photos)
        self.store = work / f"{arguments.teacher}.zarr"

    def peer(self, make_weights: bool = False) -> Usage:
        out = self.work / "lightly"
        order = {
            "make_weights": make_weights,
            "teacher": self.peer_name,
            "weights": str(self.weights),
            "photos": str(self.photos / "train"),
            "out": str(out),
            "epochs": self.arguments.epochs,
            "batch_size": self.arguments.batch_size,
            "device": self.arguments.device,
        }
        metrics = out / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        command = [str(self.arguments.peer_python), __file__, "--inside", json.dumps(order)]
        return run_measured(command, self.work / "lightly.log", metrics)

    def extract(self) -> Usage:
        splits = [f"--split={name}={self.photos / name}" for name in ("train", "val")]
        return run_measured(
            [
                *(sys.executable, "-m", "cli", "extract", str(self.photos), "--out", str(self.store)),
                *("--source", "folder", *splits, "--images", "jpeg", "--overwrite"),
                *("--teacher", self.timm_name, "--teacher-path", str(self.weights)),
                *("--image-size", str(IMAGE_SIZE), "--grid", "native", "--device", self.arguments.device),
            ],
            self.work / "extract.log",
        )

    def ours(self) -> Usage:
        out = self.work / "ours"
        (out / "metrics.jsonl").unlink(missing_ok=True)
        return run_measured(
            [
                *(sys.executable, "-m", "cli", "train", str(self.store), "--student", "resnet18"),
                *("--task", "features", "--out", str(out), "--overwrite", "--image-size", str(IMAGE_SIZE)),
                *("--epochs", str(self.arguments.epochs), "--batch-size", str(self.arguments.batch_size)),
                *("--device", self.arguments.device),
            ],
            self.work / "ours.log",
            out / "metrics.jsonl",
        )


def link_photos(data: Path, folder: Path, count: int) -> Path:
    """`train` and `val` below `folder`: links to `count` photos, and to a tenth as many others."""
    photos = sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES)
    held_out = max(1, count // 10)
    needed = count + held_out
    if len(photos) < needed:
        raise SystemExit(f"--data {data}: {len(photos)} photos, but --photos {count} needs {needed}")
    chosen = [photos[number * len(photos) // needed] for number in range(needed)]
    for number, photo in enumerate(chosen):
        split = "val" if number * held_out // needed != (number + 1) * held_out // needed else "train"
        link = folder / split / f"{number:05d}{photo.suffix.lower()}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(photo.resolve())
    return folder


def compare(bench: Bench, rounds: int, total_epochs: int) -> dict[str, Any]:
    """Figures of both sides, and how many times faster ours is, by the clock (`wall`) and in CPU time (`cpu`)."""
    peers, ours, extractions = [], [], []
    for _ in range(rounds):
        peers.append(bench.peer())
        extractions.append(bench.extract())
        ours.append(bench.ours())
    result: dict[str, Any] = {
        "teacher": bench.timm_name,
        "photos": bench.arguments.photos,
        "rounds": rounds,
        "epochs_measured": bench.arguments.epochs,
        "total_epochs": total_epochs,
        "peak_mb": {
            "lightly": max(usage.memory for usage in peers),
            "extract": max(usage.memory for usage in extractions),
            "ours": max(usage.memory for usage in ours),
        },
    }
    for kind in ("wall", "cpu"):
        lightly, lightly_start = epoch_and_start(peers, kind)
        epoch, start = epoch_and_start(ours, kind)
        once = median(getattr(usage, kind) for usage in extractions)
        figures: dict[str, Any] = {
            "epoch": {"lightly": lightly, "ours": epoch, "extract": once, "ratio": lightly / epoch}
        }
        for students in (1, STUDENTS):
            theirs = students * (lightly_start + total_epochs * lightly)
            mine = once + students * (start + total_epochs * epoch)
            figures[f"{students} students"] = {"lightly": theirs, "ours": mine, "ratio": theirs / mine}
        result[kind] = figures
    return result


def epoch_and_start(usages: list[Usage], kind: str) -> tuple[float, float]:
    """Medians: of an epoch, and of everything before and after the epochs."""
    epochs = [value for usage in usages for value in getattr(usage, f"epoch_{kind}")]
    epoch = median(epochs)
    rest = [getattr(usage, kind) - (len(usage.epoch_wall) + 1) * epoch for usage in usages]
    return epoch, max(0.0, median(rest))


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['photos']} photos at {IMAGE_SIZE} px, teacher {result['teacher']}, student resnet18, "
        f"{result['rounds']} rounds; totals for {result['total_epochs']} epochs are computed"
    )
    print("| | LightlyTrain | ours | times faster | CPU time: LightlyTrain | ours | times less |")
    print("|---|---|---|---|---|---|---|")
    wall, cpu = result["wall"], result["cpu"]
    names = {
        "epoch": "an epoch, s",
        "1 students": "one student, s",
        f"{STUDENTS} students": f"{STUDENTS} students, s",
    }
    for key, name in names.items():
        cells = [
            f"{side[key]['lightly']:.1f} | {side[key]['ours']:.1f} | {side[key]['ratio']:.1f}"
            for side in (wall, cpu)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| extraction, once, s | | {wall['epoch']['extract']:.1f} | | | {cpu['epoch']['extract']:.1f} | |")
    peak = result["peak_mb"]
    print(
        f"| peak memory, MB | {peak['lightly']:,.0f} | {peak['ours']:,.0f} (extraction {peak['extract']:,.0f}) | | | | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help="folder of photos")
    parser.add_argument("--peer-python", type=Path, help="the Python of LightlyTrain's environment")
    parser.add_argument("--teacher", choices=TEACHERS, default="small")
    parser.add_argument("--photos", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=3, help="measured; two at least")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--total-epochs", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder for the store and both runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.inside:
        inside_peer(json.loads(arguments.inside))
        return
    if arguments.data is None or arguments.peer_python is None:
        parser.error("--data and --peer-python are needed")
    if arguments.epochs < 2:
        parser.error("--epochs: two at least, since the first one includes the start")
    check_peer(arguments.peer_python)
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments, work)
        bench.peer(make_weights=True)
        result = compare(bench, arguments.rounds, arguments.total_epochs)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)


def check_peer(python: Path) -> None:
    """Raises SystemExit when LightlyTrain cannot be imported there."""
    try:
        done = subprocess.run(
            [str(python), "-c", "import lightly_train"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise SystemExit(f"--peer-python {python}: {error.strerror}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(f"--peer-python {python}: {reason}; install lightly-train==0.18.0 there")


if __name__ == "__main__":
    main()
