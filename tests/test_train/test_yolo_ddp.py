"""YOLO students on several processes: ultralytics' own launcher, here with two CPU processes instead of GPUs."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from tests.test_train.yolo_runs import Listener, make_config, metrics_of
from train.errors import TrainError
from train.run import run_training

pytest.importorskip("ultralytics")


@pytest.mark.slow
def test_a_rank_reads_its_job_from_the_run_folder(yolo_run: tuple[Path, Listener]) -> None:
    from train.yolo.ddp import job_of_rank

    folder, _ = yolo_run
    before = metrics_of(folder)
    job = job_of_rank(folder)
    assert job.class_names == ("red", "green")
    assert job.arguments["epochs"] == 3
    assert job.state is not None
    assert job.state["epoch"] == 2
    assert metrics_of(folder) == before


@pytest.fixture
def on_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_training` trains on two CPU processes."""
    from tests.test_train.yolo_ranks import CpuRanksTrainer
    from train.yolo import trainer

    monkeypatch.setattr(trainer, "StoreTrainer", CpuRanksTrainer)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu_ranks")
def test_two_processes_train_report_and_resume(yolo_store: Path, tmp_path: Path) -> None:
    from train.yolo.ddp import STORE_ADDRESS

    out = tmp_path / "out"
    options: dict[str, Any] = {"epochs": 2, "workers": 0}
    run_training(make_config(yolo_store, out, **{**options, "epochs": 1}))
    listener = Listener()
    summary = run_training(make_config(yolo_store, out, resume=True, **options), [listener])
    assert STORE_ADDRESS not in os.environ
    records = metrics_of(out)
    assert [record["epoch"] for record in records] == [1, 2]
    assert all(record["feature_loss"] > 0 for record in records)
    assert listener.epochs == records[1:]
    assert ("last.pt", 2) in {saved[:2] for saved in listener.saved}
    assert listener.summary == summary
    assert summary["epochs_done"] == 2
    assert summary["exported"]["map50"] is not None
    with open(out / "ultralytics" / "results.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert (out / "ultralytics" / "best.pt").exists()
    assert not list(out.glob(".events*"))


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu_ranks")
def test_a_failing_process_is_one_clear_error(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL_RANK", "1")
    with pytest.raises(TrainError, match=r"DDP launcher failed \(exit code 1\): its own error stands above"):
        run_training(make_config(yolo_store, tmp_path / "out"))
