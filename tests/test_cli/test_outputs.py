"""What cannot be written is found before anything else happens: no teacher, run or store is looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from files.writing import OutputError, check_writable
from store.errors import StoreError

MISSING = Path("no such input")


def extract(out: Path) -> None:
    from extract.config import load_config
    from extract.run import run_extraction

    run_extraction(load_config({"data": str(MISSING), "out": out, "teacher_path": str(MISSING)}))


def predict(out: Path) -> None:
    from train.deliver.predict import predict_files

    predict_files(MISSING, [str(MISSING)], out=out)


def export(out: Path) -> None:
    from train.deliver.export import export_student

    export_student(MISSING, "onnx", out)


def quantize(out: Path) -> None:
    from train.deliver.quantize import QuantizeOptions, quantize_student

    quantize_student(MISSING, str(MISSING), out, QuantizeOptions())


def sweep(out: Path) -> None:
    from train.sweep.config import load_sweep_config
    from train.sweep.driver import run_sweep

    run_sweep(load_sweep_config({"store": str(MISSING), "out": out, "students": "resnet18"}, None))


def report(out: Path) -> None:
    from train.report.build import build_report

    build_report([MISSING], out, 0)


@pytest.mark.parametrize("command", [extract, predict, export, quantize, sweep, report])
@pytest.mark.parametrize("place", ["below a file", "/proc/nothing"])
def test_outputs_are_checked_first(tmp_path: Path, command: Callable[[Path], None], place: str) -> None:
    """Every input is missing too, and would be the error otherwise."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.html" if place == "below a file" else Path(place) / "out.html"
    if not Path("/proc/self").exists() and place != "below a file":
        pytest.skip("/proc is Linux's")
    with pytest.raises(OutputError, match=r"--out .*out\.html: .*; choose another place"):
        command(out)


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_store_is_not_put_over_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file", tmp_path / "folder" / "file"):
        place.write_text("")
    with pytest.raises(StoreError, match=r"is a file; a store is a folder|exists and is not empty"):
        extract(tmp_path / name)


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "new", tmp_path / "new" / "deep" / "file.onnx"):
        check_writable(place, "--out")
    assert list(tmp_path.iterdir()) == []


def test_quantize_looks_for_torchao_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from commands.deliver import quantize as command
    from train.errors import DeliveryError

    monkeypatch.setattr("train.deliver.packages.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "train.deliver.quantize", raising=False)
    with pytest.raises(DeliveryError, match="quantizing needs torchao: pip install torchao"):
        command(MISSING, str(MISSING))
    assert "train.deliver.quantize" not in sys.modules
