"""YOLO students on several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_train.yolo_runs import (
    Listener,
    metrics_of,
)

pytest.importorskip("ultralytics")


def test_a_rank_reads_its_job_from_the_run_folder(yolo_run: tuple[Path, Listener]) -> None:
    """What can be checked of the DDP path without GPUs: the launcher's processes know what to do."""
    from train.engine.yolo.ddp import job_of_rank

    folder, _ = yolo_run
    before = metrics_of(folder)
    job = job_of_rank(folder)
    assert job.class_names == ("red", "green")
    assert job.arguments["epochs"] == 3
    assert job.state is not None
    assert job.state["epoch"] == 2
    assert metrics_of(folder) == before
