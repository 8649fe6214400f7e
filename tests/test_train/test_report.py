"""The report: numbers by hand, and the page in a real browser."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from scipy import stats

from store.reader import open_store
from train.config import load_config
from train.errors import ReportError
from train.report import figures
from train.report.build import build_report, pass_seconds
from train.report.page import marked
from train.report.runs import collect, cost_of, differences, mean_with_interval, pareto_front
from train.report.samples import box_confusion, box_iou, count_hits
from train.run import run_training

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def fake_trial(
    sweep: Path,
    name: str,
    value: float,
    *,
    seed: int = 0,
    control: bool = False,
    parameters: int = 100,
    **changes: Any,
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
        **changes,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    records = [
        {
            "epoch": epoch,
            "train_loss": 20 / epoch,
            "hard_loss": 1 / epoch,
            "val_hard_loss": 1 / epoch,
            "feature_loss": None if control else 0.5 / epoch,
            "top1": value * epoch / 2,
        }
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
    assert (
        build_report([sweep_folder], sweep_folder.parent, samples=0).path
        == sweep_folder.parent / "report.html"
    )
    assert (
        build_report([sweep_folder], sweep_folder / "new", samples=0).path == sweep_folder / "new/report.html"
    )
    assert not list(sweep_folder.parent.rglob(".partial*"))
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


def test_a_file_in_the_place_of_a_run_is_not_a_problem_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ReportError) as caught:
        build_report([tmp_path / "model.onnx"], None, samples=0)
    assert "--out" not in str(caught.value)
    assert str(tmp_path / "model.onnx") in str(caught.value)


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
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], dtype=float)
    np.testing.assert_allclose(box_iou(np.array([0, 0, 10, 5.0]), boxes), [0.5, 0.0])
    found = np.array(
        [[0, 0, 10, 9, 0.9, 0], [0, 0, 10, 10, 0.8, 0], [20, 20, 30, 30, 0.7, 1]], dtype=np.float32
    )
    assert count_hits(found, boxes, np.array([0, 0])) == 1
    assert count_hits(found, boxes, np.array([0, 1])) == 2


def test_missed_invented_and_confused_boxes_are_counted_apart() -> None:
    found = np.array(
        [[0, 0, 10, 10, 0.9, 1], [20, 20, 30, 30, 0.8, 1], [50, 50, 60, 60, 0.7, 0]], dtype=np.float32
    )
    boxes = np.array([[0, 0, 10, 9], [20, 20, 30, 30], [80, 80, 90, 90]], dtype=float)
    counts = box_confusion(found, boxes, np.array([0, 1, 0]), 2)
    assert counts.tolist() == [[0, 1, 1], [0, 1, 0], [1, 0, 0]]  # last: nothing
    assert box_confusion(found[:0], boxes[:0], np.array([], int), 2).sum() == 0
    assert box_confusion(found, boxes[:0], np.array([], int), 2).tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 0]]


@pytest.mark.slow
def test_detections_are_drawn_and_counted_by_class(tmp_path: Path) -> None:
    from tests.test_train import yolo_data

    store, out = tmp_path / "boxes.zarr", tmp_path / "yolo"
    splits = {"train": yolo_data.scenes(16, 0), "val": yolo_data.scenes(4, 1)}
    yolo_data.make_store(store, splits, resize="letterbox")
    options = {"epochs": 1, "image_size": 64, "batch_size": 8, "workers": 0}
    run_training(load_config({"store": str(store), "student": "yolov8n", "out": out, **options}))
    text = build_report([out], None, samples=3).path.read_text()
    assert text.count("data:image/jpeg;base64,") == 3
    assert "missed" in text
    assert "Confusion of boxes" in text
    assert "AP50-95" in text


@pytest.mark.slow
def test_clips_show_a_frame_and_masks_stand_beside_the_truth(
    make_store: Any, clip_store: Path, tmp_path: Path
) -> None:
    options = {"epochs": 1, "image_size": 32, "batch_size": 3, "workers": 0}
    runs = {"lstm/small": clip_store, "unet/small": make_store(masks=True)}
    for number, (student, store) in enumerate(runs.items()):
        run_training(
            load_config({"store": str(store), "student": student, "out": tmp_path / str(number), **options})
        )
    made = build_report([tmp_path / "0", tmp_path / "1"], None, samples=2)
    text = made.path.read_text()
    assert text.count("data:image/jpeg;base64,") == 4
    for words in ("middle frames", "true mask right", "Confusion of pixels", "(sequence)", "(segmentation)"):
        assert words in text
    assert made.columns[-3:] == ["top1", "miou", "gain_over_control"]


def test_tasks_are_not_compared_with_one_another(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    trials = [
        fake_trial(sweep, "photo", 0.8),
        fake_trial(sweep, "mask", 0.6, task="segmentation", metrics={"miou": 0.6}),
    ]
    (sweep / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": trials}))
    parts = collect([sweep]).by_task()
    assert [(part.headline, [run.name for run in part.runs]) for part in parts] == [
        ("top1", ["photo"]),
        ("miou", ["mask"]),
    ]
    text = build_report([sweep], None, samples=0).path.read_text()
    assert "Quality (top-1 accuracy) against size, speed and training cost (classification)" in text
    assert "Quality (mean IoU) against size, speed and training cost (segmentation)" in text


def test_sweeps_stand_side_by_side_and_are_paired_each_for_itself(tmp_path: Path) -> None:
    for name, gain in (("first", 0.1), ("second", 0.2)):
        trials = [
            fake_trial(tmp_path / name, "d", 0.5 + gain),
            fake_trial(tmp_path / name, "c", 0.5, control=True),
        ]
        (tmp_path / name / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": trials}))
    folders = [tmp_path / "first", tmp_path / "second"]
    gains = differences(collect(folders))
    assert [(gain.label, round(gain.mean, 6)) for gain in gains] == [
        ("first: timm:test_resnet", 0.1),
        ("second: timm:test_resnet", 0.2),
    ]
    assert [row["sweep"] for row in build_report(folders, None, samples=0).rows] == [
        "second",
        "first",
        "first",
        "second",
    ]


def test_ceilings_are_drawn_beside_accuracies_only(make_store: Any, tmp_path: Path) -> None:
    store = make_store()
    (store / ".extract").mkdir(exist_ok=True)
    (store / ".extract/measured.json").write_text(json.dumps({"probe_top1": 0.91, "knn_top1": 0.87}))
    for task, metric, shown in (("classification", "top1", True), ("segmentation", "miou", False)):
        sweep = tmp_path / task
        trial = fake_trial(sweep, "d", 0.5, task=task, metrics={metric: 0.5}, store={"path": str(store)})
        (sweep / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": [trial]}))
        text = build_report([sweep], None, samples=0).path.read_text()
        assert ("teacher, linear probe 91.00%, teacher, k-NN 87.00%" in html.unescape(text)) == shown


def test_the_online_teacher_s_cost_is_each_store_s_pass_times_its_runs_epochs(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    trials = [
        fake_trial(sweep, "a", 0.5, store={"path": "small"}, epochs_done=10, wall_time_s=4.0),
        fake_trial(sweep, "b", 0.5, store={"path": "large"}, epochs_done=3, wall_time_s=5.0),
        fake_trial(sweep, "c", 0.5, store={"path": "large"}, epochs_done=3, wall_time_s=1.0, control=True),
    ]
    (sweep / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": trials}))
    runs = collect([sweep]).runs
    cost = cost_of(runs, {"small": 2.0, "large": 30.0})
    assert cost is not None
    assert (cost.students_s, cost.extraction_s, cost.online_teacher_s) == (10.0, 32.0, 110.0)
    assert cost_of(runs, {"small": 2.0}) is None


PROBE = """<script>window.addEventListener("load", function () { setTimeout(function () {
  var button = Array.from(document.querySelectorAll("th button")).find(function (b) { return b.textContent === "run"; });
  button.click();
  var column = Array.from(button.closest("tr").cells).indexOf(button.closest("th"));
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    page: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector(".xtick text")).fill,
    charts: Array.from(document.querySelectorAll(".main-svg")).map(function (e) { return e.getBoundingClientRect().right; }),
    names: Array.from(document.querySelectorAll("tbody tr")).map(function (r) { return r.cells[column].textContent; }),
    requests: performance.getEntriesByType("resource").map(function (e) { return e.name; })
  }), "*"); }, 800); });</script></body>"""
# A window cannot be as narrow as a phone, a frame can; it takes its colour scheme from the page around it.
FRAME = """<!doctype html><meta name="color-scheme" content="{scheme}"><body style="margin:0">
<script>addEventListener("message", function (event) {{
  var told = document.createElement("pre"); told.id = "told"; told.textContent = event.data; document.body.append(told);
}});</script>
<iframe src="{page}" style="width:{width}px;height:2600px;border:0;color-scheme:{scheme}"></iframe></body>"""


def chromium(tmp_path: Path, page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=8000",
                *options,
                page.as_uri(),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (390, "light"), (390, "dark")])
def test_page_draws_and_sorts_in_a_browser(
    sweep_folder: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    """At desktop and phone width charts fit the window, headings sort, nothing is asked of the network."""
    watched, frame, picture = tmp_path / "watched.html", tmp_path / "frame.html", tmp_path / "page.png"
    page = build_report([sweep_folder], None, samples=0).path.read_text()
    watched.write_text(page.replace("</body>", PROBE))
    frame.write_text(FRAME.format(page=watched.name, width=width, scheme=scheme))
    found = re.search(
        r'id="told">([^<]+)<', chromium(tmp_path, frame, "--window-size=1400,2600", "--dump-dom")
    )
    assert found
    told = json.loads(html.unescape(found[1]))
    assert told["width"] == width
    assert told["page"] <= width
    assert len(told["charts"]) >= 6
    assert max(told["charts"]) <= width
    assert told["names"] == sorted(told["names"], reverse=True)
    assert told["requests"] == []
    ground, ink = (sum(map(int, re.findall(r"\d+", told[name])[:3])) / 765 for name in ("ground", "ink"))
    assert (ground < 0.2, ink > 0.7) == (scheme == "dark", scheme == "dark")

    chromium(tmp_path, frame, "--window-size=1400,2600", "--hide-scrollbars", f"--screenshot={picture}")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB").crop((0, 0, width, 2600))).reshape(-1, 3)
    shades, counts = np.unique(pixels, axis=0, return_counts=True)
    assert shades[counts.argmax()].mean() < 40 if scheme == "dark" else shades[counts.argmax()].mean() > 240
    for color in (figures.COLORS[0], figures.COLORS[2]):  # marks and curves, and the bar of the gain
        drawn = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == drawn).all(1).sum() > 50


def test_losses_are_compared_term_by_term(sweep_folder: Path) -> None:
    """A control's total weighs its one term by 1, a distilled run's by other weights: the totals share no axis."""
    collection = collect([sweep_folder])
    task = figures.curves(collection, "hard_loss")
    assert task is not None
    assert {trace.line.dash for trace in task.data} == {"solid", "dot"}
    assert [list(trace.y) for trace in task.data] == [[1.0, 0.5]] * 6
    assert task.layout.yaxis.title.text == "task loss, training"
    term = figures.curves(collection, "feature_loss")
    assert term is not None
    assert {trace.line.dash for trace in term.data} == {"solid"}
    page = build_report([sweep_folder], None, samples=0).path.read_text()
    assert "loss, weighted" not in page


def test_a_gain_that_rounds_to_nothing_is_no_bar_across_the_page(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    trials = [fake_trial(sweep, "d", 0.5 - 6.6e-6), fake_trial(sweep, "c", 0.5, control=True)]
    (sweep / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": trials}))
    figure = figures.gain_bars(differences(collect([sweep])), "top1")
    assert figure is not None
    low, high = figure.layout.xaxis.range
    assert (low, high) == (-0.005, 0.005)
    assert figure.data[0].text[0] == "±0.00%"
    assert "±0" in figure.layout.xaxis.ticktext
    assert len(set(figure.layout.xaxis.ticktext)) == len(figure.layout.xaxis.ticktext)
    assert "±0.00%" in build_report([sweep], None, samples=0).path.read_text()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(-0.005, 0.005, [-0.004, -0.002, 0.0, 0.002, 0.004]), (-0.01, 0.11, [0.0, 0.02, 0.04, 0.06, 0.08, 0.1])],
)
def test_ticks_are_round_and_hold_zero(low: float, high: float, ticks: list[float]) -> None:
    assert figures.even_ticks(low, high) == pytest.approx(ticks)


def test_each_ceiling_s_label_is_at_its_own_line(sweep_folder: Path) -> None:
    figure = figures.scatter(collect([sweep_folder]), "parameters", {"probe": 0.87, "k-NN": 0.91})
    assert figure is not None
    labels = {note.text: (note.y, note.yanchor) for note in figure.layout.annotations}
    assert labels == {"k-NN 91.00%": (0.91, "bottom"), "probe 87.00%": (0.87, "top")}


def test_a_confusion_shows_counts() -> None:
    figure = figures.confusion([[5, 12000], [0, 1]], ["a", "b"], "Confusion")
    assert [list(row) for row in figure.data[0].text] == [["5", "12k"], ["", "1"]]
    assert "%{customdata:,}" in figure.data[0].hovertemplate
    many = [str(index) for index in range(figures.COUNTED_CLASSES + 1)]
    assert figures.confusion(np.eye(len(many), dtype=int).tolist(), many, "C").data[0].text is None


def test_commands_in_texts_are_code_and_the_rest_is_escaped() -> None:
    assert str(marked("<b> `cli probe STORE` adds")) == "&lt;b&gt; <code>cli probe STORE</code> adds"


def test_the_number_of_validation_samples_is_said(sweep_folder: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "counted"
    trial = fake_trial(sweep, "d", 0.5, validation_samples=8)
    (sweep / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": [trial]}))
    text = html.unescape(build_report([sweep], None, samples=0).path.read_text())
    assert "Validation samples: 8." in text
    assert "One sample of 8 is 12.5%" in text
    assert "Validation samples" not in build_report([sweep_folder], None, samples=0).path.read_text()


def test_a_folder_of_runs_and_sweeps_is_searched(
    sweep_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs"
    (runs / "deep").mkdir(parents=True)
    shutil.move(sweep_folder, runs / "deep" / "sweep")
    for name in ("one", "two"):
        folder = runs / name
        fake_trial(tmp_path / "made", name, 0.5)
        shutil.move(tmp_path / "made" / "trials" / name / "run", folder)
        (folder / "config.json").write_text("{}")
    (runs / "one" / "int8-ptq").mkdir()  # cli quantize writes a summary of its own into a run
    (runs / "one" / "int8-ptq" / "summary.json").write_text("{}")
    (runs / "started").mkdir()
    (runs / "started" / "metrics.jsonl").write_text("{}\n")
    (runs / "features.zarr").mkdir()
    (runs / "features.zarr" / "zarr.json").write_text("{}")
    with caplog.at_level("INFO"):
        found = collect([runs])
    assert "4 runs and sweeps below it: deep/sweep, one, started, two" in caplog.text
    assert {run.group for run in found.runs} == {"sweep", "one", "two"}
    page = build_report([runs], None, samples=0).path.read_text()
    assert "`" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert [(item.name, item.state) for item in found.unfinished] == [
        ("gone", "failed"),
        ("started", "unfinished"),
    ]
    with pytest.raises(ReportError, match="none below it"):
        collect([runs / "features.zarr"])


def test_latency_is_measured_once_for_an_architecture_and_kept(
    make_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.report import runs as report_runs

    options = {"epochs": 1, "image_size": 32, "batch_size": 8, "workers": 0, "control": True}
    store, out = make_store(), tmp_path / "run"
    run_training(load_config({"store": str(store), "student": "timm:test_resnet", "out": out, **options}))
    calls = []
    original = report_runs.measure_latency
    monkeypatch.setattr(report_runs, "measure_latency", lambda *a: calls.append(1) or original(*a))
    made = build_report([out], None, samples=0)
    first = {row["latency_ms"] for row in made.rows}
    assert len(calls) == 1
    assert len(first) == 1
    assert first != {json.loads((out / "summary.json").read_text())["latency_ms"]}
    assert "each architecture measured alone for this report on" in made.path.read_text()
    assert {row["latency_ms"] for row in build_report([out], None, samples=0).rows} == first
    assert len(calls) == 1
    kept = json.loads((out / "latency.json").read_text())
    (out / "latency.json").write_text(json.dumps({**kept, "machine": "another"}))
    build_report([out], None, samples=0)
    assert len(calls) == 2


@pytest.mark.parametrize(("encoded", "known"), [(32, True), (30, True), (8, False)])
def test_the_teacher_s_pass_counts_where_most_of_it_was_recorded(
    make_store: Any, tmp_path: Path, encoded: int, known: bool
) -> None:
    """A record of the last batch alone holds the start of the program, and must not be scaled up."""
    store = make_store()
    (store / ".extract").mkdir(exist_ok=True)
    (store / ".extract/measured.json").write_text(json.dumps({"extraction_s": 60.0, "encoded": encoded}))
    seconds = pass_seconds({str(store): open_store(store)})
    assert seconds == ({str(store): pytest.approx(60.0 * 32 / encoded)} if known else {})
    trial = fake_trial(tmp_path / "sweep", "d", 0.5, store={"path": str(store)})
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"config": {"set": {}}, "trials": [trial]}))
    text = build_report([tmp_path / "sweep"], None, samples=0).path.read_text()
    assert ("n.a.: the extraction of" in text) == (not known)
