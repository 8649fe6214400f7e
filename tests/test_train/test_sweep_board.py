"""The sweep's table shows what the folders of real runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.test_train.runs import trained
from train.run_folder import METRICS, write_json
from train.sweep.board import line, read_state
from train.sweep.config import Trial
from train.sweep.trial import OUTCOME_FILE, RUN_FOLDER, ended


def test_a_running_trial_shows_the_total_and_the_time_left(make_store: Any, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    run = trained(make_store(), folder / RUN_FOLDER, epochs=5)
    first, *_ = (run / METRICS).read_text().splitlines()
    record = {**json.loads(first), "epoch_time_s": 8.5}
    (run / METRICS).write_text(json.dumps(record) + "\n")
    write_json(folder / OUTCOME_FILE, ended("running", ""))
    state = read_state(folder, Trial("trial", {"student": "timm:test_resnet"}, False, None))
    assert (state.epoch, state.epochs, state.left_s) == (1, 5, 34.0)
    assert "running, epoch 1/5" in line(state)
    assert line(state).endswith("0:34 left")
