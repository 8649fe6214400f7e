"""YOLO students that learn from several teachers: a head for each level and teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from store.reader import open_store
from tests.test_train.several_teachers import add_teacher
from tests.test_train.yolo_runs import make_config, stop_after
from train.checkpoint import load_checkpoint

pytest.importorskip("ultralytics")


@pytest.fixture
def both(yolo_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(yolo_store, tmp_path / "both")
    return add_teacher(tmp_path / "both", invalid=(1,))


def names_of(store: Path) -> str:
    return "+".join(open_store(store).manifest.teacher_names)


def test_each_teacher_has_heads_and_targets_of_its_own(both: Path, tmp_path: Path) -> None:
    from train.yolo.job import build_job

    config = make_config(both, tmp_path / "run", teachers=names_of(both), distill_layers="P4,P5")
    job = build_job(config, tmp_path / "run", open_store(both), None)
    network: Any = job.student.network
    first = open_store(both).manifest.teacher.width
    assert {name: head.layers.out_features for name, head in network.distillation.heads.items()} == {
        "P4": first,
        "P5": first,
        "teacher0/P4": 20,
        "teacher0/P5": 20,
    }
    targets = job.splits["train"].targets
    assert targets is not None
    assert targets["P4"] is targets["P5"]
    assert targets["teacher0/P5"] is targets["teacher0/P4"] is not targets["P5"]
    assert targets["teacher0/P5"].pending != targets["P5"].pending
    rows = {record.row for record in job.splits["train"].records}
    assert 1 not in rows
    assert {0, 2} <= rows


@pytest.mark.slow
def test_an_interrupted_training_equals_an_uninterrupted_one(both: Path, tmp_path: Path) -> None:
    from processes.stop import Stopped, StopRequest
    from train.run import run_training

    options = {"teachers": names_of(both), "standardize": "phi-s", "epochs": 2}
    summary = run_training(make_config(both, tmp_path / "whole", **options))
    assert list(summary["store"]["teachers"]) == open_store(both).manifest.teacher_names
    stop = StopRequest()
    with pytest.raises(Stopped):
        run_training(make_config(both, tmp_path / "halved", **options), [stop_after(1, stop)], stop)
    resumed = run_training(make_config(both, tmp_path / "halved", resume=True, **options))
    assert resumed["metrics"] == summary["metrics"]
    before, after = (load_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "halved"))
    for name, value in before["model_state_dict"].items():
        assert torch.equal(value, after["model_state_dict"][name]), name
