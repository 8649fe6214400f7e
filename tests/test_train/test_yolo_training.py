"""Whole trainings of YOLOv8n on a few small images: files, resume, control, LoRA, stopping, no network."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from console.stop import Stopped, StopRequest
from tests.test_train.yolo_data import make_store, scenes
from train.checkpoint import load_checkpoint, load_student_from_run
from train.config import TrainConfig
from train.errors import ConfigError, TrainError
from train.events import SilentObserver

pytest.importorskip("ultralytics")

from train.engine.yolo import run as yolo_run
from train.engine.yolo.run import run_yolo

ROOT = Path(__file__).parents[2]
# Two batches a step, mosaic closed in the last epoch: what a resumed run must get right.
OPTIONS: dict[str, Any] = {
    "student": "yolov8/n",
    "epochs": 3,
    "batch_size": 4,
    "image_size": 64,
    "device": "cpu",
    "workers": 0,
    "yolo_settings": "plots=false,close_mosaic=1,nbs=8",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(
        tmp_path_factory.mktemp("yolo") / "store.zarr", {"train": scenes(10, 0), "val": scenes(4, 1)}
    )


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.saved: list[tuple[str, int, bool]] = []
        self.summary: dict[str, Any] = {}

    def epoch_end(self, record: dict[str, Any]) -> None:
        self.epochs.append(record)

    def checkpoint_saved(self, path: Path, epoch: int, is_best: bool) -> None:
        self.saved.append((path.name, epoch, is_best))

    def finished(self, summary: dict[str, Any]) -> None:
        self.summary = summary


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listener]:
    """A finished training that distils at two levels, with its control, and what an observer heard of it."""
    out = tmp_path_factory.mktemp("run") / "out"
    listener = Listener()
    run_yolo(make_config(store, out, control=True, checkpoint_interval=2, distill_layers="P4,P5"), [listener])
    return out, listener


def make_config(store: Path, out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(**{**OPTIONS, "store": store, "out": out, **options})


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learnt(run: Path) -> dict[str, Any]:
    """Everything in last.pt that training made."""
    content = load_checkpoint(run / "last.pt")
    return {"model": content["model_state_dict"], "training": content["training"]}


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_equal(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert one == other, where


# Files -----------------------------------------------------------------------------------------------------------


def test_the_run_folder_is_that_of_other_students(run: tuple[Path, Listener]) -> None:
    folder, listener = run
    names = {"config.json", "metrics.jsonl", "summary.json", "best.pt", "last.pt", "checkpoint_epoch_2.pt"}
    assert names <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == listener.summary
    for name in (
        "student",
        "task",
        "num_classes",
        "epochs_done",
        "best_epoch",
        "parameters",
        "macs",
        "wall_time_s",
    ):
        assert summary[name]
    assert summary["metrics"].keys() >= {"map50", "map50_95"}
    assert summary["trainable_parameters"] > 3_000_000
    assert summary["store"]["fingerprint"]
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["student"] == "yolov8/n"
    assert config["resolved"]["ultralytics"]["close_mosaic"] == 1


def test_the_distillation_term_has_its_own_column_everywhere(run: tuple[Path, Listener]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run
    records = metrics_of(folder)
    with open(folder / "ultralytics" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("feature_loss")]
    for record, row, value in zip(records, rows, logged, strict=True):
        assert record["feature_loss"] > 0.05
        assert float(row["train/dis_loss"]) == pytest.approx(record["feature_loss"], abs=1e-4)
        assert float(row["val/dis_loss"]) > 0.05
        assert value == pytest.approx(record["feature_loss"], rel=1e-5)
        parts = record["box_loss"] + record["cls_loss"] + record["dfl_loss"]
        assert record["hard_loss"] == pytest.approx(parts)
        assert record["train_loss"] == pytest.approx(0.5 * parts + 0.5 * record["feature_loss"])
    assert [record["epoch"] for record in records] == [1, 2, 3]


def test_observers_hear_of_epochs_and_checkpoints(run: tuple[Path, Listener]) -> None:
    folder, listener = run
    assert listener.epochs == metrics_of(folder)
    assert ("last.pt", 3, listener.saved[-1][2]) == listener.saved[-1]
    assert ("checkpoint_epoch_2.pt", 2) in {saved[:2] for saved in listener.saved}
    best = [epoch for name, epoch, _ in listener.saved if name == "best.pt"]
    assert best[-1] == listener.summary["best_epoch"]


def test_the_control_learns_the_task_alone(run: tuple[Path, Listener]) -> None:
    folder, listener = run
    control = metrics_of(folder / "control")
    assert [record["feature_loss"] for record in control] == [None] * 3
    assert control[0]["train_loss"] == pytest.approx(control[0]["hard_loss"])
    # The same weights and images to start with: the first epoch's losses differ only by what was learnt in it.
    assert control[0]["hard_loss"] == pytest.approx(metrics_of(folder)[0]["hard_loss"], rel=0.05)
    difference = listener.summary["control"]["difference"]
    expected = listener.summary["metrics"]["map50"] - listener.summary["control"]["metrics"]["map50"]
    assert difference["map50"] == pytest.approx(expected)


def test_heads_train_and_are_kept_for_resume_but_not_exported(run: tuple[Path, Listener]) -> None:
    folder, _ = run
    content = load_checkpoint(folder / "last.pt")
    heads = {n: v for n, v in content["training"]["model"].items() if n.startswith("distillation.")}
    assert {name.split(".")[2] for name in heads} == {"P4", "P5"}
    momentum = content["training"]["optimizer"]["state"]
    # One entry for each trained tensor: those of the heads are among them.
    assert len(momentum) == sum(1 for _ in load_student_from_run(folder)[0].parameters()) - 1 + len(heads)
    assert not [name for name in content["model_state_dict"] if "distillation" in name]


def test_our_checkpoint_and_ultralytics_agree(run: tuple[Path, Listener]) -> None:
    from ultralytics import YOLO

    folder, _ = run
    student, content = load_student_from_run(folder)
    theirs: Any = YOLO(folder / "ultralytics" / "best.pt").model.float().eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(student(image).logits, theirs(image)[0], atol=0.5, rtol=0.02)
    assert content["class_names"] == ["red", "green"]


EXPORTED = """
import sys, socket
def refuse(*args, **kwargs): raise AssertionError("network used")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import numpy as np
from ultralytics import YOLO
model = YOLO(sys.argv[1])
assert model.names == {0: "red", 1: "green"}, model.names
assert type(model.model).__module__ == "ultralytics.nn.tasks", type(model.model)
model.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)
metrics = model.val(data=sys.argv[2], imgsz=64, plots=False, verbose=False, workers=0, project=sys.argv[3])
assert 0 <= metrics.box.map50 <= 1
print(model.export(format="onnx", imgsz=64))
ours = [name for name in sys.modules if name.split(".")[0] in ("train", "store", "imaging")]
assert not ours, ours
"""


@pytest.mark.slow
def test_ultralytics_opens_predicts_validates_and_exports_without_our_code(
    run: tuple[Path, Listener], tmp_path: Path
) -> None:
    from PIL import Image

    folder, _ = run
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for number, (image, boxes, classes) in enumerate(scenes(2, 5)):
        height, width = image.shape[:2]
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
        scale = np.array([width, height, width, height])
        lines = [
            f"{label} {(x0 + x1) / 2} {(y0 + y1) / 2} {x1 - x0} {y1 - y0}"
            for label, (x0, y0, x1, y1) in zip(classes, boxes / scale, strict=True)
        ]
        (tmp_path / "labels" / f"{number}.txt").write_text("\n".join(lines))
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: red, 1: green}}\n")
    weights = tmp_path / "best.pt"
    weights.write_bytes((folder / "ultralytics" / "best.pt").read_bytes())
    environment = {**os.environ, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    environment |= {"YOLO_CONFIG_DIR": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", EXPORTED, str(weights), str(data), str(tmp_path / "runs")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "best.onnx").exists()


# Resume ----------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def crash_in(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """End the next training in the middle of its `batch`-th batch."""
    counted = yolo_run.count_batches

    def count(*arguments: Any) -> Any:
        after_batch, seen = counted(*arguments), iter(range(1, 1000))

        def finished(trainer: Any) -> None:
            after_batch(trainer)
            if next(seen) == batch:
                raise Crash

        return finished

    monkeypatch.setattr(yolo_run, "count_batches", count)


def test_resume_equals_an_uninterrupted_run(
    run: tuple[Path, Listener], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run
    out = tmp_path / "out"
    options = {"checkpoint_interval": 2, "distill_layers": "P4,P5"}
    with monkeypatch.context() as patched:
        crash_in(patched, 5)  # three batches an epoch: in the middle of the second
        with pytest.raises(Crash):
            run_yolo(make_config(store, out, **options))
    assert [record["epoch"] for record in metrics_of(out)] == [1]
    summary = run_yolo(make_config(store, out, resume=True, **options))
    assert_equal(learnt(out), learnt(whole))
    assert summary["metrics"] == json.loads((whole / "summary.json").read_text())["metrics"]
    timing = {"epoch_time_s", "train_time_s"}
    for one, other in zip(metrics_of(out), metrics_of(whole), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {
            k: v for k, v in other.items() if k not in timing
        }
    files = [(folder / "ultralytics" / "results.csv").read_text().splitlines() for folder in (out, whole)]
    resumed, uninterrupted = ([line.split(",")[2:] for line in file] for file in files)
    assert resumed == uninterrupted


def test_a_complete_run_is_not_repeated_and_a_taken_folder_is_refused(
    run: tuple[Path, Listener], store: Path
) -> None:
    folder, listener = run
    before = (folder / "last.pt").stat().st_mtime_ns
    options = {"control": True, "checkpoint_interval": 2, "distill_layers": "P4,P5"}
    assert run_yolo(make_config(store, folder, resume=True, **options)) == listener.summary
    assert (folder / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="--resume to continue it, or --overwrite"):
        run_yolo(make_config(store, folder, **options))
    with pytest.raises(ConfigError, match="image_size 64 → 96"):
        run_yolo(make_config(store, folder, resume=True, **{**options, "image_size": 96}))


@pytest.mark.slow
def test_interrupted_before_the_final_validation(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.engine.yolo.trainer import StoreTrainer

    out = tmp_path / "out"

    def fail(trainer: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(StoreTrainer, "final_eval", fail)
        with pytest.raises(Crash):
            run_yolo(make_config(store, out, epochs=1))
    before = learnt(out)
    summary = run_yolo(make_config(store, out, epochs=1, resume=True))
    assert summary["epochs_done"] == 1
    assert_equal(learnt(out), before)
    assert summary["exported"]["map50"] is not None


def test_a_stop_request_ends_after_the_batch(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop = StopRequest()

    class StopAfterFirst(SilentObserver):
        def epoch_end(self, record: dict[str, Any]) -> None:
            stop.set(signal.SIGTERM)

    with pytest.raises(Stopped, match="--resume continues after it") as stopped:
        run_yolo(make_config(store, out), [StopAfterFirst()], stop)
    assert stopped.value.exit_code == 143
    assert len(metrics_of(out)) == 1
    assert not (out / "summary.json").exists()
    assert load_checkpoint(out / "last.pt")["epoch"] == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from train.config import TrainConfig
from train.engine.yolo import run as yolo_run
kill_at, options = int(sys.argv[1]), eval(sys.argv[2])
counted = yolo_run.count_batches
def count(*arguments):
    after_batch, seen = counted(*arguments), iter(range(1, 1000))
    def finished(trainer):
        after_batch(trainer)
        if next(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return finished
yolo_run.count_batches = count
yolo_run.run_yolo(TrainConfig(**options))
"""


