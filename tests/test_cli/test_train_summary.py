"""What `cli train` prints at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from commands.train import print_summary


def test_a_run_without_a_control_is_not_called_distilled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be a control itself: `cli train --control-only`."""
    summary: dict[str, Any] = {"student": "resnet/resnet18", "epochs_done": 2, "best_epoch": 1}
    summary["metrics"] = {"top1": 0.5}
    print_summary(summary, tmp_path, as_json=False)
    assert capsys.readouterr().out.splitlines()[1].split() == ["metric", "value"]
    summary["control"] = {"metrics": {"top1": 0.25}, "difference": {"top1": 0.25}}
    print_summary(summary, tmp_path, as_json=False)
    assert capsys.readouterr().out.splitlines()[1].split() == ["metric", "distilled", "control", "difference"]
