"""The tables in real SQLite, MariaDB and PostgreSQL: made by migrations, equal to the models, same behavior."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from backend.server.database import Base, Task, TaskState, create_engine, open_database
from backend.server.errors import ConflictError, ServerError
from backend.server.schemas import EvaluationResult, HistoryPoint, NewTask, Progress
from backend.server.settings import Settings
from backend.server.tasks import TaskFilter, Tasks
from tests.test_extract.database_servers import mariadb, postgresql
from tests.test_server.server_process import ServerProcess

SERVERS = ("mariadb", "postgresql")
FIELDS: dict[str, Any] = {"teacher_model": "tiny", "student_model": "resnet18", "dataset_id": "花 two"}


@contextmanager
def database(name: str, folder: Path) -> Iterator[str]:
    if name == "sqlite":
        yield f"sqlite:///{folder / 'tasks.sqlite'}"
        return
    with mariadb() if name == "mariadb" else postgresql() as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", *(pytest.param(name, marks=pytest.mark.slow) for name in SERVERS)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


def test_tables_and_tasks(url: str, settings: Settings, folders: Path) -> None:
    """One test for all: starting a database server takes seconds."""
    engine = open_database(url)
    try:
        check_migration(engine)
        check_tasks(Tasks(engine, replace(settings, database_url=url)))
        if not url.startswith("sqlite"):  # the other tests of server processes use that
            check_server_process(url, folders)
        check_reopening(url)
    finally:
        engine.dispose()  # a database server waits for its clients to leave


def check_migration(engine: sa.Engine) -> None:
    """The migrations make what the models say; the platform's columns have the defaults of its SQL file."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    columns = {column["name"]: column for column in sa.inspect(engine).get_columns(Task.__tablename__)}
    assert "classification" in str(columns["task_type"]["default"])
    assert "10" in str(columns["num_classes"]["default"])


def check_tasks(tasks: Tasks) -> None:
    config = {"optimizer": "sgd", "learningRate": 1.0e-4, "z": 1, "a": "花 🌸" * 4_000}
    made = tasks.create(NewTask(task_id="a", task_name="花 🌸", training_config=config, **FIELDS))
    assert made.training_config == config
    assert list(made.training_config) == list(config)  # in the order that the user typed
    assert abs(made.created_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert (made.task_type, made.num_classes) == (None, None)
    assert tasks.read("a") == made
    tasks.create(NewTask(task_id="A", learning_rate=1.23456789012e-7, **FIELDS))
    assert tasks.read("A").learning_rate == 1.23456789012e-7
    with pytest.raises(ConflictError):
        tasks.create(NewTask(task_id="a", **FIELDS))
    assert [task.task_id for task in tasks.search(TaskFilter(text="🌸")).items] == ["a"]
    assert [task.task_id for task in tasks.search().items] == ["A", "a"]
    for name in ("A", "a"):
        tasks.start(name)
    assert [task.task_id for task in tasks.waiting()] == ["A", "a"]
    begun = tasks.begin("a", "local", "cpu")
    assert begun is not None
    tasks.set_process("a", 123, 1_700_000_000.12)
    (running,) = tasks.in_states(TaskState.RUNNING)
    assert (running.process_id, running.process_started) == (123, 1_700_000_000.12)
    for epoch in (2, 1, 2):
        tasks.report_progress("a", epoch, 66.666667, 0.1, Progress(message="花\0" * 900))
        tasks.report_history("a", HistoryPoint(epoch=epoch, val_accuracy=66.666667, memory_usage=1e12))
    assert [point.val_accuracy for point in tasks.history("a")] == [66.666667, 66.666667]
    details = '{"a": "\ud800\0花"}'
    tasks.report_evaluation("a", EvaluationResult(precision=1 / 3, detailed_results=details))
    tasks.report_evaluation("a", EvaluationResult(precision=1 / 3, detailed_results=details))
    (found,) = tasks.evaluations("a")
    assert (found.precision, found.detailed_results) == (1 / 3, '{"a": "\\ud800\\u0000花"}')
    tasks.report_end("a", "error", "花" * 500)
    tasks.finish("a", 1)
    assert (tasks.read("a").state, tasks.read("a").error_message) == (TaskState.FAILED, "花" * 500)
    tasks.delete("a")
    assert [task.task_id for task in tasks.read_all()] == ["A"]


def check_server_process(url: str, folders: Path) -> None:
    """`cli serve` on this database: a training reports, the server is started again, everything is there."""
    server = ServerProcess(folders, QWEN_DISTILL_DATABASE_URL=url).start()
    try:
        fields = {
            "taskName": "花 🌸",
            "studentModel": "resnet18",
            "teacherModel": "tiny",
            "datasetId": "flowers",
        }
        task_id = server.post("/tasks", fields)["taskId"]
        server.put(f"/tasks/{task_id}/progress", {"totalEpochs": 2}, currentEpoch=1, accuracy=50.5)
        server.post(f"/tasks/{task_id}/history", {"epoch": 1, "valAccuracy": 50.5})
        server.put(f"/tasks/{task_id}/error", errorMessage="no more 花")
        before = server.get(f"/tasks/{task_id}")
        server.end()
        server.start()
        assert server.get(f"/tasks/{task_id}") == before
        assert (before["state"], before["bestAccuracy"], before["taskName"]) == ("FAILED", 50.5, "花 🌸")
        assert server.get(f"/tasks/{task_id}/history")[0]["valAccuracy"] == 50.5
        assert server.get("/tasks", text="🌸", state="FAILED")["total"] == 1
        server.http.delete(f"/tasks/{task_id}")
    finally:
        server.close()
    assert "s3cret" not in server.log.read_text()


def check_reopening(url: str) -> None:
    """A second start changes nothing; a database of a newer version, or with a foreign table, is refused."""
    engine = open_database(url)
    with engine.begin() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM md_training_task")) == 1
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ServerError, match="newer version"):
        open_database(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE alembic_version"))
    with pytest.raises(ServerError, match="that is not this server's"):
        open_database(url)
    engine.dispose()


def test_a_wrong_password_is_not_repeated(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ServerError) as caught:
        open_database("mysql://reader:s3cret@127.0.0.1:1/pictures")
    assert "s3cret" not in str(caught.value)
    assert "mysql://reader:***@127.0.0.1:1/pictures" in str(caught.value)


def test_every_connection_of_sqlite_has_the_same_settings(tmp_path: Path) -> None:
    """WAL, and foreign keys, which SQLite leaves off."""
    engine = create_engine(f"sqlite:///{tmp_path / 'x.sqlite'}")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA foreign_keys")) == 1
    engine.dispose()
