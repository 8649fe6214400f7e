"""What `make` says before it installs anything."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_machine.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_machine", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_gets_far_enough_to_be_told() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 4))


def test_everything_that_is_missing_is_said_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(sys, "argv", ["check_machine.py", str(tmp_path / "yet" / "to make" / "venv")])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2e9))
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert script.main() == 1
    version, disk, venv = capsys.readouterr().err.splitlines()
    assert version.startswith("error: Python 3.9 is too old: qwen-distill needs 3.11 or newer")
    assert disk.startswith(f"error: only 2.0 GB free in {tmp_path}: the environment needs about 9 GB")
    assert venv.startswith("error: Python's venv module is missing")


def test_a_fit_machine_is_silent(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_machine.py", str(tmp_path / "venv")])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2e10))
    assert script.main() == 0
    assert capsys.readouterr().err == ""
