"""The device is one batch ahead: results that arrive late are waited for, in order, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from extract.config import load_config
from extract.decode.sample import Encoding
from extract.encode import DeviceCopies
from extract.logits import score_split
from extract.plan import RowSamples
from extract.sources.detect import open_source
from store.writer import batches
from tests.test_extract.extractions import extract, files_of, interrupt


class LateEvent:
    """An event of a copy that is only made when somebody waits for it."""

    def __init__(self, source: dict[str, Tensor], target: dict[str, Tensor], order: list[str]) -> None:
        self.source, self.target, self.order, self.done = source, target, order, False

    def synchronize(self) -> None:
        if not self.done:
            self.order.append("wait")
            for name, tensor in self.source.items():
                np.copyto(self.target[name].numpy(), tensor.numpy())
        self.done = True


class LateCopies(DeviceCopies):
    """What CUDA does to the host's view of a result: garbage until its event has been waited for."""

    order: list[str]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.depth = 1

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_host(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        self.order.append("launch")
        host = {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}
        return host, LateEvent(
            {name: tensor.clone() for name, tensor in tensors.items()}, dict(host), self.order
        )


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches and waits as they happen, with late copies in place of the CPU's."""
    LateCopies.order = []
    monkeypatch.setattr("extract.encode.DeviceCopies", LateCopies)
    monkeypatch.setattr("extract.logits.DeviceCopies", LateCopies)
    return LateCopies.order


@pytest.mark.parametrize(
    "options", [{}, {"grid": "native"}, {"resize": "letterbox", "grid": 1}, {"views": 1}]
)
def test_late_results_give_the_same_store(
    extract_options: dict[str, Any], options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    extract(extract_options, **options)
    late = Path(extract_options["out"]).with_name("late")
    order = request.getfixturevalue("order")
    extract(extract_options, out=late, **options)
    assert files_of(late) == files_of(extract_options["out"])
    assert order[0:3] == ["launch", "wait", "launch"]  # the calibration batch alone
    assert "launch launch wait" in " ".join(order)


def test_a_stop_with_a_batch_on_the_device_loses_nothing(
    extract_options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    options = {**extract_options, "grid": "native"}
    extract(options)
    late = {**options, "out": Path(options["out"]).with_name("late")}
    request.getfixturevalue("order")
    interrupt(late, rows=16)
    extract(late)
    assert files_of(late["out"]) == files_of(options["out"])


class MeanScorer:
    """Scores an image by its mean color: what matters here is when."""

    teacher = SimpleNamespace(device=torch.device("cpu"))

    def score_images(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def test_scoring_is_a_batch_ahead(order: list[str], tmp_path: Path) -> None:
    for number in range(7):
        file = tmp_path / "photos" / "a" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), (number * 10, 0, 0)).save(file)
    (tmp_path / "photos" / "a" / "3.png").write_bytes(b"broken")
    config = load_config({"data": str(tmp_path), "out": tmp_path / "store", "image_size": 28, "workers": 0})
    samples = RowSamples(open_source(tmp_path / "photos", val_fraction=0).splits["train"])
    task: Any = SimpleNamespace(splits={"train": samples}, encoding=Encoding(image_size=28, resize="squash"))
    writer: Any = SimpleNamespace(
        split="train", batches=lambda: batches(0, 7, 2, 1024), job=SimpleNamespace(batch_rows=2)
    )
    scores = np.concatenate(list(score_split(config, task, writer, MeanScorer(), SimpleNamespace())))  # type: ignore[arg-type]
    np.testing.assert_allclose(scores[[0, 1, 2, 4, 5, 6], 0], [0, 10, 20, 40, 50, 60])
    assert np.isnan(scores[3]).all()
    assert order == ["launch", "launch", "wait", "launch", "wait", "launch", "wait", "wait"]
