"""`cli verify --teacher-path`: how far a grid that moves with the image is from what the teacher says of the moved image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands.fidelity import view_fidelity
from commands.store import verify
from extract.config import load_config
from extract.run import run_extraction
from extract.teachers.base import Encoded
from extract.verify import teacher_of
from store.reader import open_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, timm_weights: Path) -> dict[str, Any]:
    """A store with grids of smooth pictures."""
    root = tmp_path_factory.mktemp("fidelity")
    noise = np.random.default_rng(0)
    for number in range(8):
        file = root / "data" / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((96, 96), Image.Resampling.BICUBIC).save(file)
    options = {
        "data": str(root / "data"),
        "out": root / "store",
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(timm_weights),
        "image_size": 96,
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
        "grid": "native",
    }
    run_extraction(load_config(options))
    return options


class ColorTeacher:
    """Says of each cell its mean color, which moves exactly with the image."""

    def __init__(self, teacher: Any, width: int) -> None:
        self.preprocessing, self.device, self.width = teacher.preprocessing, teacher.device, width

    def encode(self, images: torch.Tensor, *, inside: torch.Tensor | None = None) -> Encoded:
        cells = torch.nn.functional.adaptive_avg_pool2d(images.float(), 12).permute(0, 2, 3, 1)
        grid = cells.repeat(1, 1, 1, -(-self.width // 3))[..., : self.width]
        return Encoded(grid.mean(dim=(1, 2)), grid)


def test_a_teacher_that_moves_with_the_image_loses_nothing(made: dict[str, Any], monkeypatch: Any) -> None:
    """The geometry of every view is right: a teacher of mean colors agrees, a real one less and less."""
    store = open_store(made["out"])
    teacher = ColorTeacher(teacher_of(store, made["teacher_path"], "cpu"), 6)
    import commands.fidelity as fidelity

    load = fidelity.load_subjects

    def with_colors(*arguments: Any) -> Any:
        subjects = []
        for subject in load(*arguments):
            size = teacher.preprocessing.image_size
            pixels = torch.from_numpy(fidelity.render_image(subject.image, subject.base, size).copy())
            grid = teacher.encode(pixels.permute(2, 0, 1)[None]).grid
            subjects.append(fidelity.Subject(subject.image, grid, subject.base))
        return subjects

    monkeypatch.setattr(fidelity, "load_subjects", with_colors)
    monkeypatch.setattr(
        fidelity, "TargetStandardizer", lambda _mean, _std: lambda values: (values - 128) / 64
    )
    found = {item.view: item for item in view_fidelity(store, teacher, samples=8)}  # type: ignore[arg-type]
    assert list(found) == ["none", "flip", "crop", "rotation", "mosaic"]
    assert found["none"].first_percentile > 0.9999
    assert found["flip"].first_percentile > 0.9999
    assert min(item.mean for item in found.values()) > 0.97
    monkeypatch.setattr(fidelity.View, "flip", classmethod(lambda cls: cls.crop(0, 1, 1, 0)))
    monkeypatch.setattr(fidelity, "render_image", lambda image, *rest: np.asarray(image))
    wrong = {item.view: item for item in view_fidelity(store, teacher, samples=8)}  # type: ignore[arg-type]
    assert wrong["flip"].mean < 0.9


def test_verify_prints_what_each_view_costs(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    verify(str(made["out"]), teacher_path=made["teacher_path"], samples=8, device="cpu", json=True)
    report = json.loads(capsys.readouterr().out)
    found = {item["view"]: item for item in report["teacher"]["fidelity"]}
    assert found["none"]["mean"] > 0.95
    assert found["none"]["mean"] > found["flip"]["mean"]
    assert found["flip"]["cells"] == 8 * 9
    verify(str(made["out"]), teacher_path=made["teacher_path"], samples=4, device="cpu")
    assert "mosaic" in capsys.readouterr().out


def test_a_store_without_grids_has_no_fidelity(made: dict[str, Any], tmp_path: Path) -> None:
    options = {**made, "out": tmp_path / "store", "grid": 0}
    run_extraction(load_config(options))
    store = open_store(options["out"])
    assert view_fidelity(store, teacher_of(store, made["teacher_path"], "cpu")) == []
