"""`cli demo`: the whole pipeline on real images, as the commands that a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

IMAGES = 500
IMAGES_SMALLEST = 150
IMAGE_SIDE = 64
MIN_FREE_GB = 1.0


class DemoError(Exception):
    """The demo cannot start or one of its commands failed; the text says which."""

    exit_code = 1


class Size(NamedTuple):
    """How much the demo does: `normal` stays under six minutes on two cores, `smallest` is for CI."""

    images: int
    epochs: int
    students: str
    seeds: str


NORMAL = Size(IMAGES, 10, "timm:resnet10t,timm:mobilenetv3_small_050", "0,1")
SMALLEST = Size(IMAGES_SMALLEST, 2, "timm:resnet10t,timm:mobilenetv3_small_050", "0")


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write into; a second run goes on in it.")] = Path(
        "demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Your own images (any layout that extract knows).")
    ] = None,
    teacher_path: Annotated[
        Path | None, typer.Option(help="A Qwen2.5-VL checkpoint instead of the random one.")
    ] = None,
    smallest: Annotated[bool, typer.Option(help="The least that still runs every step.")] = False,
) -> None:
    """cli demo --out demo

    The whole pipeline on 500 real images in a few minutes: make a tiny Qwen2.5-VL, extract with it, extract
    with a really pretrained teacher, probe both, train a student and its control, sweep two students, report.
    """
    size = SMALLEST if smallest else NORMAL
    started = time.monotonic()
    check_disk(out)
    images = data or write_digits(out / "digits", size.images)
    for number, step in enumerate(steps(out, images, teacher_path, size), start=1):
        run_step(number, step)
    if teacher_path is None and data is None:
        say(
            "\nThe students know these digits as well as the demo's teacher, which has never seen any: a gain over "
            "the control is not to be expected here. The demo shows the steps, not what Qwen2.5-VL is worth."
        )
    say(
        f"\nDone in {time.monotonic() - started:.0f} s. The report: {(out / 'sweep' / 'report.html').resolve()}"
    )


class Step(NamedTuple):
    """One command of the demo, and what to say before it."""

    title: str
    arguments: list[str]


def steps(out: Path, images: Path, teacher_path: Path | None, size: Size) -> list[Step]:
    """The commands, in order. Paths are relative to where the user stands."""
    tiny, qwen_store, store = out / "tiny-qwen", out / "qwen.zarr", out / "features.zarr"
    training = ["--epochs", str(size.epochs), "--image-size", "48", "--learning-rate", "1e-3"]
    plan: list[Step] = []
    if teacher_path is None:
        plan.append(
            Step(
                "A small Qwen2.5-VL checkpoint with random weights: it shows the machinery and teaches nothing",
                ["make-tiny-teacher", str(tiny)],
            )
        )
    teacher = str(teacher_path or tiny)
    plan.append(
        Step(
            "Stage one with Qwen2.5-VL's vision tower: every image is seen once",
            extract(images, qwen_store, ["--teacher-path", teacher, "--image-size", "112", "--grid", "4"]),
        )
    )
    if teacher_path is None:
        weights = fetch_pretrained_weights()
        pretrained = ["--teacher", "timm:tf_efficientnet_lite2", "--teacher-path", str(weights)]
        plan.append(
            Step(
                "Stage one with a really pretrained teacher (EfficientNet-Lite2, ImageNet, also 1280 wide)",
                extract(
                    images, store, [*pretrained, "--image-size", "128", "--grid", "4", "--logits", "probe"]
                ),
            )
        )
        plan.append(Step("What the random teacher's features are worth", ["probe", str(qwen_store)]))
        plan.append(Step("What the pretrained teacher's features are worth", ["probe", str(store)]))
    else:
        store = qwen_store
        plan.append(Step("What the teacher's features are worth", ["probe", str(store)]))
    first = size.students.split(",")[0]
    return [
        *plan,
        Step(
            "Stage two: a small student, and its control without the teacher",
            [
                "train",
                str(store),
                "--student",
                first,
                "--out",
                str(out / "run"),
                *training,
                "--control",
                "--overwrite",
            ],
        ),
        Step(
            "A sweep over two students: one teacher pass serves them all",
            [
                *("sweep", str(store), "--out", str(out / "sweep"), "--students", size.students),
                *("--seeds", size.seeds, "--set", f"epochs={size.epochs}", "--set", "image-size=48"),
                *("--set", "learning-rate=1e-3"),
            ],
        ),
        Step(
            "The report",
            ["report", str(out / "sweep"), str(out / "run"), "--out", str(out / "sweep/report.html")],
        ),
    ]


def extract(images: Path, store: Path, options: list[str]) -> list[str]:
    return [
        "extract",
        str(images),
        "--out",
        str(store),
        "--images",
        "jpeg",
        "--val-fraction",
        "0.3",
        *options,
    ]


def fetch_pretrained_weights() -> Path:
    from commands.assets import pretrained_teacher_weights

    say("Fetching the pretrained teacher's weights (23 MB, once) ...")
    return pretrained_teacher_weights()


def write_digits(folder: Path, count: int) -> Path:
    """The first `count` of scikit-learn's scanned digits as PNG files in a folder per class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    say(f"Writing {count} real scans of handwritten digits to {folder}")
    for index, (scan, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(scan * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(path)
    return folder


def check_disk(out: Path) -> None:
    import shutil

    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < MIN_FREE_GB:
        raise DemoError(
            f"only {free_gb:.1f} GB free in {place}: the demo needs {MIN_FREE_GB:g} GB; choose another --out"
        )


def run_step(number: int, step: Step) -> None:
    """Show the command as a user would type it, and run it."""
    shown = shlex.join(["cli", *step.arguments])
    say(f"\n[{number}] {step.title}\n$ {shown}")
    try:
        done = subprocess.run([sys.executable, "-m", "cli", *step.arguments], env=environment(), check=False)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if done.returncode != 0:
        raise DemoError(f"the demo stopped at step {number}, exit code {done.returncode}: {shown}")


def environment() -> dict[str, str]:
    """The child's: this checkout or installation on its path."""
    import os

    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path}


def say(text: str) -> None:
    print(text, flush=True)
