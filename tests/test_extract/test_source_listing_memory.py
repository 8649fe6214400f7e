"""A million files stay under a gigabyte: the benchmark's own measurement, at a size that a test can afford."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_listed_file_costs_less_than_a_kilobyte() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "sources.py"
    command = [sys.executable, str(script), "--json", "--files", "50000"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["files"] == 50_000
    assert 50 < result["bytes_per_file"] < 900
    assert result["imports_mb"] < 100
    assert result["progress_calls"] >= 20
    assert abs(result["val_fraction"] - 0.1) < 0.01
