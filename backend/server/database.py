"""The tables, as SQLAlchemy models, and the engine; migrations bring any database to them at the server's start.

`md_training_task` is the platform's table: the columns of docs/md_training_task.sql, and what a task needs beyond.
Times are UTC. Accuracies are percent, losses and fractions plain numbers, as in the calls that report them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from backend.server.errors import ServerError
from console.output import HIDDEN, redact, secrets_of

# The drivers of the extras `mysql` and `postgresql`.
DRIVERS = {
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}
MIGRATIONS = Path(__file__).with_name("migrations")
SQLITE_PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000")
MYSQL = ("mysql", "mariadb")


class UtcTime(sa.TypeDecorator[datetime]):
    """A time with its zone in Python, UTC without one in the database; microseconds everywhere."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(mysql.DATETIME(fsp=6) if dialect.name in MYSQL else sa.DateTime())

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


# Ids differ when they are spelled differently, also in MySQL, whose texts ignore case and accents.
IdText = sa.String(64).with_variant(mysql.VARCHAR(64, collation="utf8mb4_bin"), *MYSQL)
# MySQL's TEXT ends at 64 KB.
LongText = sa.Text().with_variant(mysql.MEDIUMTEXT(), *MYSQL)
BigKey = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up INTEGER keys alone
TABLE_OPTIONS = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4", "mysql_engine": "InnoDB"}


class TaskState(StrEnum):
    """Where a task stands. LOST: its process ended without reporting how, or cannot be found any more."""

    CREATED = "CREATED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    LOST = "LOST"


class Base(DeclarativeBase):
    type_annotation_map = {datetime: UtcTime(), float: sa.Double()}  # noqa: RUF012  SQLAlchemy's own name


