"""Numbers of a report: rows of the table, Pareto fronts, differences to the control with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.report.collect import Collection, Run

# Summary fields that the table, results.csv and results.parquet carry beside the metrics.
SUMMARY_FIELDS = (
    "task",
    "seed",
    "validation_samples",
    "epochs_done",
    "best_epoch",
    "parameters",
    "trainable_parameters",
    "macs",
    "latency_ms",
    "wall_time_s",
    "images_per_second",
    "peak_rss_mb",
    "peak_gpu_mb",
)

CONTROL_SUFFIX = " (control)"


class Difference(NamedTuple):
    """What distillation gained over the control, as mean over the pairs (same student, seed, schedule).

    `low` and `high` bound the mean with 95 % confidence (Student's t); None with a single pair.
    """

    label: str
    mean: float
    low: float | None
    high: float | None
    pairs: int


def label_of(run: Run) -> str:
    """Student and varied options, without the seed: runs with one label are repetitions of each other."""
    parts = [str(run.summary.get("student", run.name)), *(f"{k}={v}" for k, v in run.varied.items())]
    return " ".join(parts) + (CONTROL_SUFFIX if run.is_control else "")


def table_rows(collection: Collection) -> list[dict[str, Any]]:
    """One row a run, best first, with the difference to its control."""
    headline = collection.headline
    controls = control_values(collection, headline)
    rows = []
    for run in collection.runs:
        value = run.metrics.get(headline)
        control = None if run.is_control else controls.get(run.pairing)
        row: dict[str, Any] = {"sweep": run.group, "run": run.name, "student": run.summary.get("student")}
        row |= {"control": run.is_control, **run.varied}
        row |= {field: plain(run.summary.get(field)) for field in SUMMARY_FIELDS}
        row |= run.metrics
        row["gain_over_control"] = None if value is None or control is None else value - control
        rows.append(row)
    return sorted(rows, key=lambda row: quality(row, headline), reverse=True)


def quality(row: dict[str, Any], headline: str) -> float:
    value = row.get(headline)
    return -math.inf if value is None else float(value)


def plain(value: Any) -> Any:
    """Numbers and texts only: a nested value has no place in a table."""
    return value if isinstance(value, (int, float, str, bool)) else None


def control_values(collection: Collection, metric: str) -> dict[tuple[Any, ...], float]:
    """The metric of each control; a single run's `--control` result stands in its own summary."""
    values = {
        run.pairing: run.metrics[metric]
        for run in collection.runs
        if run.is_control and metric in run.metrics
    }
    for run in collection.runs:
        inside = ((run.summary.get("control") or {}).get("metrics") or {}).get(metric)
        if not run.is_control and inside is not None:
            values.setdefault(run.pairing, float(inside))
    return values


def differences(collection: Collection) -> list[Difference]:
    """Gain of each distilled configuration over its controls, paired by seed."""
    headline = collection.headline
    controls = control_values(collection, headline)
    gains: dict[str, list[float]] = defaultdict(list)
    for run in collection.runs:
        control = controls.get(run.pairing)
        if not run.is_control and control is not None and headline in run.metrics:
            gains[f"{run.group}: {label_of(run)}"].append(run.metrics[headline] - control)
    several = len({run.group for run in collection.runs}) > 1
    return [
        mean_with_interval(label if several else label.partition(": ")[2], values)
        for label, values in gains.items()
    ]


def mean_with_interval(label: str, values: Sequence[float]) -> Difference:
    """Mean and its two-sided 95 % confidence interval by Student's t distribution."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Difference(label, mean, None, None, count)
    from scipy import stats

    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Difference(label, mean, mean - half, mean + half, count)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other point beats in both, by rising cost."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    best = -math.inf
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


class Cost(NamedTuple):
    """Seconds of a sweep with cached features, and of the same sweep with the teacher in the loop."""

    students_s: float  # measured
    extraction_s: float  # measured, once
    online_teacher_s: float  # computed: teacher time for one pass x epochs, over all distilled runs

    @property
    def cached_total_s(self) -> float:
        return self.students_s + self.extraction_s

    @property
    def online_total_s(self) -> float:
        return self.students_s + self.online_teacher_s


def cost_of(runs: Sequence[Run], pass_s: Mapping[str, float]) -> Cost | None:
    """`pass_s`: measured seconds of one teacher pass by store. None where a store does not say it."""
    paths = {run.store_path for run in runs}
    if not paths <= pass_s.keys():
        return None
    students = sum(float(run.summary.get("wall_time_s") or 0.0) for run in runs)
    distilled = [run for run in runs if not run.is_control]
    online = sum(pass_s[run.store_path] * int(run.summary.get("epochs_done") or 0) for run in distilled)
    return Cost(students, sum(pass_s[path] for path in paths), online)
