"""Find the runs below the folders of a report and read what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from console.log import get_logger
from train.errors import ReportError
from train.metrics import HEADLINE_METRICS, headline_of
from train.run_folder import CONFIG, METRICS, SUMMARY, RunFolder, read_json
from train.sweep.config import DISTILLATION_OPTIONS
from train.sweep.run import PLAN_FILE
from train.sweep.worker import OUTCOME_FILE, RUN_FOLDER

logger = get_logger("report")

NAMED = 12  # runs and sweeps found below a folder, in the log
STORE_FILE = "zarr.json"
MEASURED_OF_THE_RUN = frozenset(
    ["control", "metrics", "best_epoch", "wall_time_s", "images_per_second", "peak_rss_mb", "peak_gpu_mb"]
)


class Run(NamedTuple):
    """A finished training: its summary, its configuration and its curve."""

    group: str  # the sweep's or the run's folder, as the report names it
    name: str
    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    is_control: bool
    varied: dict[str, Any]  # the options that the sweep varied

    @property
    def store_path(self) -> str:
        """Where the store was that it learnt from; empty when the summary does not say."""
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
    runs: list[Run]
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

    def with_latencies(self, values: Mapping[Path, float]) -> Collection:
        """The same runs, their latency as measured for the report (None: not measured)."""
        return self._replace(
            runs=[
                run._replace(summary={**run.summary, "latency_ms": values.get(run.folder)})
                for run in self.runs
            ]
        )

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
    found: list[Run | Unfinished] = []
    for folder, group in zip(places, group_names(places), strict=True):
        if (folder / PLAN_FILE).exists():
            found += trials_of(folder, group)
        elif (folder / SUMMARY).exists():
            found += run_with_control(folder, group)
        else:
            reason = "the training has not finished: continue it with `cli train … --resume`"
            found.append(Unfinished(group, group, "unfinished", reason, []))
    runs = [item for item in found if isinstance(item, Run)]
    unfinished = [item for item in found if isinstance(item, Unfinished)]
    if not runs:
        raise ReportError(no_finished_run(folders, unfinished))
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


def no_finished_run(folders: Sequence[Path], unfinished: Sequence[Unfinished]) -> str:
    names = ", ".join(str(folder) for folder in folders)
    reasons = "; ".join(f"{item.name}: {item.state} {item.reason}".strip() for item in unfinished[:3])
    return f"no finished run in {names}" + (f" ({reasons})" if reasons else "")


def trials_of(folder: Path, group: str) -> Iterator[Run | Unfinished]:
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


def run_with_control(folder: Path, group: str) -> Iterator[Run]:
    """A single run, and the control that `--control` trained beside it."""
    summary = RunFolder(folder).read_summary() or {}
    yield read_run(folder, group, group, summary, is_control=False, varied={})
    control = summary.get("control")
    if control:
        # Size and speed are the student's; time and memory were measured of the distilled run alone.
        shared = {name: value for name, value in summary.items() if name not in MEASURED_OF_THE_RUN}
        told = {**shared, "metrics": control["metrics"], "best_epoch": control.get("best_epoch")}
        yield read_run(folder / "control", group, f"{group}-control", told, is_control=True, varied={})


def read_run(
    folder: Path, group: str, name: str, summary: dict[str, Any], is_control: bool, varied: dict[str, Any]
) -> Run:
    files = RunFolder(folder)
    config, records = files.read_config(), files.read_records()
    return Run(group, name, folder, summary, config, records, is_control, varied)
