"""A real server with real training processes: what a platform's user does, and what happens around a restart."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from backend.server.errors import ServerError
from backend.server.main import listening_socket, only_server
from backend.server.settings import Settings
from tests.test_server.conftest import TOKEN
from tests.test_server.server_process import ServerProcess, wait_until

Serve = Callable[..., ServerProcess]
LONG = {"totalEpochs": 400}


@pytest.mark.slow
def test_a_task_from_the_form_to_the_result(serve: Serve) -> None:
    """With a token, which the training process presents and nothing prints."""
    server = serve(QWEN_DISTILL_TOKEN=TOKEN)
    assert server.http.get("/tasks").status_code == 401
    server.http.headers["Authorization"] = f"Bearer {TOKEN}"
    task_id = server.run(taskId="first", taskName="--花 first", datasetId="花 two")
    failing = server.run(taskId="failing", datasetId="empty")
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
    failed = server.wait_final(failing)
    assert failed["state"] == "FAILED"
    assert "no image" in failed["errorMessage"]
    assert f"error: {failed['errorMessage']}" in server.log_of(failing)
    assert TOKEN not in server.log_of(task_id) + server.log.read_text()


@pytest.mark.slow
def test_kill_9_of_the_server(serve: Serve) -> None:
    """The training continues. The next server finds it and the waiting task, stops it, and resumes it."""
    server = serve()
    task_id, second = server.run(**LONG), server.run()
    server.wait_log(task_id, "epoch")
    assert server.get(f"/tasks/{second}")["queuePosition"] == 1
    server.end(signal.SIGKILL)
    (process,) = training_processes(task_id)
    server.start()
    assert training_processes(task_id) == [process]
    assert [server.state(name) for name in (task_id, second)] == ["RUNNING", "QUEUED"]
    epochs = len(server.get(f"/tasks/{task_id}/history"))
    wait_until(lambda: len(server.get(f"/tasks/{task_id}/history")) > epochs, 60)
    server.post(f"/tasks/{task_id}/stop")
    assert server.wait_final(task_id, 15)["state"] == "STOPPED"
    assert training_processes(task_id) == []
    # The second one's training ends while no server runs.
    server.wait_log(second, "training")
    server.end(signal.SIGKILL)
    wait_until(
        lambda: training_processes(second) == [],
        100,
        lambda: (server.root / "output" / second / "task.log").read_text(),
    )
    server.start()
    done = server.wait_final(second, 10)
    assert (done["state"], done["exitCode"], done["errorMessage"]) == ("COMPLETED", None, None)
    assert [point["epoch"] for point in server.get(f"/tasks/{second}/history")] == [1, 2]
    assert len(server.get(f"/tasks/{second}/evaluations")) == 1
    server.post(f"/tasks/{task_id}/start")
    server.wait_log(task_id, "resuming it")


@pytest.mark.slow
def test_queue_and_a_process_that_does_not_stop(serve: Serve) -> None:
    server = serve("--jobs", "1")
    first, second, third = server.run(**LONG), server.run(**LONG), server.run()
    server.wait_log(first, "student")
    assert [server.get(f"/tasks/{name}")["queuePosition"] for name in (first, second, third)] == [None, 1, 2]
    assert server.post(f"/tasks/{third}/stop")["state"] == "CREATED"
    (process,) = training_processes(first)
    process.suspend()  # as one that hangs: SIGTERM has no effect
    started = time.monotonic()
    server.post(f"/tasks/{first}/stop")
    assert server.wait_final(first, 20)["state"] == "STOPPED"
    assert 4.5 < time.monotonic() - started < 10
    wait_until(lambda: server.state(second) == "RUNNING", 10)
    (process,) = training_processes(second)
    process.kill()
    failed = server.wait_final(second, 20)
    assert (failed["state"], failed["exitCode"]) == ("FAILED", -9)
    assert server.http.delete(f"/tasks/{second}", params={"files": True}).status_code == 200
    assert not (server.root / "output" / second).exists()


@pytest.mark.slow
def test_an_ordinary_end_of_the_server(serve: Serve) -> None:
    """Clients that follow events do not hold it up."""
    server = serve()
    server.create(taskId="a")
    with server.http.stream("GET", "/events") as events:
        assert next(events.iter_lines()) == "event: task"
        started = time.monotonic()
        server.end()
        assert time.monotonic() - started < 10
    assert server.process is not None
    assert server.process.returncode == 0
    text = server.log.read_text()
    assert "Traceback" not in text
    assert "the server has ended; tasks that run continue" in text


def test_one_server_for_an_output_root_and_a_port(settings: Settings) -> None:
    root, twice = (
        settings.output_root,
        pytest.raises(ServerError, match="another server uses it: choose another"),
    )
    with only_server(root), twice, only_server(root):
        pass
    taken = pytest.raises(ServerError, match="choose another --port")
    with listening_socket(settings), taken, listening_socket(settings):
        pass


def training_processes(task_id: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter()
        if f"--task_id={task_id}" in cmdline(process)
        and cmdline(process)[1].endswith("train_qwen_vl_distillation.py")
    ]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
