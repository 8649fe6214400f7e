"""A real MariaDB: the SQL file for the platform's table, and a training on a data set that lives in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from tests.test_backend.platform_process import ROOT, plain_environment, run_platform
from tests.test_backend.platform_server import PlatformServer
from tests.test_backend.test_platform_families import QUERY, fill_table
from tests.test_extract.database_servers import PASSWORD, mariadb

pytestmark = pytest.mark.slow

EXPECTED = {
    "student_model_type": ("varchar(50)", None),
    "student_model_size": ("varchar(50)", None),
    "task_type": ("varchar(50)", "'classification'"),
    "num_classes": ("int(11)", "10"),
}


@pytest.fixture(scope="module")
def database() -> Iterator[sa.URL]:
    with mariadb() as url:
        yield url


@pytest.fixture
def connection(database: sa.URL) -> Iterator[sa.Connection]:
    engine = sa.create_engine(database.set(drivername="mysql+pymysql"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def run_file(connection: sa.Connection, path: Path) -> None:
    """The statements of a file, as the mysql client cuts them: at a semicolon that ends a line."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("--")]
    for statement in "\n".join(lines).split(";\n"):
        if statement.strip():
            connection.exec_driver_sql(statement)


def columns(connection: sa.Connection) -> dict[str, tuple[str, str | None]]:
    found = connection.execute(
        sa.text(
            "SELECT column_name, column_type, column_default FROM information_schema.columns "
            "WHERE table_schema = DATABASE() AND table_name = 'md_training_task'"
        )
    )
    return {name: (kind, None if default == "NULL" else default) for name, kind, default in found}


@pytest.mark.parametrize("existing", ["", ", task_type VARCHAR(80) DEFAULT 'detection'"])
def test_the_sql_file_adds_what_is_missing_as_often_as_it_is_run(
    connection: sa.Connection, existing: str
) -> None:
    connection.exec_driver_sql("DROP TABLE IF EXISTS md_training_task")
    connection.exec_driver_sql(
        f"CREATE TABLE md_training_task (id BIGINT PRIMARY KEY, task_name VARCHAR(100){existing})"
    )
    for _ in range(2):
        run_file(connection, ROOT / "docs" / "md_training_task.sql")
        expected = {**EXPECTED, **({"task_type": ("varchar(80)", "'detection'")} if existing else {})}
        assert {name: value for name, value in columns(connection).items() if name in EXPECTED} == expected


def test_a_data_set_in_mariadb_by_the_yaml(
    connection: sa.Connection,
    database: sa.URL,
    words: Callable[..., list[str]],
    platform: PlatformServer,
    tmp_path: Path,
) -> None:
    """The operator's YAML maps the id to a query; the password comes from the environment and stays there."""
    connection.exec_driver_sql("DROP TABLE IF EXISTS image")
    connection.exec_driver_sql(
        "CREATE TABLE image (id INT PRIMARY KEY, dataset INT, content MEDIUMBLOB, class_name VARCHAR(50))"
    )
    fill_table(lambda text, row: connection.exec_driver_sql(text, row), "%s")
    connection.commit()
    url = (
        database.set(password="PLACE")
        .render_as_string(hide_password=False)
        .replace("PLACE", "${DB_PASSWORD}")
    )
    config = tmp_path / "application-distillation.yml"
    config.write_text(
        f'distillation:\n  datasets:\n    url: {url}\n    sql:\n      "9":\n        query: >\n          {QUERY}\n'
    )
    environment = plain_environment(DB_PASSWORD=quote(PASSWORD, safe=""))
    options: dict[str, Any] = {"dataset_id": 9, "platform_config": config, "epochs": 1, "batch_size": 4}
    ended = run_platform(words(platform, **options, val_fraction=0.3), environment=environment)
    assert ended.code == 0, ended.text
    assert "sql data set" in ended.text
    assert 0 < platform.of("evaluations")[0].body["evalSampleCount"] < 32
    written = "".join(
        path.read_text("utf-8", errors="replace")
        for path in (tmp_path / "out").rglob("*.json*")
        if path.is_file()
    )
    for secret in (PASSWORD, quote(PASSWORD, safe="")):
        assert secret not in ended.text + written
