"""Put a report together: collect, compare, draw, write the page and the tables beside it."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from console.output import get_logger, redact
from files.names import printable
from files.writing import check_writable, whole_file
from store.errors import StoreError
from store.format import MEASURED_FILE
from store.reader import Store, open_store
from train.data.splits import count_validation
from train.errors import ReportError
from train.metrics import label_of, text_of
from train.report import figures
from train.report.page import Section, render_page
from train.report.runs import (
    SUMMARY_FIELDS,
    Collection,
    Cost,
    FinishedRun,
    collect,
    cost_of,
    differences,
    table_rows,
    with_measured_latencies,
)
from train.report.samples import gallery_of
from train.run_folder import make_folder, read_json

logger = get_logger("report")

# Metric → what `cli probe` measured of the teacher's own features in the same unit, and its name in the report.
_ACCURACIES = {"probe_top1": "teacher, linear probe", "knn_top1": "teacher, k-NN"}
CEILINGS: dict[str | None, dict[str, str]] = {
    **dict.fromkeys(("top1", "probe_top1", "knn_top1"), _ACCURACIES),
    "miou": {"probe_miou": "teacher, probe of cells"},
}
# Curves beside the metric's, each term on an axis of its own.
LOSSES = ("val_hard_loss", "hard_loss", "val_feature_loss", "feature_loss", "val_logit_loss", "logit_loss")
FEW_SAMPLES = 100
RECORDED_SHARE = 0.9  # of a store's images, for its time to count as measured
# Columns of the command line's table; results.csv has all of them.
SHORT_COLUMNS = ("run", "parameters", "epochs_done")


class Report(NamedTuple):
    """What was written: the page, and the rows of the result table (best first)."""

    path: Path
    rows: list[dict[str, Any]]
    columns: list[str]


def build_report(folders: Sequence[Path], out: Path | None, samples: int) -> Report:
    """Write one self-contained HTML file, results.csv and results.parquet beside it.

    Args:
        folders: runs and sweeps.
        out: the HTML file, or a folder to put report.html into; None puts it into the first folder.
        samples: how many of the best run's worst samples to show; 0 leaves them out.
    Raises:
        ReportError: a folder is neither run nor sweep, nothing in them has finished, or `out` is no page's name.
    """
    path = page_path(out) if out is not None else folders[0] / "report.html"
    if out is not None:
        check_writable(path, "--out")
    collection = collect(folders)
    check_writable(path, "--out")  # in the first folder, which is one
    make_folder(path.parent)
    collection, machine = with_measured_latencies(collection)
    parts = collection.by_task()
    headlines = list(dict.fromkeys(part.headline for part in parts))
    rows = [row for part in parts for row in table_rows(part)]
    stores = open_stores(collection)
    sections = [
        section for part in parts for section in task_sections(part, stores, samples, len(parts) > 1, machine)
    ]
    sections += cost_sections(collection.runs, stores)
    several = f"{len(collection.runs)} run" + ("s" if len(collection.runs) > 1 else "")
    subtitle = f"{several}, report of {datetime.datetime.now():%Y-%m-%d %H:%M}"
    introduction = validation_text(collection.runs, stores)
    page = render_page(
        "Distillation report", subtitle, introduction, sections, rows, headlines, collection.unfinished
    )
    with whole_file(path) as partial:
        partial.write_text(printable(redact(page)), encoding="utf-8")
    write_tables(path.parent, rows)
    return Report(path, rows, [*SHORT_COLUMNS, *headlines, "gain_over_control"])


def page_path(out: Path) -> Path:
    """The HTML file that --out names: itself, or report.html in a folder (what exists as one, or has no suffix)."""
    if out.is_dir() or not out.suffix:
        return out / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"--out {out}: expected a file that ends in .html, or a folder")
    return out


def open_stores(collection: Collection) -> dict[str, Store]:
    """The runs' stores, by path; the report leaves out what it would read from one that has moved, with a warning."""
    stores: dict[str, Store] = {}
    for path in sorted({run.store_path for run in collection.runs} - {""}):
        try:
            stores[path] = open_store(path)
        except StoreError as error:
            logger.warning("the report leaves out what it would read from the store: %s", error)
    return stores


