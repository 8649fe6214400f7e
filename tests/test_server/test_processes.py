"""Processes that end at once, and processes that a restarted server looks for: real ones, without a training."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from backend.server.command import command_line
from backend.server.database import Task, TaskState, create_engine
from backend.server.schemas import NewTask
from backend.server.settings import Settings
from backend.server.tasks import Tasks
from tests.test_server.conftest import LiveServer
from tests.test_server.server_process import wait_until

FIELDS: dict[str, Any] = {"teacher_model": "tiny", "student_model": "resnet18", "dataset_id": "flowers"}


@pytest.fixture
def serve_after(settings: Settings) -> Iterator[Callable[[Callable[[Tasks], None]], LiveServer]]:
    """`serve_after(prepare)`: a server that starts when `prepare` has done what an earlier one would have."""
    servers = []

    def start(prepare: Callable[[Tasks], None]) -> LiveServer:
        servers.append(LiveServer(settings, prepare))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_task_that_the_training_process_refuses(
    serve_after: Callable[..., LiveServer], settings: Settings
) -> None:
    def prepare(tasks: Tasks) -> None:
        tasks.create(NewTask(task_id="a", **FIELDS))
        tasks.start("a")
        (settings.datasets_root / "flowers" / "train").rmdir()
        (settings.datasets_root / "flowers").rmdir()

    server = serve_after(prepare)
    wait_until(lambda: server.tasks.read("a").state == TaskState.FAILED, 30)
    task = server.tasks.read("a")
    assert (task.exit_code, task.attempt, task.devices) == (2, 1, "cpu")
    assert "--dataset_id: no data set at" in (task.error_message or "")
    log = (settings.output_root / "a" / "task.log").read_text()
    assert log.startswith("== attempt 1, ")
    assert f"error: {task.error_message}" in log


def was_running(tasks: Tasks, task_id: str, **values: Any) -> None:
    """What the table says when a server was killed while it ran a task."""
    tasks.create(NewTask(task_id=task_id, gpu_devices="cpu", **FIELDS))
    tasks.start(task_id)
    assert tasks.begin(task_id, "local", "cpu") is not None
    with Session(tasks.engine) as session, session.begin():
        task = session.query(Task).filter_by(task_id=task_id).one()
        for name, value in values.items():
            setattr(task, name, value)


def test_processes_that_are_gone_are_lost(serve_after: Callable[..., LiveServer]) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()

    def prepare(tasks: Tasks) -> None:
        was_running(tasks, "gone", process_id=ended.pid, process_started=1_700_000_000.0)
        was_running(tasks, "reused", process_id=os.getpid(), process_started=1_700_000_000.0)
        was_running(tasks, "unknown")
        was_running(tasks, "stopping", state=TaskState.STOPPING)
        was_running(tasks, "elsewhere", runner="dask")
        was_running(tasks, "done", reported_end="complete")

    tasks = serve_after(prepare).tasks
    wait_until(lambda: not tasks.in_states(TaskState.RUNNING, TaskState.STOPPING), 10)
    lost = [tasks.read(name) for name in ("gone", "reused", "unknown", "elsewhere")]
    assert {task.state for task in lost} == {TaskState.LOST}
    assert "left no result: start it again" in (lost[0].error_message or "")
    assert [tasks.read(name).state for name in ("stopping", "done")] == ["STOPPED", "COMPLETED"]
    assert psutil.pid_exists(os.getpid())


def test_a_process_that_was_started_just_before_the_server_was_killed(
    serve_after: Callable[..., LiveServer],
) -> None:
    """Its id is not in the table yet: it is found by its command line, and not started twice."""
    started: list[subprocess.Popen[bytes]] = []

    def prepare(tasks: Tasks) -> None:
        was_running(tasks, "a")
        (task,) = tasks.in_states(TaskState.RUNNING)
        started.append(subprocess.Popen(command_line(tasks.words_of(task))))
        started[0].send_signal(19)  # SIGSTOP: it stays as it is

    server = serve_after(prepare)
    try:
        time.sleep(1)
        assert server.tasks.read("a").state == TaskState.RUNNING
        server.http.post("/tasks/a/stop")
        started[0].kill()
        started[0].wait()
        wait_until(lambda: server.tasks.read("a").state == TaskState.STOPPED, 10)
    finally:
        started[0].kill()


def test_a_database_that_fails_for_a_while(live: LiveServer) -> None:
    """Requests get a 500, which training processes repeat; the queue continues when it is back."""
    tasks, http = live.tasks, live.http
    tasks.create(NewTask(task_id="a", **FIELDS))
    engine = create_engine(live.settings.database)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE md_training_task RENAME TO away"))
    answer = http.put("/tasks/a/progress", params={"currentEpoch": 1})
    assert (answer.status_code, answer.json()["code"]) == (500, 500)
    assert "away" not in answer.text
    assert "no such table" not in answer.text
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("qwen_distill.server").addHandler(handler)
    tasks.wake()
    wait_until(lambda: any("cannot go on, trying again" in record.getMessage() for record in records), 10)
    logging.getLogger("qwen_distill.server").removeHandler(handler)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO md_training_task"))
    engine.dispose()
    tasks.start("a")
    (live.settings.datasets_root / "flowers").rename(live.settings.datasets_root / "other")
    wait_until(lambda: tasks.read("a").exit_code == 2, 30)
