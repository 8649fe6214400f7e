"""The report: numbers by hand, and the page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from scipy import stats

from train.config import load_config
from train.errors import ReportError
from train.report.build import build_report
from train.report.collect import collect
from train.report.compare import differences, mean_with_interval, pareto_front
from train.report.samples import box_iou, count_hits
from train.run import run_training

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def fake_trial(
    sweep: Path, name: str, value: float, *, seed: int = 0, control: bool = False, parameters: int = 100
) -> dict[str, Any]:
    """A finished trial's files, with the metric given."""
    run = sweep / "trials" / name / "run"
    run.mkdir(parents=True)
    summary = {
        "student": "timm:test_resnet",
        "task": "classification",
        "seed": seed,
        "metrics": {"top1": value, "top5": 1.0},
        "parameters": parameters,
        "macs": 10 * parameters,
        "latency_ms": 1.0,
        "wall_time_s": 5.0,
        "epochs_done": 2,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    records = [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1 / epoch, "top1": value * epoch / 2}
        for epoch in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run.parent / "outcome.json").write_text(json.dumps({"state": "done", "reason": "", "summary": summary}))
    return {
        "name": name,
        "options": {"seed": seed},
        "is_control": control,
        "control_name": None,
        "current": True,
    }


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    trials = [
        *(fake_trial(folder, f"d{seed}", 0.8 + 0.01 * seed, seed=seed) for seed in range(3)),
        *(fake_trial(folder, f"c{seed}", 0.7 + 0.02 * seed, seed=seed, control=True) for seed in range(3)),
        {"name": "gone", "options": {"seed": 9}, "is_control": False, "control_name": None, "current": True},
    ]
    gone = folder / "trials" / "gone"
    gone.mkdir()
    (gone / "outcome.json").write_text(
        json.dumps(
            {
                "state": "failed",
                "reason": "out of memory <b>",
                "last_lines": ["line <script>"],
                "summary": None,
            }
        )
    )
    (folder / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": trials}))
    return folder


def test_gain_is_the_mean_of_pairs_with_student_s_interval(sweep_folder: Path) -> None:
    (gain,) = differences(collect([sweep_folder]))
    pairs = [0.10, 0.09, 0.08]
    low, high = stats.t.interval(0.95, 2, loc=0.09, scale=stats.sem(pairs))
    assert gain.pairs == 3
    assert gain.mean == pytest.approx(0.09)
    assert gain.low == pytest.approx(low)
    assert gain.high == pytest.approx(high)


def test_one_pair_has_no_interval() -> None:
    assert mean_with_interval("x", [0.25])[1:] == (0.25, None, None, 1)


def test_pareto_front_keeps_what_nothing_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (4.0, 0.9)]
    assert pareto_front(points) == [0, 2, 4]


def test_tables_have_every_run_and_its_gain(sweep_folder: Path) -> None:
    made = build_report([sweep_folder], None, samples=0)
    assert made.path == sweep_folder / "report.html"
    rows = list(csv.DictReader((sweep_folder / "results.csv").open()))
    assert [row["run"] for row in rows] == ["d2", "d1", "d0", "c2", "c1", "c0"]
    assert float(rows[0]["gain_over_control"]) == pytest.approx(0.08)
    assert pyarrow.parquet.read_table(sweep_folder / "results.parquet").num_rows == 6


def test_page_is_self_contained_and_escapes_what_it_shows(sweep_folder: Path) -> None:
    text = build_report([sweep_folder], None, samples=0).path.read_text()
    assert "out of memory &lt;b&gt;" in text
    assert "line &lt;script&gt;" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", text)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such folder"), ("", "neither a run"), ("last.pt", "not finished")]
)
def test_folders_that_are_no_results_are_errors(tmp_path: Path, content: str | None, words: str) -> None:
    folder = tmp_path / "x"
    if content is not None:
        folder.mkdir()
        if content:
            (folder / content).write_bytes(b"")
    with pytest.raises(ReportError, match=words):
        collect([folder])


def test_a_real_run_shows_its_control_and_worst_samples(make_store: Any, tmp_path: Path) -> None:
    store, out = make_store(), tmp_path / "run"
    options = {"epochs": 1, "image_size": 32, "batch_size": 8, "workers": 0, "control": True}
    run_training(load_config({"store": str(store), "student": "timm:test_resnet", "out": out, **options}))
    made = build_report([out], tmp_path / "page" / "report.html", samples=4)
    assert [row["control"] for row in made.rows].count(True) == 1
    text = made.path.read_text()
    assert text.count("data:image/jpeg;base64,") == 4
    assert "Where run fails" in text
    assert "Confusion" in text


def test_overlap_and_matching_of_boxes() -> None:
    import numpy as np

    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], dtype=float)
    np.testing.assert_allclose(box_iou(np.array([0, 0, 10, 5.0]), boxes), [0.5, 0.0])
    found = np.array(
        [[0, 0, 10, 9, 0.9, 0], [0, 0, 10, 10, 0.8, 0], [20, 20, 30, 30, 0.7, 1]], dtype=np.float32
    )
    assert count_hits(found, boxes, np.array([0, 0])) == 1
    assert count_hits(found, boxes, np.array([0, 1])) == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1300, 500])
def test_page_draws_and_sorts_in_a_browser(sweep_folder: Path, tmp_path: Path, width: int) -> None:
    """Charts fit the window, a click on a heading sorts, nothing is asked of the network."""
    page = build_report([sweep_folder], None, samples=0).path
    probe = """<script>window.addEventListener("load", function () { setTimeout(function () {
      var button = Array.from(document.querySelectorAll("th button")).find(function (b) { return b.textContent === "run"; });
      button.click();
      var column = Array.from(button.closest("tr").cells).indexOf(button.closest("th"));
      var told = document.createElement("pre"); told.id = "told";
      told.textContent = JSON.stringify({
        width: innerWidth,
        charts: Array.from(document.querySelectorAll(".main-svg")).map(function (e) { return e.getBoundingClientRect().right; }),
        names: Array.from(document.querySelectorAll("tbody tr")).map(function (r) { return r.cells[column].textContent; }),
        requests: performance.getEntriesByType("resource").map(function (e) { return e.name; })
      });
      document.body.appendChild(told); }, 800); });</script></body>"""
    watched = tmp_path / "watched.html"
    watched.write_text(page.read_text().replace("</body>", probe))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"),
            *("--virtual-time-budget=8000", "--dump-dom", watched.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    found = re.search(r'id="told">([^<]+)<', done.stdout)
    assert found, done.stderr[-2000:]
    told = json.loads(found[1].replace("&quot;", '"'))
    assert len(told["charts"]) >= 6
    assert max(told["charts"]) <= told["width"]
    assert told["names"] == sorted(told["names"], reverse=True)
    assert told["requests"] == []