@pytest.mark.slow
def test_resume_after_kill_9_with_loader_workers(store: Path, tmp_path: Path) -> None:
    def train(out: Path, kill_at: int, **changes: Any) -> int:
        options = {**OPTIONS, "store": str(store), "out": str(out), "workers": 2, **changes}
        command = [sys.executable, "-c", KILLED, str(kill_at), repr(options)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert train(tmp_path / "whole", 0) == 0
    assert train(tmp_path / "killed", 8) == -signal.SIGKILL
    assert train(tmp_path / "killed", 0, resume=True) == 0
    assert_equal(learnt(tmp_path / "killed"), learnt(tmp_path / "whole"))


# LoRA, weights, losses -------------------------------------------------------------------------------------------


def test_lora_leaves_base_weights_as_they_were(
    run: tuple[Path, Listener], store: Path, tmp_path: Path
) -> None:
    folder, _ = run
    out = tmp_path / "out"
    options = {"lora_rank": 2, "student_path": folder / "best.pt", "epochs": 1, "learning_rate": 0.1}
    summary = run_yolo(make_config(store, out, **options))
    start = load_checkpoint(folder / "best.pt")["model_state_dict"]
    live = load_checkpoint(out / "last.pt")["training"]["model"]
    base = {n.replace(".base_layer.", "."): v for n, v in live.items() if n.endswith(".base_layer.weight")}
    assert len(base) > 40
    for name, value in base.items():
        assert torch.equal(value, start[f"network.{name}"]), name
    adapters = [value for name, value in live.items() if "lora_B" in name]
    assert sum(float(value.abs().sum()) for value in adapters) > 0
    assert summary["trainable_parameters"] < 0.5 * summary["parameters"]
    merged = load_checkpoint(out / "best.pt")["model_state_dict"]
    assert merged.keys() == start.keys()
    assert not torch.equal(merged["network.model.1.conv.weight"], start["network.model.1.conv.weight"])
    student, _ = load_student_from_run(out)
    assert student(torch.zeros(1, 3, 64, 64)).logits is not None


@pytest.mark.parametrize("kind", ["cosine", pytest.param("smooth_l1", marks=pytest.mark.slow)])
def test_feature_losses_and_foreground_weights(store: Path, tmp_path: Path, kind: str) -> None:
    options = {"feature_loss_type": kind, "foreground_weight": 4.0, "epochs": 1, "distill_layers": "P3"}
    run_yolo(make_config(store, tmp_path / "out", **options))
    assert metrics_of(tmp_path / "out")[0]["feature_loss"] > 0


def test_a_loss_that_is_not_finite_stops_the_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.engine.yolo import model

    monkeypatch.setattr(
        model, "feature_loss", lambda *arguments: torch.tensor(float("nan"), requires_grad=True)
    )
    with pytest.raises(TrainError, match="loss is not finite in epoch 1: lower --learning-rate"):
        run_yolo(make_config(store, tmp_path / "out"))


def test_an_explicit_batch_larger_than_the_split_is_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 64 is larger than split train"):
        run_yolo(make_config(store, tmp_path / "out", batch_size=64))


# The network -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_with_plots_uses_no_network(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plots are what asks for fonts. Any attempt to connect or to resolve a name fails the test, threads included."""
    import socket

    attempts: list[str] = []

    def refuse(*arguments: Any, **named: Any) -> Any:
        attempts.append(f"{threading.current_thread().name}: {arguments[-1:]}")
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = tmp_path / "out"
    run_yolo(make_config(store, out, epochs=1, yolo_settings="plots=true"))
    assert not attempts
    assert (out / "ultralytics" / "results.png").exists()
    assert (out / "ultralytics" / "labels.jpg").exists()


def test_telemetry_trackers_and_downloads_are_off() -> None:
    from ultralytics.utils import callbacks, checks, events, plotting

    from train.engine.yolo.offline import prepare_ultralytics

    prepare_ultralytics()
    assert not events.events.enabled
    assert checks.ONLINE is False
    assert callbacks.add_integration_callbacks(object()) is None
    assert plotting.check_font("Arial.ttf") is None


# Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_learns_and_evaluation_finds_what_the_training_measured(tmp_path: Path) -> None:
    from train.engine.yolo.evaluate import evaluate_yolo

    store = make_store(tmp_path / "s.zarr", {"train": scenes(64, 0), "val": scenes(16, 1)})
    out = tmp_path / "out"
    options = {
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "epochs": 15,
        "image_size": 96,
        "warmup_epochs": 1,
    }
    summary = run_yolo(make_config(store, out, **options, yolo_settings="plots=false,nbs=4,close_mosaic=4"))
    assert summary["metrics"]["map50"] > 0.3
    records = metrics_of(out)
    assert records[-1]["feature_loss"] < 0.5 * records[0]["feature_loss"]
    found = evaluate_yolo(out, store, split="val", batch_size=8, device="cpu")
    assert found["samples"] == 16
    for name, value in summary["exported"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=0.02)
    assert found["per_class"].keys() == {"red", "green"}


def test_evaluation_wants_the_same_classes(run: tuple[Path, Listener], tmp_path: Path) -> None:
    from train.engine.yolo.evaluate import evaluate_yolo

    folder, _ = run
    other = make_store(tmp_path / "other.zarr", {"val": scenes(2, 3)}, names=("cat", "dog"))
    with pytest.raises(TrainError, match=r"has classes cat, dog, the student .* knows red, green"):
        evaluate_yolo(folder, other, device="cpu")
    assert (
        evaluate_yolo(folder, make_store(tmp_path / "s.zarr", {"val": scenes(2, 3)}), device="cpu")["samples"]
        == 2
    )


# Several GPUs ----------------------------------------------------------------------------------------------------


def test_a_rank_reads_its_job_from_the_run_folder(run: tuple[Path, Listener]) -> None:
    """What can be checked of the DDP path without GPUs: the launcher's processes know what to do."""
    from train.engine.yolo.ddp import job_of_rank

    folder, _ = run
    before = metrics_of(folder)
    job = job_of_rank(folder)
    assert job.class_names == ("red", "green")
    assert job.arguments["epochs"] == 3
    assert job.state is not None
    assert job.state["epoch"] == 2
    assert metrics_of(folder) == before
