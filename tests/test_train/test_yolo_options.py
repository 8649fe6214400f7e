"""Our options in ultralytics' terms, what it cannot do, and bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store import open_store
from store.errors import DistillError
from tests.test_train.yolo_data import Row, make_store, scene, scenes
from train.config import TrainConfig
from train.errors import ConfigError, TrainError

pytest.importorskip("ultralytics")

from train.engine.yolo.options import (
    check_options,
    clip_norm,
    levels_of,
    parse_settings,
    ultralytics_arguments,
)

PUBLISHED = {"n": 3_157_200, "s": 11_166_560, "m": 25_902_640, "l": 43_691_520, "x": 68_229_648}


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"store": Path("s.zarr"), "student": "yolov8/n", "out": Path("run"), **options})


def test_the_recipe_keeps_ultralytics_own_defaults() -> None:
    arguments = ultralytics_arguments(make_config())
    assert arguments["lr0"] == 1e-3
    assert arguments["optimizer"] == "SGD"
    assert arguments["weight_decay"] == 0.0005
    assert arguments["imgsz"] == 640
    assert arguments["nbs"] == 64
    assert arguments["warmup_epochs"] == 3
    assert arguments["cos_lr"] is True
    assert not {"mosaic", "momentum", "lrf"} & arguments.keys()
    assert clip_norm(make_config()) == 10
    assert levels_of(make_config()) == ("P5",)


def test_explicit_options_are_mapped() -> None:
    config = make_config(
        batch_size=4,
        grad_accum_steps=3,
        max_grad_norm=0.5,
        lr_scheduler="constant",
        warmup_epochs=1,
        optimizer="adamw",
        early_stopping_patience=7,
        augment="none",
        distill_layers="p3, P5",
        yolo_settings="mosaic=0.25,degrees=10",
    )
    arguments = ultralytics_arguments(config)
    assert arguments["nbs"] == 12
    assert arguments["lrf"] == 1.0
    assert arguments["cos_lr"] is False
    assert arguments["optimizer"] == "AdamW"
    assert arguments["momentum"] == 0.9
    assert arguments["patience"] == 7
    assert arguments["hsv_s"] == 0
    assert arguments["mosaic"] == 0.25  # a setting wins over the summary option
    assert arguments["degrees"] == 10
    assert clip_norm(config) == 0.5
    assert clip_norm(make_config(max_grad_norm=0)) == float("inf")
    assert levels_of(config) == ("P3", "P5")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"temperature": 2.0}, "temperature"),
        ({"ema_decay": 0.99}, "always averages weights"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"compile": True}, "compile"),
        ({"distillation_type": "logit"}, "distillation_type logit"),
        ({"feature_loss_type": "relation"}, "mse, cosine or smooth_l1"),
        ({"image_size": 100}, "not a multiple of 32.*use 96"),
        ({"task": "segmentation"}, "task segmentation"),
        ({"feature_target": "pooled"}, "feature_target pooled"),
    ],
)
def test_options_that_cannot_be_followed_are_errors(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_options(make_config(**option))


def test_defaults_and_hybrid_are_accepted() -> None:
    check_options(make_config())
    check_options(make_config(distillation_type="hybrid", temperature=4.0))


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError, match=r"ema_decay.*image_size 100"):
        check_options(make_config(ema_decay=0.9, image_size=100))


@pytest.mark.parametrize("text", ["nonsense=1", "mosaic", "save_dir=x", "device=0"])
def test_settings_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="yolo_settings"):
        parse_settings(text)


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="P3, P4, P5"):
        levels_of(make_config(distill_layers="P6"))


def test_cpu_has_no_distributed_training() -> None:
    from train.engine.yolo.assemble import device_arguments

    with pytest.raises(ConfigError, match="not on several"):
        device_arguments(make_config(device="cpu,cpu"))
    assert device_arguments(make_config(device="cpu")) == {"device": "cpu", "amp": False}
    with pytest.raises(ConfigError, match="precision fp16"):
        device_arguments(make_config(device="cpu", precision="fp16"))


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_have_the_published_parameter_counts(size: str) -> None:
    from train.students import build_student

    with torch.device("meta"):
        student = build_student(f"yolov8/{size}", num_classes=80, image_size=640)
    assert student.parameter_count() == pytest.approx(PUBLISHED[size], rel=0.02)


def test_students_give_boxes_and_the_distilled_map() -> None:
    from train.students import build_student

    student = build_student("yolov8n", num_classes=3, image_size=64).eval()
    out = student(torch.zeros(2, 3, 64, 64))
    assert out.logits is not None
    assert out.logits.shape == (2, 4 + 3, 84)
    assert out.features.shape == (2, student.spec.feature_width, 2, 2)


# Data ------------------------------------------------------------------------------------------------------------


def row_with(boxes: list[list[float]], classes: list[int]) -> Row:
    image = scene(np.random.default_rng(0))[0]
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int32)


def open_train(path: Path, **settings: Any) -> Any:
    from train.engine.yolo.records import open_split

    return open_split(open_store(path), "train", image_size=64, data_root=None, distil=True, **settings)


def test_bad_boxes_are_cleaned_and_backgrounds_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = scene(np.random.default_rng(0))[0]
    height, width = image.shape[:2]
    rows = [
        row_with(
            [[-20, -10, 30, 40], [10, 10, 10, 30], [width + 5, 5, width + 20, 30], [5, 5, 25, 25]],
            [0, 0, 1, 1],
        ),
        row_with([], []),
    ]
    records = open_train(make_store(tmp_path / "s", {"train": rows, "val": scenes(2, 0)})).records
    expected = np.array(
        [
            [15 / width, 20 / height, 30 / width, 40 / height],
            [15 / width, 15 / height, 20 / width, 20 / height],
        ]
    )
    assert np.allclose(records[0].boxes, expected, atol=1e-6)
    assert records[0].classes.tolist() == [0, 1]
    assert records[1].boxes.shape == (0, 4)
    assert "2 boxes without area" in caplog.text


def test_a_class_without_a_name_is_an_error(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", {"train": [row_with([[1, 1, 9, 9]], [5])], "val": scenes(2, 0)})
    with pytest.raises(TrainError, match=r"train/000.png: class 5, but the store names 2 classes"):
        open_train(path)


def test_a_store_without_grid_says_what_to_extract(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", {"train": scenes(2, 1), "val": scenes(2, 0)}, grid=False)
    with pytest.raises(TrainError, match="--grid 16"):
        open_train(path)


def test_a_store_without_boxes_is_an_error(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", {"train": scenes(2, 1), "val": scenes(2, 0)}, boxes=False)
    with pytest.raises(TrainError, match="no boxes"):
        open_train(path)


def test_a_missing_split_is_an_error(tmp_path: Path) -> None:
    from train.engine.yolo.records import open_split

    path = make_store(tmp_path / "s", {"train": scenes(2, 1)})
    with pytest.raises(TrainError, match="no split 'val', it has train"):
        open_split(open_store(path), "val", image_size=64, data_root=None, distil=False)


def test_classes_may_be_more_than_the_store_has_but_not_fewer(tmp_path: Path) -> None:
    from train.engine.yolo.assemble import class_names

    store = open_store(make_store(tmp_path / "s", {"train": scenes(2, 1)}))
    assert class_names(make_config(num_classes=3), store) == ("red", "green", "class_2")
    with pytest.raises(ConfigError, match="num_classes 1"):
        class_names(make_config(num_classes=1), store)


# Weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_ultralytics_files_are_read_without_running_code(tmp_path: Path) -> None:
    from train.students import build_student

    source = build_student("yolov8n", num_classes=2, image_size=64)
    network: Any = source.network
    metrics = {"fitness": np.float64(0.5)}
    torch.save({"model": network.half(), "ema": None, "train_metrics": metrics}, tmp_path / "yolo.pt")
    student = build_student("yolov8n", num_classes=3, image_size=64, student_path=tmp_path / "yolo.pt")
    assert torch.equal(student.network.model[0].conv.weight, network.model[0].conv.weight.float())
    assert {name.rsplit(".", 1)[-1] for name in student.initial_weights.reinitialised} == {"weight", "bias"}
    assert all(".cv3." in name for name in student.initial_weights.reinitialised)


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return print, ("harm",)


@pytest.mark.parametrize("content", [Harm(), {"model": Harm()}, {"weights": 1}])
def test_foreign_files_are_refused(tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from train.students.yolo import read_yolo_weights

    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DistillError, match=r"bad\.pt"):
        read_yolo_weights(tmp_path / "bad.pt")
    assert "harm" not in capsys.readouterr().out


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    from train.students import build_student

    small: Any = build_student("yolov8n", num_classes=2, image_size=64)
    torch.save(small.network.state_dict(), tmp_path / "n.pt")
    with pytest.raises(DistillError, match=r"does not fit: \d+ tensors.*same size"):
        build_student("yolov8s", num_classes=2, image_size=64, student_path=tmp_path / "n.pt")


@pytest.mark.slow
def test_without_ultralytics_the_error_says_how_to_install_it() -> None:
    """In a process where it cannot be imported; everything else of stage two still can."""
    script = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ultralytics' else find(name, *a)\n"
        "sys.modules['ultralytics'] = None\n"
        "from train.students import build_student\n"
        "build_student('resnet18', num_classes=2, image_size=32)\n"
        "try:\n"
        "    build_student('yolov8n', num_classes=2, image_size=64)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.exit_code, error)\n"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert "UltralyticsMissingError 1" in found.stdout
    assert "pip install" in found.stdout


def test_raw_images_have_the_boxes_of_the_teachers_view(tmp_path: Path) -> None:
    """`--images raw` stores what the teacher saw: here a 200×100 photo in a 112-pixel letterbox."""
    from train.engine.yolo.records import detection_records

    image = np.zeros((100, 200, 3), np.uint8)
    row = (image, np.array([[50, 25, 150, 75]], np.float32), np.zeros(1, np.int32))
    store = open_store(make_store(tmp_path / "s", {"train": [row]}, resize="letterbox"))
    (record,) = detection_records(store, store["train"], raw=True)
    assert (record.width, record.height) == (112, 112)
    assert np.allclose(record.boxes, [[0.5, 0.5, 0.5, 0.25]], atol=0.01)
