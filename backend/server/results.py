"""What a task has left in its output folder: curves, evaluation, control, pictures of predictions, files, a report.

Drawing, exporting and reporting load torch: they are processes of their own (`tools.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.server.tools import run_command, run_module
from train.metrics import (
    headline_of as headline_of,  # also for the pages, which import nothing but the back end
)
from train.metrics import metric_of as metric_of
from train.run_folder import RunFolder

PREDICTIONS = 12
PREDICTIONS_TIMEOUT_S, EXPORT_TIMEOUT_S, REPORT_TIMEOUT_S = 300.0, 600.0, 900.0
#: Files of an output folder that are worth a download, in this order.
DOWNLOADS = (
    "best.pt",
    "best_model.pt",
    "*.onnx",
    "summary.json",
    "metrics.jsonl",
    "config.json",
    "report.html",
)
INDEX = "index.json"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one an epoch."""
    return RunFolder(folder).read_records()


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of summary.json; empty where the training has not ended."""
    return RunFolder(folder).read_summary() or {}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The distilled student and its control by the headline metric; the difference is the first less the second."""

    metric: str
    label: str
    student: float
    control: float

    @property
    def difference(self) -> float:
        return self.student - self.control


def compare_with_control(summary: dict[str, Any]) -> Comparison | None:
    """None where no control was trained."""
    metrics, control = summary.get("metrics") or {}, (summary.get("control") or {}).get("metrics") or {}
    name = headline_of(metrics)
    if name is None or control.get(name) is None:
        return None
    return Comparison(metric=name, label=metric_of(name).label, student=metrics[name], control=control[name])


def list_downloads(folder: Path) -> list[Path]:
    """The files to download that are there."""
    found = [path for pattern in DOWNLOADS for path in sorted(folder.glob(pattern)) if path.is_file()]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture of one validation sample with what the student predicts."""

    file: Path
    caption: str


def predictions_folder(folder: Path) -> Path:
    return folder / ".predictions"


def drawn_predictions(folder: Path) -> list[Drawn]:
    """The pictures that were drawn of the current best weights; empty where there are none."""
    target, best = predictions_folder(folder), RunFolder(folder).best
    try:
        content = json.loads((target / INDEX).read_text(encoding="utf-8"))
        if content["weights"] != best.stat().st_mtime_ns:
            return []
        return [Drawn(file=target / item["file"], caption=item["caption"]) for item in content["pictures"]]
    except (OSError, ValueError, KeyError):
        return []


async def draw_predictions(folder: Path) -> list[Drawn]:
    """Draw some validation samples with their predictions, evenly spread over the split. Raises ToolError."""
    await run_module("backend.server.results", [str(folder)], PREDICTIONS_TIMEOUT_S)
    return drawn_predictions(folder)


async def export_onnx(folder: Path) -> Path:
    """Write the student as ONNX into its output folder. Raises ToolError."""
    words = ["export", str(folder), "--format", "onnx", "--json"]
    output = await run_command(words, EXPORT_TIMEOUT_S)
    return Path(json.loads(output)["path"])


async def build_report(folders: Sequence[Path], reports: Path) -> Path:
    """One page on several finished tasks, below `reports`; the same tasks in the same state have the same page.

    Raises ToolError.
    """
    states = [f"{folder}:{RunFolder(folder).summary.stat().st_mtime_ns}" for folder in folders]
    name = hashlib.blake2b("\n".join(states).encode(), digest_size=8).hexdigest()
    page = reports / name / "report.html"
    if not page.exists():
        words = ["report", *map(str, folders), "--out", str(page)]
        await run_command(words, REPORT_TIMEOUT_S)
    return page


def write_predictions(folder: Path, count: int = PREDICTIONS) -> None:
    """Write the pictures and their index into the run's `predictions` folder. Raises DistillError."""
    from store.reader import open_store
    from train.deliver.inputs import spread
    from train.errors import ReportError
    from train.report.runs import read_run
    from train.report.samples import SCORERS, encode, subject_of

    summary = read_summary(folder)
    task = str(summary.get("task"))
    if task not in SCORERS:
        raise ReportError(f"{folder}: nothing is drawn for the task {task}")
    run = read_run(folder, folder.name, folder.name, summary, False, {})
    weights = RunFolder(folder).best.stat().st_mtime_ns
    subject = subject_of(run, open_store(run.store_path))
    subject = subject._replace(rows=spread(subject.rows, count))
    target = predictions_folder(folder)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    pictures = []
    for number, item in enumerate(SCORERS[task](subject, count).worst):
        data = encode(item.draw())
        file = f"{number:02d}.{'png' if data.startswith(b'PNG', 1) else 'jpg'}"
        (target / file).write_bytes(data)
        pictures.append({"file": file, "caption": item.caption})
    content = {"weights": weights, "pictures": pictures}
    (target / INDEX).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def main() -> int:
    """The process that `draw_predictions` starts."""
    from store.errors import DistillError

    try:
        write_predictions(Path(sys.argv[1]))
    except (DistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