def task_sections(
    collection: Collection, stores: dict[str, Store], samples: int, name_task: bool, machine: str
) -> list[Section]:
    """The sections on the runs of one task; `name_task` when the page has several."""
    metric = collection.headline
    # The distilled run with the best headline metric; any run where all are controls.
    candidates = [run for run in collection.runs if not run.is_control] or collection.runs
    best = max(candidates, key=lambda run: run.metrics.get(metric, float("-inf")))
    task = f" ({best.summary.get('task')})" if name_task else ""
    ceilings = teacher_ceilings(collection, stores)
    gallery = gallery_of(best, stores.get(best.store_path), samples) if samples else None
    sections = [
        Section(
            f"What distillation gained{task}",
            " ".join(
                filter(
                    None,
                    (gain_text(collection), teachers_text(collection), verdict_text(collection, stores)),
                )
            ),
            [figures.gain_bars(differences(collection), metric)],
        ),
        Section(
            f"Quality ({label_of(metric)}) against size, speed and training cost{task}",
            marks_text(collection, ceilings, machine),
            [figures.scatter(collection, cost, ceilings) for cost in figures.COSTS],
        ),
        Section(
            f"Learning curves{task}",
            curves_text(collection),
            [figures.curves(collection, name) for name in (metric, *LOSSES)],
        ),
    ]
    if any(run.phase_one for run in collection.runs):
        learned = [figures.curves(collection, name, phase_one=True) for name in ("cosine", "feature_loss")]
        sections.append(Section(f"Phase one: the teacher's features{task}", PHASE_ONE_TEXT, learned))
    if gallery is not None:
        sections.append(gallery)
    return [section for section in sections if section.text or any(section.figures) or section.pictures]


PHASE_ONE_TEXT = (
    "Before the task, the student learned the stored features of all samples, labeled or not (--pretrain-epochs). Controls "
    "have no phase one."
)


def gain_text(collection: Collection) -> str:
    if not any(run.is_control or run.summary.get("control") for run in collection.runs):
        return "No control was trained, so nothing is claimed (train with --control, sweep without --no-control)."
    ended = [run for run in collection.runs if ended_after(run) is not None]
    names = ", ".join(f"{run.name} after epoch {ended_after(run)}" for run in ended)
    return (
        "Distilled less control: the same student, initial weights, data order and schedule on the task loss alone. "
        "Whiskers: 95 % confidence interval of the mean over seeds (Student's t); none with a single seed."
        + (
            f" The student was better than a probe of the teacher, and distillation ended: {names}."
            if ended
            else ""
        )
    )


def verdict_text(collection: Collection, stores: dict[str, Store]) -> str:
    """What `cli probe STORE --student S` expected of the students that were trained since; empty without it."""
    words = []
    for path in stores:
        verdicts = (read_json(Path(path) / MEASURED_FILE) or {}).get("verdicts") or {}
        trained = {run.summary.get("student") for run in collection.runs if run.store_path == path}
        words += [
            f"Before training, `cli probe` said of {student}: {'; '.join(verdict['text'])}."
            for student, verdict in verdicts.items()
            if student in trained
        ]
    return " ".join(words)


def teachers_text(collection: Collection) -> str:
    """Which teachers the runs learned from, where that is not the store's first one alone."""
    learned = {
        run.name: list(store["teachers"])
        for run in collection.runs
        if not run.is_control and (store := run.summary.get("store") or {}).get("teachers")
    }
    if all(names == [run_teacher(collection, name)] for name, names in learned.items()):
        return ""
    return "Teachers: " + "; ".join(f"{name}: {', '.join(names)}" for name, names in learned.items()) + "."


def run_teacher(collection: Collection, name: str) -> str | None:
    """The model of a run's first teacher, which is also the name of a store's first one."""
    run = next(run for run in collection.runs if run.name == name)
    found: str | None = (run.summary.get("store") or {}).get("teacher")
    return found


def ended_after(run: FinishedRun) -> int | None:
    """The epoch after which the distillation terms ended; None where they did not."""
    found: int | None = (run.summary.get("distillation") or {}).get("ended_after_epoch")
    return found


def teacher_ceilings(collection: Collection, stores: dict[str, Store]) -> dict[str, float]:
    """What the teacher's own features reach, as `cli probe` recorded it; none beside metrics of another kind."""
    paths = [path for path in stores if any(run.store_path == path for run in collection.runs)]
    ceilings: dict[str, float] = {}
    for path in paths:
        quality = measured_of(path)
        where = "" if len(paths) == 1 else f" ({Path(path).name})"
        for name, words in CEILINGS.get(collection.headline, {}).items():
            if quality.get(name) is not None:
                ceilings[words + where] = float(quality[name])
    return ceilings


def curves_text(collection: Collection) -> str:
    """What the lines are; losses are shown term by term, since the total weighs them differently in a control."""
    controls = any(run.is_control for run in collection.runs)
    return (
        f"{'Solid: distilled; dotted: control. ' if controls else ''}Losses are shown by term and without weights, so "
        "that runs compare: the task loss, and the distillation terms where there are any."
    )


