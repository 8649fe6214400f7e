"""The commands of the demo, as a user would type them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from commands.assets import PRETRAINED_TEACHER
from commands.suggestions import SUGGESTIONS, Suggestion, option_words

GRID = "4"  # cells a side: the native grid of the pretrained teacher at its size below, half of Qwen's
QWEN_SIZE, PRETRAINED_SIZE = "112", "128"
VAL_FRACTION = 0.3


class Size(NamedTuple):
    """How much the demo does: `normal` stays under six minutes on two cores, `smallest` is for CI."""

    images: int
    epochs: int
    seeds: str


NORMAL = Size(500, 10, "0,1")
SMALLEST = Size(150, 2, "0")


class Step(NamedTuple):
    """One command of the demo, and what to say before it."""

    title: str
    arguments: list[str]


def list_steps(
    out: Path, images: Path, task: str, teacher_path: Path | None, weights: Path | None, size: Size
) -> list[Step]:
    """The commands, in order, for a data set of this task. Paths are relative to where the user stands.

    Without `teacher_path`, a random Qwen2.5-VL shows the machinery and the pretrained teacher's `weights` teach.
    """
    suggestion = SUGGESTIONS[task]
    qwen_store, store = out / "qwen.zarr", out / "features.zarr"
    if teacher_path is not None:
        return [
            extract_qwen(images, qwen_store, teacher_path, suggestion),
            *probe(qwen_store, "the teacher's", suggestion),
            *train_and_report(out, qwen_store, suggestion, size),
        ]
    tiny = out / "tiny-qwen"
    return [
        Step(
            "A small Qwen2.5-VL checkpoint with random weights: it shows the machinery and teaches nothing",
            ["make-tiny-teacher", str(tiny)],
        ),
        extract_qwen(images, qwen_store, tiny, suggestion),
        extract_pretrained(images, store, weights, suggestion),
        *probe(qwen_store, "the random teacher's", suggestion),
        *probe(store, "the pretrained teacher's", suggestion),
        *train_and_report(out, store, suggestion, size),
    ]


def extract_qwen(images: Path, store: Path, teacher_path: Path, suggestion: Suggestion) -> Step:
    return Step(
        "Stage one with Qwen2.5-VL's vision tower: every image is seen once",
        extract(images, store, QWEN_SIZE, ["--teacher-path", str(teacher_path)], suggestion),
    )


def extract_pretrained(images: Path, store: Path, weights: Path | None, suggestion: Suggestion) -> Step:
    teacher = ["--teacher", PRETRAINED_TEACHER, "--teacher-path", str(weights)]
    logits = ["--logits", "probe"] if suggestion.classes else []
    return Step(
        "Stage one with a really pretrained teacher (EfficientNet-Lite2, ImageNet, also 1280 wide)",
        extract(images, store, PRETRAINED_SIZE, [*teacher, *logits], suggestion),
    )


def extract(
    images: Path, store: Path, image_size: str, teacher: list[str], suggestion: Suggestion
) -> list[str]:
    kept = ["--images", "jpeg"] if suggestion.images else []
    return [
        *("extract", str(images), "--out", str(store), *kept, "--val-fraction", str(VAL_FRACTION)),
        *(*teacher, "--image-size", image_size, "--grid", GRID),
    ]


def probe(store: Path, whose: str, suggestion: Suggestion) -> Iterator[Step]:
    if suggestion.classes:
        yield Step(f"What {whose} features are worth", ["probe", str(store)])


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
