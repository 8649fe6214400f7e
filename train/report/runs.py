"""The runs of a report: found below its folders, compared with their controls, their students' latency measured.

The latency in a run's summary.json was measured while other trials were running. So each architecture is measured once
for the report, one after the other; the result is kept in the run's folder and used by later reports on the same machine
only: latencies of different machines are never compared.
"""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from console.output import get_logger
from files.writing import whole_file
from store.errors import DistillError
from train.checkpoint import load_student_from_run
from train.errors import ReportError
from train.metrics import HEADLINE_METRICS, headline_of
from train.run_folder import CONFIG, LATENCY, METRICS, PRETRAIN, SUMMARY, RunFolder, read_json
from train.students.catalog import measure_latency
from train.sweep.config import DISTILLATION_OPTIONS
from train.sweep.driver import PLAN_FILE
from train.sweep.trial import OUTCOME_FILE, RUN_FOLDER

logger = get_logger("report")

NAMED = 12  # runs and sweeps found below a folder, in the log
STORE_FILE = "zarr.json"
LATENCY_RUNS = 20  # more than training measures: a report compares architectures
MEASURED_OF_THE_RUN = frozenset(
    [
        *(
            "control",
            "metrics",
            "best_epoch",
            "wall_time_s",
            "images_per_second",
            "peak_rss_mb",
            "peak_gpu_mb",
        ),
        *("pretrain", "distillation"),
    ]
)


