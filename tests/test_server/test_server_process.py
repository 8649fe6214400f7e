"""A real server with real training processes: what a platform's user does, and what happens around a restart."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.test_server.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
LONG = {"totalEpochs": 400}


@pytest.mark.slow
def test_a_task_from_the_form_to_the_result(serve: Serve) -> None:
    server = serve()
    task_id = server.run(taskId="first", taskName="花 first", datasetId="花 two")
    done = server.wait_final(task_id)
    assert (done["state"], done["exitCode"], done["progress"]) == ("COMPLETED", 0, 100.0), server.log_of(
        task_id
    )
    assert done["errorMessage"] is None
    assert (done["currentEpoch"], done["plannedEpochs"]) == (2, 2)
    assert [point["epoch"] for point in server.get(f"/tasks/{task_id}/history")] == [1, 2]
    (evaluation,) = server.get(f"/tasks/{task_id}/evaluations")
    assert evaluation["evalSampleCount"] == 8
    assert json.loads(evaluation["detailedResults"])["student"] == "resnet/resnet18"
    files = {file["name"] for file in server.get(f"/tasks/{task_id}/files")}
    assert {"best_model.pt", "metrics.jsonl", "summary.json", "task.log"} <= files
    assert done["modelPath"].endswith("best_model.pt")
    weights = server.http.get(f"/tasks/{task_id}/files/best_model.pt")
    assert weights.content[:2] == b"PK"


@pytest.mark.slow
def test_stop_resume_and_kill_of_the_server(serve: Serve) -> None:
    """The training survives kill -9 of its server; the next server finds it, and its stop and its end as well."""
    server = serve()
    task_id = server.run(**LONG)
    server.wait_log(task_id, "epoch")
    assert server.process is not None
    server.end(signal.SIGKILL)
    (process,) = training_processes(task_id)
    server.start()
    assert process.is_running()
    assert server.state(task_id) == "RUNNING"
    server.post(f"/tasks/{task_id}/stop")
    stopped = server.wait_final(task_id, 15)
    assert stopped["state"] == "STOPPED"
    assert training_processes(task_id) == []
    epochs = len(server.get(f"/tasks/{task_id}/history"))
    assert epochs > 0
    server.post(f"/tasks/{task_id}/start")
    server.wait_log(task_id, "resuming it")


def training_processes(task_id: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter()
        if any(word.endswith("train_qwen_vl_distillation.py") for word in cmdline(process))
        and f"--task_id={task_id}" in cmdline(process)
    ]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
