"""`cli demo`: the whole pipeline on real images, as the commands that a user would type."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, NamedTuple

import typer

from commands.assets import PRETRAINED_TEACHER
from commands.extract import SUGGESTIONS, Suggestion, option_words
from console.stop import Stopped
from files.writing import check_writable
from processes.spawning import child_environment

IMAGE_SIDE = 64
GRID = "4"  # cells a side: the native grid of the pretrained teacher at its size below, half of Qwen's
QWEN_SIZE, PRETRAINED_SIZE = "112", "128"
VAL_FRACTION = 0.3
MIN_FREE_GB = 1.0
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Size(NamedTuple):
    """How much the demo does: `normal` stays under six minutes on two cores, `smallest` is for CI."""

    images: int
    epochs: int
    seeds: str


NORMAL = Size(500, 10, "0,1")
SMALLEST = Size(150, 2, "0")


class Step(NamedTuple):
    """One command of the demo and its title."""

    title: str
    arguments: list[str]


class DemoError(Exception):
    """The demo cannot start, or one of its commands failed."""

    exit_code = 1


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write into; a second run continues in it.")] = Path(
        "demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Your own images (any layout that extract knows).")
    ] = None,
    teacher_path: Annotated[
        Path | None, typer.Option(help="A Qwen2.5-VL checkpoint instead of the random one.")
    ] = None,
    smallest: Annotated[bool, typer.Option(help="The smallest sizes that still run every step.")] = False,
) -> None:
    """cli demo --out demo

    The whole pipeline on 500 real images in a few minutes: make a tiny Qwen2.5-VL, extract with it, extract
    with a pretrained teacher, probe both, train a student and its control, sweep two students, report.
    """
    size = SMALLEST if smallest else NORMAL
    started = time.monotonic()
    check_disk(out)
    task = "classification" if data is None else task_of(data)  # before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: cannot be created: {error.strerror}") from None
    images = data or write_digits(out / "digits", size.images)
    weights = fetch_pretrained_weights() if teacher_path is None else None
    for number, step in enumerate(list_steps(out, images, task, teacher_path, weights, size), start=1):
        run_step(number, step)
    if teacher_path is None and data is None:
        print(
            "\nThe demo's teacher has never seen these digits and knows them no better than the students: do not expect a "
            "gain over the control. The demo shows the steps, not the quality of Qwen2.5-VL.",
            flush=True,
        )
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. The report: {(out / 'sweep' / 'report.html').resolve()}",
        flush=True,
    )


def task_of(images: Path) -> str:
    """The task that the data set's annotations allow. Raises SourceError when it cannot be opened."""
    from extract.sources.detect import open_source

    return open_source(images, val_fraction=VAL_FRACTION).task


def fetch_pretrained_weights() -> Path:
    from commands.assets import pretrained_teacher_weights

    print("Fetching the pretrained teacher's weights (23 MB, once) ...", flush=True)
    return pretrained_teacher_weights()