def validation_text(runs: Sequence[FinishedRun], stores: dict[str, Store]) -> str:
    """How many samples the metrics are measured on, and what few of them mean."""
    counts = sorted({count for run in runs if (count := validation_samples(run, stores)) is not None})
    if not counts:
        return ""
    text = f"Validation samples: {' and '.join(f'{count:,}' for count in counts)}."
    if counts[0] < FEW_SAMPLES:
        text += f" One sample of {counts[0]:,} is {1 / max(counts[0], 1):.1%}: small differences mean nothing here."
    return text


def validation_samples(run: FinishedRun, stores: dict[str, Store]) -> int | None:
    """From the summary, or counted in the store for runs of earlier versions; None when neither has it."""
    if run.summary.get("validation_samples") is not None:
        return int(run.summary["validation_samples"])
    split = (run.config.get("options") or {}).get("val_split")
    store = stores.get(run.store_path)
    if store is None or split is None or split not in store:
        return None
    return count_validation(store, split, str(run.summary.get("task")))


def marks_text(collection: Collection, ceilings: dict[str, float], machine: str) -> str:
    """What the marks in the figures of quality against cost mean."""
    words = ["Ringed: the Pareto front, which no other run beats in both."]
    if any(run.is_control for run in collection.runs):
        words.append("Open markers: controls.")
    if ceilings:
        values = ", ".join(
            f"{name} {text_of(collection.headline, value)}" for name, value in ceilings.items()
        )
        words.append(f"Dashed: the teacher's own features ({values}).")
    elif collection.headline in CEILINGS:
        words.append("`cli probe STORE` adds what the teacher's own features reach.")
    if any(run.summary.get("latency_ms") for run in collection.runs):
        words.append(
            f"Latency: one image (or clip) at a time, each architecture measured alone for this report on {machine}."
        )
    return " ".join(words)


def cost_sections(runs: Sequence[FinishedRun], stores: dict[str, Store]) -> list[Section]:
    """What the teacher costs, where the stores know how long its pass took; else that they do not."""
    seconds = pass_seconds(stores)
    cost = cost_of(runs, seconds)
    title = "Cost of the teacher"
    if cost is not None:
        return [Section(title, cost_text(cost), [])]
    partly = [path for path in stores if path not in seconds and measured_of(path).get("encoded")]
    if not partly:
        return []
    return [
        Section(
            title,
            f"n.a.: the extraction of {', '.join(partly)} was interrupted, and the time of most of its images was "
            "not recorded.",
            [],
        )
    ]


def measured_of(store: str) -> dict[str, Any]:
    return read_json(Path(store) / MEASURED_FILE) or {}


def pass_seconds(stores: dict[str, Store]) -> dict[str, float]:
    """Time of one teacher pass over each store, where that was recorded for (nearly) all of its images.

    A process that was killed leaves out what it encoded since its last record.
    """
    seconds: dict[str, float] = {}
    for path, store in stores.items():
        measured = measured_of(path)
        images = sum(int(store[name].valid.sum()) for name in store.splits)
        encoded = int(measured.get("encoded") or 0)
        if images and encoded >= RECORDED_SHARE * images:
            seconds[path] = float(measured["extraction_s"]) * max(1.0, images / encoded)
    return seconds


def cost_text(cost: Cost) -> str:
    return (
        f"Cached: {cost.students_s:,.0f} s for all students (measured) and {cost.extraction_s:,.0f} s for the "
        f"teacher's one pass (measured), {cost.cached_total_s:,.0f} s in all. With the teacher in the loop: "
        f"{cost.online_teacher_s:,.0f} s more teacher time (computed, not measured: one pass x epochs x distilled "
        f"trials), {cost.online_total_s:,.0f} s in all, {cost.online_total_s / cost.cached_total_s:.1f} times as long."
    )


def write_tables(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """results.csv and results.parquet: the same rows, all columns."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    lead = [name for name in ("sweep", "run", "student", "control", *SUMMARY_FIELDS) if name in names]
    names = [*lead, *(name for name in names if name not in lead)]
    with (
        whole_file(folder / "results.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    columns = {name: column([row.get(name) for row in rows]) for name in names}
    with whole_file(folder / "results.parquet") as partial:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)


def column(values: list[Any]) -> list[Any]:
    """A column of one type: text where a sweep varied an option over numbers and words."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return [float(value) if kinds == {int, float} and value is not None else value for value in values]
    return [None if value is None else str(value) for value in values]
