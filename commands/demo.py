"""`cli demo`: what a teacher is worth to a small student, on real images, as the commands that a user would type."""

from __future__ import annotations

import csv
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Annotated, NamedTuple

import typer

from commands.assets import PRETRAINED_TEACHER, pretrained_teacher_weights
from commands.extract import SUGGESTIONS, Suggestion, train_command
from commands.images import EMOJI_CATEGORIES, VAL_FRACTION, write_emoji, write_pictures
from commands.verdict import CEILINGS
from files.writing import check_writable
from processes.children import child_environment
from processes.stop import Stopped
from store.format import MEASURED_FILE

# Pixels. The pretrained teacher knows emoji better at 192 than at 128 (probe 54.1 % and 50.8 %), and no better at 256.
QWEN_SIZE, PRETRAINED_SIZE = "112", "192"
GRID = "native"
EMOJI_SIZE = "32"  # of the student's input: emoji are simple, and four trainings fit into the demo
MIN_FREE_GB = 1.0
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WIDTH = 38  # characters of the first column


class Size(NamedTuple):
    """How much the demo does: `normal` stays under six minutes on two cores, `smallest` is for CI.

    every: takes each n-th emoji. labels: of each category in the training split.
    """

    every: int
    labels: int
    epochs: int
    seeds: str


NORMAL = Size(1, 10, 12, "0,1")
SMALLEST = Size(12, 3, 1, "0")
QWEN_IMAGES = 16


class Step(NamedTuple):
    """One or more commands of the demo and their title."""

    title: str
    commands: list[list[str]]


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
        Path | None, typer.Option(help="A Qwen2.5-VL checkpoint instead of the pretrained EfficientNet.")
    ] = None,
    smallest: Annotated[bool, typer.Option(help="The smallest sizes that still run every step.")] = False,
) -> None:
    """cli demo --out demo

    What a teacher is worth, on real images and in a few minutes: few labels and many images without one. Encodes them
    once, measures the teacher's features, trains a student on the labels alone and with the teacher, and compares.
    """
    size = SMALLEST if smallest else NORMAL
    started = time.monotonic()
    check_disk(out)
    task = "classification"
    if data is not None:  # looked at before anything is written
        from extract.sources.detect import open_source

        task = open_source(data, val_fraction=VAL_FRACTION).task
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: cannot be created: {error.strerror}") from None
    weights = None
    if teacher_path is None:
        print("Fetching the pretrained teacher's weights (23 MB, once) ...", flush=True)
        weights = pretrained_teacher_weights()
    images = data or write_images(out, size)
    store, sweep = out / "features.zarr", out / "sweep"
    changed = {"image-size": EMOJI_SIZE} if data is None else {}
    steps = list_steps(out, store, sweep, images, task, teacher_path, weights, size, changed)
    for number, step in enumerate(steps, start=1):
        run_step(f"[{number}/{len(steps)}]", step)
    print(f"\nDone in {time.monotonic() - started:.0f} s.\n", flush=True)
    compared = read_results(sweep / "results.csv")  # `cli report` has written it
    for line in describe(compared, probe_result(store, compared.metric)):
        print(line)
    print(f"The report: {(sweep / 'report.html').resolve()}")
    print(f"Next: {next_command(store, task, data)}", flush=True)


def write_images(out: Path, size: Size) -> Path:
    print("Fetching the images (10 MB, once) ...", flush=True)
    table = write_emoji(out / "emoji", size.labels, size.every)
    print(
        f"{table.path}: emoji of {len(EMOJI_CATEGORIES)} categories. To train on: {table.labeled:,} with a label and "
        f"{table.unlabeled:,} without. To measure on: {table.validation:,} others",
        flush=True,
    )
    return table.path


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


def run_step(number: str, step: Step) -> None:
    """Show each command as a user would type it, and run it.

    Raises Stopped after a signal, DemoError when a command failed.
    """
    print(f"\n{number} {step.title}", flush=True)
    for arguments in step.commands:
        shown = shlex.join(["cli", *arguments])
        print(f"$ {shown}", flush=True)
        exit_code, signals = run_command([sys.executable, "-m", "cli", *arguments])
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
    out: Path,
    store: Path,
    sweep: Path,
    images: Path,
    task: str,
    teacher_path: Path | None,
    weights: Path | None,
    size: Size,
    changed: Mapping[str, str],
) -> list[Step]:
    """The commands, in order, for a data set of this task. `changed`: options of training instead of the suggested ones.

    Without `teacher_path`, a teacher with pretrained `weights` teaches, and a random Qwen2.5-VL is only shown.
    """
    suggestion = SUGGESTIONS[task]
    kept = ["--images", "jpeg"] if suggestion.images else []
    logits = ["--logits", "probe"] if suggestion.classes else []
    grid = [] if suggestion.classes else ["--grid", GRID]
    if teacher_path is not None:
        title, teacher = (
            "Stage one with your teacher",
            ["--teacher-path", str(teacher_path), "--image-size", QWEN_SIZE],
        )
    else:
        title = "Stage one with a pretrained teacher (EfficientNet-Lite2, ImageNet, also 1280 wide)"
        teacher = [
            "--teacher",
            PRETRAINED_TEACHER,
            "--teacher-path",
            str(weights),
            "--image-size",
            PRETRAINED_SIZE,
        ]
    extract = ["extract", str(images), "--out", str(store), *kept, "--val-fraction", str(VAL_FRACTION)]
    steps = [Step(f"{title}: every image is seen once", [[*extract, *teacher, *grid, *logits]])]
    if suggestion.control:  # there are labels to measure the features with
        steps.append(Step("What are the teacher's features worth?", [["probe", str(store)]]))
    steps.append(compare_students(store, sweep, suggestion, size, changed))
    if teacher_path is None:
        steps.append(show_qwen(out))
    steps.append(Step("The report", [["report", str(sweep)]]))
    return steps


