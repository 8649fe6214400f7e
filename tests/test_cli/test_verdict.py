"""`cli probe --student`: a short control beside the teacher's ceiling, and a verdict with numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands.verdict import CLOSED, Verdict, compare, verdict_lines
from extract.result import read_measured

ROOT = Path(__file__).parents[2]


def judged(ceiling: float | None, control: float, samples: int = 1000) -> Verdict:
    return compare(
        "resnet/resnet18",
        "top1" if ceiling is not None else "map50_95",
        ceiling=ceiling,
        control=control,
        epochs=(3, 60),
        samples=samples,
        cost_share=0.05,
    )


@pytest.mark.parametrize(
    ("ceiling", "control", "samples", "word"),
    [
        (0.7, 0.4, 1000, "likely"),
        (0.68, 0.92, 1000, "unlikely"),
        (0.7, 0.68, 50, "unclear"),
        (None, 0.2, 1000, "unclear"),
    ],
)
def test_the_verdict_follows_the_gap(ceiling: float | None, control: float, samples: int, word: str) -> None:
    assert judged(ceiling, control, samples).verdict == word


def test_the_expected_gain_is_a_part_of_the_gap() -> None:
    verdict = judged(0.7, 0.4)
    assert verdict.expected_gain is not None
    least, most = verdict.expected_gain
    assert 0 < least < most == pytest.approx(CLOSED[1] * 0.3)
    assert judged(0.4, 0.7).expected_gain == (0.0, 0.0)
    assert judged(None, 0.2).expected_gain is None


def test_the_lines_have_the_numbers() -> None:
    text = "\n".join(verdict_lines(vars(judged(0.7, 0.4))))
    for part in (
        "70.0",
        "40.0",
        "3 of 60 epochs",
        "1,000 samples",
        "will the teacher help: likely",
        "took 5.0%",
        "30.0 points",
    ):
        assert part in text, text
    assert "expected gain" not in "\n".join(verdict_lines(vars(judged(None, 0.2))))


@pytest.mark.slow
def test_a_store_is_judged_and_the_report_repeats_it(tmp_path: Path, digits: dict[str, Any]) -> None:
    """Digits through a random network: extract, probe with a student, train it, report."""
    store, run = digits["store"], tmp_path / "run"

    def cli(*words: str) -> str:
        command = [sys.executable, "-m", "cli", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--image-size", "32", "--epochs", "20", "--device", "cpu"]
    result = json.loads(cli("probe", store, "--student", "timm:test_resnet", *small, "--json"))
    verdict = result["verdict"]
    assert verdict["control_epochs"] == 1
    assert verdict["ceiling"] == result["probe_top1"]
    assert verdict["verdict"] in ("likely", "unlikely", "unclear")
    assert read_measured(Path(store))["verdicts"][verdict["student"]]["text"] == verdict["text"]
    options = ["--student", "timm:test_resnet", "--out", str(run), "--workers", "0"]
    cli("train", store, *options, "--image-size", "32", "--epochs", "1", "--device", "cpu")
    page = tmp_path / "report.html"
    cli("report", str(run), "--out", str(page))
    assert f"will the teacher help: {verdict['verdict']}" in page.read_text()


@pytest.fixture
def digits(tmp_path: Path) -> dict[str, Any]:
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    from extract.config import load_config
    from extract.run import run_extraction

    data = load_digits()
    for number in range(120):
        file = tmp_path / "data" / str(data.target[number]) / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[number] * 15.9).astype(np.uint8)).resize((40, 40)).save(file)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    options = {
        "data": str(tmp_path / "data"),
        "out": tmp_path / "store.zarr",
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(tmp_path / "weights.pth"),
        "image_size": 64,
        "val_fraction": 0.3,
        "images": "jpeg",
        "workers": 0,
        "device": "cpu",
    }
    run_extraction(load_config(options))
    return {"store": str(options["out"])}
