"""What a YOLO run leaves behind: the files of every student, and those that ultralytics opens."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from tests.test_train.yolo_data import scenes
from tests.test_train.yolo_runs import (
    Listener,
    metrics_of,
)
from train.checkpoint import load_checkpoint, load_student_from_run
from train.distill.calibration import SHARE

pytest.importorskip("ultralytics")


def test_the_run_folder_is_that_of_other_students(yolo_run: tuple[Path, Listener]) -> None:
    folder, listener = yolo_run
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
    assert summary["optimizer"] == "AdamW"
    assert summary["learning_rate"] == pytest.approx(0.002 * 5 / (4 + 2), abs=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["student"] == "yolov8/n"
    assert config["resolved"]["ultralytics"]["close_mosaic"] == 1


def test_images_per_second_are_those_of_the_training_epochs(
    yolo_run: tuple[Path, Listener], yolo_store: Path
) -> None:
    """Validation and saving do not count; every training image counts once an epoch."""
    folder, listener = yolo_run
    seconds = sum(record["train_time_s"] for record in metrics_of(folder))
    assert 0 < seconds < listener.summary["wall_time_s"]
    images = len(open_store(yolo_store)["train"])
    assert listener.summary["images_per_second"] == pytest.approx(3 * images / seconds, rel=0.01)


def test_the_distillation_term_has_its_own_column_everywhere(yolo_run: tuple[Path, Listener]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = yolo_run
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
    # The weight of the term was found in the first batches.
    count, logarithms = load_checkpoint(folder / "last.pt")["training"]["model"]["distillation.calibration"]
    weight = 0.5 * SHARE * float((logarithms / count).exp())
    expected = 0.5 * records[-1]["hard_loss"] + weight * records[-1]["feature_loss"]
    assert records[-1]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert [record["epoch"] for record in records] == [1, 2, 3]


def test_observers_hear_of_epochs_and_checkpoints(yolo_run: tuple[Path, Listener]) -> None:
    folder, listener = yolo_run
    assert listener.epochs == metrics_of(folder)
    assert ("last.pt", 3, listener.saved[-1][2]) == listener.saved[-1]
    assert ("checkpoint_epoch_2.pt", 2) in {saved[:2] for saved in listener.saved}
    best = [epoch for name, epoch, _ in listener.saved if name == "best.pt"]
    assert best[-1] == listener.summary["best_epoch"]


def test_the_control_learns_the_task_alone(yolo_run: tuple[Path, Listener]) -> None:
    folder, listener = yolo_run
    control = metrics_of(folder / "control")
    assert [record["feature_loss"] for record in control] == [None] * 3
    assert control[0]["train_loss"] == pytest.approx(control[0]["hard_loss"])
    # The same weights and images to start with: the first epoch's losses differ only by what was learnt in it.
    assert control[0]["hard_loss"] == pytest.approx(metrics_of(folder)[0]["hard_loss"], rel=0.05)
    difference = listener.summary["control"]["difference"]
    expected = listener.summary["metrics"]["map50"] - listener.summary["control"]["metrics"]["map50"]
    assert difference["map50"] == pytest.approx(expected)


def test_heads_train_and_are_kept_for_resume_but_not_exported(yolo_run: tuple[Path, Listener]) -> None:
    folder, _ = yolo_run
    content = load_checkpoint(folder / "last.pt")
    heads = {n: v for n, v in content["training"]["model"].items() if n.startswith("distillation.heads.")}
    assert {name.split(".")[2] for name in heads} == {"P4", "P5"}
    momentum = content["training"]["optimizer"]["state"]
    # One entry for each trained tensor: those of the heads are among them.
    assert len(momentum) == sum(1 for _ in load_student_from_run(folder)[0].parameters()) - 1 + len(heads)
    assert not [name for name in content["model_state_dict"] if "distillation" in name]


def test_our_checkpoint_and_ultralytics_agree(yolo_run: tuple[Path, Listener]) -> None:
    from ultralytics import YOLO

    folder, _ = yolo_run
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
    yolo_run: tuple[Path, Listener], tmp_path: Path
) -> None:
    from PIL import Image

    folder, _ = yolo_run
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