class FinishedRun(NamedTuple):
    """A finished training: its summary, its configuration and its curve."""

    group: str  # the sweep's or the run's folder, as the report names it
    name: str
    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    is_control: bool
    varied: dict[str, Any]  # the options that the sweep varied
    phase_one: tuple[dict[str, Any], ...] = ()  # the curve of phase one, where there is one

    @property
    def store_path(self) -> str:
        """The path of the store that it was trained on; empty when the summary has none."""
        store = self.summary.get("store") or {}
        return str(store.get("path", "")) if isinstance(store, dict) else str(store)

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the best epoch on the validation split."""
        values = self.summary.get("metrics") or {}
        return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}

    @property
    def pairing(self) -> tuple[Any, ...]:
        """What a run and its control have in common: everything but the distillation."""
        shared = sorted((name, str(v)) for name, v in self.varied.items() if name not in DISTILLATION_OPTIONS)
        return (self.group, self.summary.get("student"), self.summary.get("seed"), *shared)


class Unfinished(NamedTuple):
    """A trial without a summary, and why."""

    group: str
    name: str
    state: str
    reason: str
    last_lines: list[str]


class Collection(NamedTuple):
    runs: list[FinishedRun]
    unfinished: list[Unfinished]

    @property
    def headline(self) -> str:
        """The metric that the report ranks by: the first headline metric that any run has."""
        name = headline_of(name for run in self.runs for name in run.metrics)
        if name is None:
            raise ReportError(
                "the runs have no metric to compare: expected one of " + ", ".join(HEADLINE_METRICS)
            )
        return name

    def by_task(self) -> list[Collection]:
        """The runs of each task: what one metric can compare. Trials without a result go with the first."""
        tasks = dict.fromkeys(str(run.summary.get("task")) for run in self.runs)
        parts = [[run for run in self.runs if str(run.summary.get("task")) == task] for task in tasks]
        return [Collection(runs, [] if index else self.unfinished) for index, runs in enumerate(parts)]


def collect(folders: Sequence[Path]) -> Collection:
    """All runs of `folders`, each a run (summary.json), a sweep (sweep.json), or a folder with such below it.

    Raises:
        ReportError: a folder is none of these, or none of them has a finished run.
    """
    places = [place for folder in folders for place in places_in(folder)]
    found: list[FinishedRun | Unfinished] = []
    for folder, group in zip(places, group_names(places), strict=True):
        if (folder / PLAN_FILE).exists():
            found += trials_of(folder, group)
        elif (folder / SUMMARY).exists():
            found += run_with_control(folder, group)
        else:
            reason = "the training has not finished: continue it with `cli train … --resume`"
            found.append(Unfinished(group, group, "unfinished", reason, []))
    runs = [item for item in found if isinstance(item, FinishedRun)]
    unfinished = [item for item in found if isinstance(item, Unfinished)]
    if not runs:
        names = ", ".join(str(folder) for folder in folders)
        reasons = "; ".join(f"{item.name}: {item.state} {item.reason}".strip() for item in unfinished[:3])
        raise ReportError(f"no finished run in {names}" + (f" ({reasons})" if reasons else ""))
    return Collection(runs, unfinished)


def places_in(folder: Path) -> list[Path]:
    """The folder itself when it is a run or a sweep, else the runs and sweeps below it, which the log names.

    Raises ReportError when there are none.
    """
    if (folder / PLAN_FILE).exists() or (folder / SUMMARY).exists():
        return [folder]
    if not folder.is_dir() or is_started(folder):
        raise ReportError(explain_missing(folder))
    found = list(places_below(folder))
    if not any((place / name).exists() for place in found for name in (PLAN_FILE, SUMMARY)):
        raise ReportError(explain_missing(folder))
    names = [place.relative_to(folder).as_posix() for place in found]
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    logger.info("%s: %d runs and sweeps below it: %s", folder, len(found), shown)
    return found


def places_below(folder: Path) -> Iterator[Path]:
    """Runs (finished or not) and sweeps below a folder, sorted; not searched: those themselves, and stores."""
    for path in sorted(folder.iterdir()):
        if (
            not path.is_dir()
            or path.is_symlink()
            or path.name.startswith(".")
            or (path / STORE_FILE).exists()
        ):
            continue
        is_run = (path / SUMMARY).exists() and (path / CONFIG).exists()
        if is_run or (path / PLAN_FILE).exists() or is_started(path):
            yield path
        else:
            yield from places_below(path)


def is_started(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS, "last.pt"))


def group_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, longer where that is not unique."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]


def explain_missing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; expected a run (cli train) or a sweep (cli sweep)"
    if not folder.is_dir():
        return f"{folder}: is a file; expected the folder of a run (cli train) or a sweep (cli sweep)"
    if is_started(folder):
        return f"{folder}: this run has not finished (no {SUMMARY}): continue it with `cli train … --resume`"
    return (
        f"{folder}: neither a run ({SUMMARY}) nor a sweep ({PLAN_FILE}), and none below it: name what "
        "`cli train --out` or `cli sweep --out` wrote"
    )


def trials_of(folder: Path, group: str) -> Iterator[FinishedRun | Unfinished]:
    plan = read_json(folder / PLAN_FILE) or {}
    varied = [name for name, values in plan.get("config", {}).get("set", {}).items() if len(values) > 1]
    for trial in plan.get("trials", []):
        if not trial.get("current", True):
            continue
        place = folder / "trials" / trial["name"]
        outcome = read_json(place / OUTCOME_FILE) or {}
        summary = outcome.get("summary") or RunFolder(place / RUN_FOLDER).read_summary()
        if summary is None:
            state = str(outcome.get("state", "not started"))
            lines = list(outcome.get("last_lines", []))
            yield Unfinished(group, trial["name"], state, str(outcome.get("reason", "")), lines)
            continue
        options = {name: trial["options"][name] for name in varied if name in trial["options"]}
        yield read_run(place / RUN_FOLDER, group, trial["name"], summary, trial["is_control"], options)


def run_with_control(folder: Path, group: str) -> Iterator[FinishedRun]:
    """A single run, and the control that `--control` trained beside it."""
    summary = RunFolder(folder).read_summary() or {}
    yield read_run(folder, group, group, summary, is_control=False, varied={})
    control = summary.get("control")
    if control:
        # Size and speed are the student's; time and memory were measured of the distilled run alone.
        shared = {name: value for name, value in summary.items() if name not in MEASURED_OF_THE_RUN}
        control_summary = {**shared, "metrics": control["metrics"], "best_epoch": control.get("best_epoch")}
        yield read_run(
            folder / "control", group, f"{group}-control", control_summary, is_control=True, varied={}
        )


def read_run(
    folder: Path, group: str, name: str, summary: dict[str, Any], is_control: bool, varied: dict[str, Any]
) -> FinishedRun:
    files = RunFolder(folder)
    config, records = files.read_config(), files.read_records()
    phase_one = tuple(files.read_records(PRETRAIN))
    return FinishedRun(group, name, folder, summary, config, records, is_control, varied, phase_one)


# Summary fields that the table, results.csv and results.parquet carry beside the metrics.
SUMMARY_FIELDS = (
    *(
        "task",
        "seed",
        "validation_samples",
        "epochs_done",
        "best_epoch",
        "parameters",
        "trainable_parameters",
    ),
    *("macs", "latency_ms", "wall_time_s", "images_per_second", "peak_rss_mb", "peak_gpu_mb"),
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


def label_of(run: FinishedRun) -> str:
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
    return sorted(rows, key=lambda row: row.get(headline, -math.inf), reverse=True)


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


def cost_of(runs: Sequence[FinishedRun], pass_s: Mapping[str, float]) -> Cost | None:
    """`pass_s`: measured seconds of one teacher pass by store. None where a store has no such record."""
    paths = {run.store_path for run in runs}
    if not paths <= pass_s.keys():
        return None
    students = sum(float(run.summary.get("wall_time_s") or 0.0) for run in runs)
    distilled = [run for run in runs if not run.is_control]
    online = sum(pass_s[run.store_path] * int(run.summary.get("epochs_done") or 0) for run in distilled)
    return Cost(students, sum(pass_s[path] for path in paths), online)


def with_measured_latencies(collection: Collection) -> tuple[Collection, str]:
    """The same runs with the latency of one image (or clip) in milliseconds, and the machine that it was measured on.

    None where a student cannot be read; the log names it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    known = {}
    for run in collection.runs:
        kept = read_json(run.folder / LATENCY) or {}
        if kept.get("machine") == machine and kept.get("architecture") == architecture_of(run):
            known[architecture_of(run)] = float(kept["latency_ms"])
    for run in collection.runs:
        if architecture_of(run) not in known and (value := measure_run(run, device)) is not None:
            known[architecture_of(run)] = value
            keep(run, machine, value)
    runs = [
        run._replace(summary={**run.summary, "latency_ms": known.get(architecture_of(run))})
        for run in collection.runs
    ]
    return collection._replace(runs=runs), machine


def architecture_of(run: FinishedRun) -> str:
    """What decides a student's speed: runs with one text share one measurement."""
    shape: list[Any] = [run.summary.get(name) for name in ("student", "parameters", "macs")]
    return " ".join(map(str, [*shape, (run.config.get("options") or {}).get("image_size")]))


def measure_run(run: FinishedRun, device: torch.device) -> float | None:
    try:
        student, content = load_student_from_run(run.folder)
    except DistillError as error:
        logger.warning("no latency of %s: %s", run.name, error)
        return None
    if content["config"].get("lora_rank"):
        from train.lora import merge_lora

        student = merge_lora(student)
    return measure_latency(student.to(device), LATENCY_RUNS)


def keep(run: FinishedRun, machine: str, value: float) -> None:
    """Write the measurement into the run's folder; one that cannot be written is measured again next time."""
    content = {"architecture": architecture_of(run), "machine": machine, "latency_ms": value}
    try:
        with whole_file(run.folder / LATENCY) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        logger.info("the latency of %s is not kept: %s", run.name, error)


def describe_machine(device: torch.device) -> str:
    """`Intel(R) Xeon(R) CPU @ 2.20GHz, 2 threads` or the GPU's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread" + ("s" if threads > 1 else "")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