def compare_students(
    store: Path, sweep: Path, suggestion: Suggestion, size: Size, changed: Mapping[str, str]
) -> Step:
    options = {**suggestion.options, "epochs": str(size.epochs), **suggestion.quick, **changed}
    sets = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    command = [
        "sweep",
        str(store),
        "--out",
        str(sweep),
        "--students",
        suggestion.small,
        "--seeds",
        size.seeds,
        *sets,
    ]
    title = "Stage two: a small student on the labels alone, and with the teacher"
    if not suggestion.control:
        title, command = (
            "Stage two: a small student learns the teacher's features",
            [*command, "--no-control"],
        )
    return Step(title, [command])


def show_qwen(out: Path) -> Step:
    """Qwen2.5-VL's vision tower with random weights, on a few images: it shows that the architecture runs."""
    few, tiny = write_pictures(out / "few", QWEN_IMAGES), out / "tiny-qwen"
    return Step(
        "Qwen2.5-VL's vision tower (small, random weights, a few images: it shows that the architecture runs)",
        [
            ["make-tiny-teacher", str(tiny)],
            [
                *("extract", str(few), "--out", str(out / "qwen.zarr")),
                *("--teacher-path", str(tiny), "--image-size", QWEN_SIZE, "--grid", GRID),
            ],
        ],
    )


def next_command(store: Path, task: str, data: Path | None) -> str:
    """What to do with the user's own images: encode them, or if the demo has done so, train."""
    if data is not None:
        return train_command(str(store), task)
    return "cli extract YOUR_IMAGES --out features.zarr --teacher-path Qwen2.5-VL-7B-Instruct --images jpeg --logits probe"


class Comparison(NamedTuple):
    """The same student on the labels alone and with the teacher: the metric's value by seed. `alone` may be empty."""

    metric: str
    samples: int
    alone: Mapping[int, float]
    taught: Mapping[int, float]


def read_results(path: Path) -> Comparison:
    """The rows of a report's `results.csv`: one for each seed, with and without the teacher."""
    from train.metrics import headline_of

    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    metric = headline_of(name for name, value in rows[0].items() if value)
    if metric is None:
        raise ValueError(f"{path}: no metric among {', '.join(rows[0])}")
    values: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for row in rows:
        values[row["control"] == "True"][int(row["seed"])] = float(row[metric])
    return Comparison(metric, int(rows[0]["validation_samples"]), values[True], values[False])


def probe_result(store: Path, metric: str) -> float | None:
    """What a probe of the teacher's features reached on the validation split; None where it has no such metric."""
    path = store / MEASURED_FILE
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    value = measured.get(CEILINGS.get(metric, ""))
    return None if value is None else float(value)


def describe(compared: Comparison, probe: float | None) -> list[str]:
    """A title, a line for each side, and what the difference means."""
    from train.metrics import label_of

    metric = compared.metric
    rows = [("the student with the teacher", compared.taught)]
    if compared.alone:
        rows.insert(0, ("the same student on the labels alone", compared.alone))
    lines = [
        f"On {compared.samples:,} validation samples, {label_of(metric)} of the best epoch of each training:"
    ]
    if probe is not None:
        lines.append("  " + "probe of the teacher's features".ljust(WIDTH) + shown(metric, probe))
    for name, values in rows:
        seeds = ", ".join(f"seed {seed}: {shown(metric, values[seed])}" for seed in sorted(values))
        lines.append(f"  {name.ljust(WIDTH)}{shown(metric, fmean(values.values()))}  ({seeds})")
    return [*lines, verdict(compared)] if compared.alone else lines


def verdict(compared: Comparison) -> str:
    """Whether the teacher helped, and how sure that is: only a gain with every seed counts as one."""
    from train.metrics import is_share

    gains = {seed: compared.taught[seed] - compared.alone[seed] for seed in sorted(compared.taught)}
    mean = fmean(gains.values())
    points = is_share(compared.metric)

    def text(gain: float) -> str:
        return f"{100 * gain:+.1f} points" if points else f"{gain:+.4f}"

    each = f"{text(mean)} (" + ", ".join(f"seed {seed}: {text(gain)}" for seed, gain in gains.items()) + ")"
    if min(gains.values()) > 0:
        words = f"With the teacher the student is better: {each}."
    elif max(gains.values()) <= 0:
        words = f"With the teacher the student is not better: {each}."
    else:
        words = f"The seeds disagree, so no gain is shown: {each}."
    return words if len(gains) > 1 else f"{words} One seed shows little."


def shown(metric: str, value: float) -> str:
    from train.metrics import is_share

    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.4f}"