class Task(Base):
    """One training task: what was asked for, and where it stands."""

    __tablename__ = "md_training_task"
    __table_args__ = (TABLE_OPTIONS,)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    task_id: Mapped[str] = mapped_column(IdText, unique=True)
    task_name: Mapped[str] = mapped_column(sa.String(200))
    # What the task is; None: not given, so the recipe of the student or the default decides.
    teacher_model: Mapped[str | None] = mapped_column(sa.String(200))
    teacher_path: Mapped[str | None] = mapped_column(sa.String(500))
    student_model: Mapped[str] = mapped_column(sa.String(200))
    student_model_type: Mapped[str | None] = mapped_column(sa.String(50))
    student_model_size: Mapped[str | None] = mapped_column(sa.String(50))
    student_path: Mapped[str | None] = mapped_column(sa.String(500))
    # The defaults are for rows that others insert; None from here is kept.
    task_type: Mapped[str | None] = mapped_column(
        sa.String(50).evaluates_none(), server_default="classification"
    )
    num_classes: Mapped[int | None] = mapped_column(sa.Integer().evaluates_none(), server_default="10")
    dataset_id: Mapped[str] = mapped_column(sa.String(200))
    val_dataset_id: Mapped[str | None] = mapped_column(sa.String(200))
    total_epochs: Mapped[int | None]
    batch_size: Mapped[int | None]
    learning_rate: Mapped[float | None]
    temperature: Mapped[float | None]
    alpha: Mapped[float | None]
    lora_rank: Mapped[int | None]
    lora_alpha: Mapped[float | None]
    lora_dropout: Mapped[float | None]
    gpu_devices: Mapped[str | None] = mapped_column(sa.String(100))
    training_config: Mapped[str | None] = mapped_column(LongText)
    # Roots at the time of the first start: a task resumes where it began, whatever the server's roots are now.
    datasets_root: Mapped[str] = mapped_column(sa.String(1000))
    models_root: Mapped[str] = mapped_column(sa.String(1000))
    output_dir: Mapped[str] = mapped_column(sa.String(1000))
    # Where it stands.
    state: Mapped[str] = mapped_column(sa.String(20), index=True)
    planned_epochs: Mapped[int | None]
    current_epoch: Mapped[int | None]
    train_loss: Mapped[float | None]
    val_loss: Mapped[float | None]
    accuracy: Mapped[float | None]
    best_accuracy: Mapped[float | None]
    epoch_seconds: Mapped[float | None]
    message: Mapped[str | None] = mapped_column(sa.String(1000))
    model_path: Mapped[str | None] = mapped_column(sa.String(1000))
    model_url: Mapped[str | None] = mapped_column(sa.String(3000))
    error_message: Mapped[str | None] = mapped_column(sa.String(1000))
    # How the last call of the process said that it ended (complete, error); the exit code decides where there is one.
    reported_end: Mapped[str | None] = mapped_column(sa.String(20))
    exit_code: Mapped[int | None]
    # Its process: `local` with process id and start time, or a `dask` future of the task's id and attempt.
    runner: Mapped[str | None] = mapped_column(sa.String(20))
    attempt: Mapped[int] = mapped_column(default=0)
    devices: Mapped[str | None] = mapped_column(sa.String(100))
    process_id: Mapped[int | None]
    process_started: Mapped[float | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class History(Base):
    """One epoch of a task."""

    __tablename__ = "md_training_history"
    __table_args__ = (sa.UniqueConstraint("task_key", "epoch", name="uq_history_epoch"), TABLE_OPTIONS)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    task_key: Mapped[int] = mapped_column(BigKey, sa.ForeignKey("md_training_task.id", ondelete="CASCADE"))
    epoch: Mapped[int]
    train_loss: Mapped[float | None]
    train_accuracy: Mapped[float | None]
    val_loss: Mapped[float | None]
    val_accuracy: Mapped[float | None]
    distill_loss: Mapped[float | None]
    hard_loss: Mapped[float | None]
    soft_loss: Mapped[float | None]
    gpu_usage: Mapped[float | None]
    memory_usage: Mapped[float | None]
    epoch_time: Mapped[float | None]
    created_at: Mapped[datetime]


class Evaluation(Base):
    """The final metrics of a task, once per run that reached its end."""

    __tablename__ = "md_training_evaluation"
    __table_args__ = (TABLE_OPTIONS,)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    task_key: Mapped[int] = mapped_column(
        BigKey, sa.ForeignKey("md_training_task.id", ondelete="CASCADE"), index=True
    )
    precision: Mapped[float | None] = mapped_column("precision_value")  # PRECISION is a keyword of SQL
    recall: Mapped[float | None]
    f1_score: Mapped[float | None]
    map50: Mapped[float | None]
    map95: Mapped[float | None]
    eval_dataset_id: Mapped[str | None] = mapped_column(sa.String(200))
    eval_dataset_name: Mapped[str | None] = mapped_column(sa.String(200))
    eval_sample_count: Mapped[int | None]
    detailed_results: Mapped[str | None] = mapped_column(LongText)
    created_at: Mapped[datetime]


# -- the database ------------------------------------------------------------------------------------------


def open_database(url: str) -> sa.Engine:
    """An engine whose database has the tables of this version, made or migrated now.

    Raises:
        ServerError: when the database cannot be reached, is newer, or has tables of that name from elsewhere.
    """
    with database_errors(url):
        engine = create_engine(url)
        try:
            migrate(engine)
        except BaseException:
            engine.dispose()
            raise
        return engine


def create_engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    driver = DRIVERS.get(parsed.drivername)
    if driver:
        parsed = parsed.set(drivername=driver)
    dialect = parsed.get_backend_name()
    if dialect not in ("sqlite", "postgresql", *MYSQL):
        raise ServerError(f"--database-url: expected sqlite, mysql, mariadb or postgresql, got {dialect}")
    if dialect in MYSQL and "charset" not in parsed.query:
        parsed = parsed.update_query_dict({"charset": "utf8mb4"})
    if dialect == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ServerError("--database-url: SQLite needs a file: sqlite:///tasks.sqlite")
    engine = sa.create_engine(parsed, pool_pre_ping=True, pool_recycle=1800)
    if dialect == "sqlite":
        sa.event.listen(engine, "connect", set_pragmas)
    return engine


def set_pragmas(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    for pragma in SQLITE_PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def migrate(engine: sa.Engine) -> None:
    """Bring the database to this version's tables (`alembic upgrade head`).

    Raises:
        ServerError: when it is of a newer version, or holds a table of that name that no server made.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        current = set(MigrationContext.configure(connection).get_current_heads())
        if current - known:
            raise ServerError(
                f"the database is of a newer version ({', '.join(sorted(current))}): update qwen-distill"
            )
        if not current and sa.inspect(connection).has_table(Task.__tablename__):
            raise ServerError(
                f"the database has a table {Task.__tablename__} that is not this server's: name another database"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """SQLAlchemy's exceptions as a ServerError of one line, without the URL's password."""
    try:
        yield
    except sa.exc.ArgumentError:
        raise ServerError("--database-url: expected dialect://user:password@host/database") from None
    except (sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
        extra = "mysql" if "mysql" in url or "mariadb" in url else "postgresql"
        raise ServerError(
            f"--database-url: no driver ({error}): pip install 'qwen-distill[{extra}]'"
        ) from None
    except sa.exc.SQLAlchemyError as error:
        text = " ".join(str(getattr(error, "orig", None) or error).split())
        for secret in secrets_of(url):
            text = text.replace(secret, HIDDEN)
        raise ServerError(f"--database-url {redact(url)}: {redact(text)}"[:500]) from None
