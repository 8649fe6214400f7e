"""YOLO networks of all sizes, and the weights files that they start from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.errors import DistillError

pytest.importorskip("ultralytics")

PUBLISHED = {"n": 3_157_200, "s": 11_166_560, "m": 25_902_640, "l": 43_691_520, "x": 68_229_648}


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_have_the_published_parameter_counts(size: str) -> None:
    from train.students.build import build_student

    with torch.device("meta"):
        student = build_student(f"yolov8/{size}", num_classes=80, image_size=640)
    assert student.parameter_count() == pytest.approx(PUBLISHED[size], rel=0.02)


def test_students_give_boxes_and_the_distilled_map() -> None:
    from train.students.build import build_student

    student = build_student("yolov8n", num_classes=3, image_size=64).eval()
    out = student(torch.zeros(2, 3, 64, 64))
    assert out.logits is not None
    assert out.logits.shape == (2, 4 + 3, 84)
    assert out.features.shape == (2, student.spec.feature_width, 2, 2)


def test_weights_of_ultralytics_files_are_read_without_running_code(tmp_path: Path) -> None:
    from train.students.build import build_student

    source = build_student("yolov8n", num_classes=2, image_size=64)
    network: Any = source.network
    metrics = {"fitness": np.float64(0.5)}
    torch.save({"model": network.half(), "ema": None, "train_metrics": metrics}, tmp_path / "yolo.pt")
    student = build_student("yolov8n", num_classes=3, image_size=64, student_path=tmp_path / "yolo.pt")
    assert torch.equal(student.network.model[0].conv.weight, network.model[0].conv.weight.float())
    assert {name.rsplit(".", 1)[-1] for name in student.initial_weights.reinitialized} == {"weight", "bias"}
    assert all(".cv3." in name for name in student.initial_weights.reinitialized)
    allowed = {getattr(entry, "__name__", str(entry)) for entry in torch.serialization.get_safe_globals()}
    assert "DetectionModel" not in allowed  # for this file only, not for what the process loads later


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return print, ("harm",)


class HarmfulModel:
    """ultralytics evaluates the `activation` of a model that is built from its description."""

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        from ultralytics.nn.tasks import DetectionModel

        layers = {"backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[-1], 1, "Detect", ["nc"]]]}
        return DetectionModel, ({"activation": "print('harm')", "nc": 1, **layers},)


@pytest.mark.parametrize(
    "content", [Harm(), {"model": Harm()}, {"model": HarmfulModel()}, {"weights": 1}, {"model": Path("x")}]
)
def test_foreign_files_are_refused(tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from train.students.yolo import read_yolo_weights

    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DistillError, match=r"bad\.pt"):
        read_yolo_weights(tmp_path / "bad.pt")
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize("reader", ["yolo", "checkpoint", "timm"])
def test_classes_that_ultralytics_has_allowed_are_not_allowed_to_us(
    tmp_path: Path, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training in this process has read its own checkpoint before: ultralytics leaves its classes allowed."""
    from ultralytics.nn.tasks import DetectionModel

    from train.checkpoint import load_checkpoint
    from train.students.build import build_student
    from train.students.yolo import read_yolo_weights

    readers: dict[str, Any] = {
        "yolo": read_yolo_weights,
        "checkpoint": load_checkpoint,
        "timm": lambda path: build_student("resnet18", num_classes=2, image_size=32, student_path=path),
    }

    torch.save({"model": HarmfulModel()}, tmp_path / "bad.pt")
    with torch.serialization.safe_globals([DetectionModel]):
        with pytest.raises(DistillError, match=r"bad\.pt"):
            readers[reader](tmp_path / "bad.pt")
        assert DetectionModel in torch.serialization.get_safe_globals()
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty or cut short"), (b"junk" * 100, "not a file of"), (b"a readme\n", "not a file of")],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    from train.students.yolo import read_yolo_weights

    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(DistillError, match=rf"bad\.pt is not a readable YOLO checkpoint: .*{reason}"):
        read_yolo_weights(tmp_path / "bad.pt")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    from train.students.build import build_student

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
        "from train.students.build import build_student\n"
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