def write_digits(folder: Path, count: int) -> Path:
    """The first `count` of scikit-learn's scanned digits as PNG files in a folder per class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    print(f"Writing {count} real scans of handwritten digits to {folder}", flush=True)
    for index, (scan, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(scan * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(path)
    return folder


def check_disk(out: Path) -> None:
    import shutil

    check_writable(out, "--out")
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < MIN_FREE_GB:
        raise DemoError(
            f"only {free_gb:.1f} GB free in {place}: the demo needs {MIN_FREE_GB:g} GB; choose another --out"
        )


def run_step(number: int, step: Step) -> None:
    """Show the command as a user would type it, and run it.

    Raises Stopped after a signal, DemoError when the command failed.
    """
    shown = shlex.join(["cli", *step.arguments])
    print(f"\n[{number}] {step.title}\n$ {shown}", flush=True)
    exit_code, signals = run_command([sys.executable, "-m", "cli", *step.arguments])
    if signals:
        raise Stopped("the demo was stopped: the same command continues", 128 + signals[0])
    if exit_code != 0:
        raise DemoError(f"the demo stopped at step {number}, exit code {exit_code}: {shown}")


def run_command(command: list[str]) -> tuple[int, list[int]]:
    """Its exit code, and the signals received meanwhile: each is passed on once, and the command ends by itself.

    It has its own process group, else Ctrl-C would reach it twice: from the terminal and from here.
    """
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in FORWARDED}
    try:
        child = subprocess.Popen(command, env=child_environment(), process_group=0)
        for number in signals:  # received before the child existed
            child.send_signal(number)
        return child.wait(), signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- the commands, as a user would type them ---------------------------------------------------------------


def list_steps(
    out: Path, images: Path, task: str, teacher_path: Path | None, weights: Path | None, size: Size
) -> list[Step]:
    """The commands, in order, for a data set of this task. Paths are relative to the working directory.

    Without `teacher_path`, a random Qwen2.5-VL shows the steps, and a teacher with pretrained `weights` teaches.
    """
    suggestion = SUGGESTIONS[task]
    kept = ["--images", "jpeg"] if suggestion.images else []

    def extract(title: str, store: Path, image_size: str, teacher: list[str]) -> Step:
        words = ["extract", str(images), "--out", str(store), *kept, "--val-fraction", str(VAL_FRACTION)]
        return Step(title, [*words, *teacher, "--image-size", image_size, "--grid", GRID])

    def extract_qwen(weights: Path) -> Step:
        title = "Stage one with Qwen2.5-VL's vision tower: every image is seen once"
        return extract(title, qwen_store, QWEN_SIZE, ["--teacher-path", str(weights)])

    def probe(store: Path, whose: str) -> list[Step]:
        probed = Step(f"Accuracy of {whose} features", ["probe", str(store)])
        return [probed] if suggestion.classes else []

    qwen_store, store, tiny = out / "qwen.zarr", out / "features.zarr", out / "tiny-qwen"
    if teacher_path is not None:
        return [
            extract_qwen(teacher_path),
            *probe(qwen_store, "the teacher's"),
            *train_and_report(out, qwen_store, suggestion, size),
        ]
    pretrained = ["--teacher", PRETRAINED_TEACHER, "--teacher-path", str(weights)]
    pretrained += ["--logits", "probe"] if suggestion.classes else []
    return [
        Step(
            "A small Qwen2.5-VL checkpoint with random weights: it shows the steps and teaches nothing",
            ["make-tiny-teacher", str(tiny)],
        ),
        extract_qwen(tiny),
        extract(
            "Stage one with a pretrained teacher (EfficientNet-Lite2, ImageNet, also 1280 wide)",
            *(store, PRETRAINED_SIZE, pretrained),
        ),
        *probe(qwen_store, "the random teacher's"),
        *probe(store, "the pretrained teacher's"),
        *train_and_report(out, store, suggestion, size),
    ]


def train_and_report(out: Path, store: Path, suggestion: Suggestion, size: Size) -> list[Step]:
    options = {**suggestion.options, "epochs": str(size.epochs), **suggestion.quick}
    run, sweep = str(out / "run"), str(out / "sweep")
    train = ["train", str(store), "--student", suggestion.small[0], "--out", run, *option_words(options)]
    sets = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    students = ["--students", ",".join(suggestion.small), "--seeds", size.seeds]
    control = suggestion.control
    return [
        Step(
            "Stage two: a small student" + (", and its control without the teacher" if control else ""),
            [*train, *(["--control"] if control else []), "--overwrite"],
        ),
        Step(
            "A sweep over two students: one teacher pass serves them all",
            [
                *("sweep", str(store), "--out", sweep, *students, *sets),
                *([] if control else ["--no-control"]),
            ],
        ),
        Step("The report", ["report", sweep, run, "--out", f"{sweep}/report.html"]),
    ]
