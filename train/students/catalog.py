"""Every student with what is measured of it: parameters, multiply-accumulates, distilled layer.

Building and counting all fixed students takes many seconds, so what was measured of them is kept in `measured.json`:
`python -m train.students.catalog` measures again and writes it, and a test does the same and compares.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import TrainError
from train.students.families import FAMILIES, all_student_names, parse_student_name, recipe_of

if TYPE_CHECKING:
    from train.students.base import Student

KEPT = Path(__file__).with_name("measured.json")

CLIP_FRAMES = 16
LATENCY_RUNS = 5


def list_students(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row a student (all fixed ones, or `names`, which may hold `timm:NAME`).

    What was measured of the fixed students at their recipe's image size is read from `measured.json`; others are
    measured now, on the meta device.

    Keys: `name, type, size, task, parameters, macs, input_shape, num_classes, feature_width, feature_kind,
    feature_stride, distilled_layer, recipe`, and `note` (None, or why a student could not be measured: then its
    measured values are None).
    """
    chosen = [str(name) for name in all_student_names()] if names is None else list(names)
    return [describe_student(name) for name in chosen]


def describe_student(name: str) -> dict[str, Any]:
    """The row of one student; see `list_students`."""
    parsed = parse_student_name(name)
    family, recipe = FAMILIES[parsed.type], recipe_of(str(parsed))
    size = int(recipe["image_size"])  # that the student is counted with, pixels
    row: dict[str, Any] = {"name": str(parsed), "type": parsed.type, "size": parsed.size, "task": family.task}
    row |= {"num_classes": family.classes, "recipe": recipe, "note": None}
    kept = kept_measurements().get(f"{parsed} at {size} px, {family.classes} classes")
    if kept is not None:
        return row | kept
    try:
        return row | measure_student(str(parsed), family.classes, size)
    except (TrainError, ImportError) as error:
        return row | dict.fromkeys(MEASURED) | {"note": str(error)}


MEASURED = (
    "parameters",
    "macs",
    "input_shape",
    "feature_width",
    "feature_kind",
    "feature_stride",
    "distilled_layer",
)


@cache
def kept_measurements() -> dict[str, dict[str, Any]]:
    """The content of measured.json: `NAME at SIZE px, N classes` → the values of MEASURED."""
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return kept


def measure_all() -> dict[str, dict[str, Any]]:
    """What measured.json holds, measured now. Raises TrainError or ImportError for a student that cannot be built."""
    measured = {}
    for name in all_student_names():
        family, size = FAMILIES[name.type], FAMILIES[name.type].recipe["image_size"]
        measured[f"{name} at {size} px, {family.classes} classes"] = measure_student(
            str(name), family.classes, size
        )
    return measured


def measure_student(name: str, num_classes: int, image_size: int) -> dict[str, Any]:
    """Build a student without memory and count: the values of MEASURED."""
    import torch

    from train.students.build import construct_student

    with torch.device("meta"):
        student = construct_student(name, num_classes=num_classes, image_size=image_size)
    shape = input_shape(student)
    spec = student.spec
    return {
        "parameters": student.parameter_count(),
        "macs": count_macs(student, shape),
        "input_shape": list(shape),
        "feature_width": spec.feature_width,
        "feature_kind": spec.feature_kind,
        "feature_stride": spec.feature_stride,
        "distilled_layer": spec.distilled_layer,
    }


def input_shape(student: Student) -> tuple[int, ...]:
    """One input: [1, 3, S, S], or a clip [1, 16, 3, S, S]."""
    image = (3, student.spec.image_size, student.spec.image_size)
    return (1, CLIP_FRAMES, *image) if FAMILIES[student.spec.type].task == "sequence" else (1, *image)


def count_macs(student: Student, shape: Sequence[int] | None = None) -> int:
    """Multiply-accumulates of one forward pass, counted by torch's FLOP counter (two FLOPs each).

    `shape` as `input_shape` (the default). Convolutions, matrix products and attention are counted; norms and
    activations are not, as usual. The student may be on any device, "meta" costs nothing.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(student.parameters()).device
    was_training = student.training
    student.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student(torch.zeros(*(shape or input_shape(student)), device=device))
    student.train(was_training)
    return int(counter.get_total_flops()) // 2


def measure_latency(student: Student, runs: int = LATENCY_RUNS) -> float:
    """Median time of `runs` forward passes of one image (or clip), milliseconds, on the student's device."""
    import torch

    device = next(student.parameters()).device
    image = torch.zeros(*input_shape(student), device=device)
    student.eval()
    times = []
    with torch.no_grad():
        for _ in range(runs + 1):
            started = time.perf_counter()
            student(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times[1:]), 3)


if __name__ == "__main__":
    KEPT.write_text(json.dumps(measure_all(), indent=1) + "\n", encoding="utf-8")
