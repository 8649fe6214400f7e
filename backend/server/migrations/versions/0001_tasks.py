"""Tasks, their history and their evaluations."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MYSQL = ("mysql", "mariadb")
OPTIONS: dict[str, Any] = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4", "mysql_engine": "InnoDB"}


def time() -> sa.types.TypeEngine[Any]:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), *MYSQL)


def long_text() -> sa.types.TypeEngine[Any]:
    return sa.Text().with_variant(mysql.MEDIUMTEXT(), *MYSQL)


def key() -> sa.types.TypeEngine[Any]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def text(name: str, length: int, **rest: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), **rest)


def numbers(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Double()) for name in names]


def task_key(**rest: Any) -> sa.Column[Any]:
    reference = sa.ForeignKey("md_training_task.id", ondelete="CASCADE")
    return sa.Column("task_key", key(), reference, nullable=False, **rest)


def upgrade() -> None:
    op.create_table(
        "md_training_task",
        sa.Column("id", key(), primary_key=True),
        sa.Column(
            "task_id",
            sa.String(64).with_variant(mysql.VARCHAR(64, collation="utf8mb4_bin"), *MYSQL),
            unique=True,
            nullable=False,
        ),
        text("task_name", 200, nullable=False),
        text("teacher_model", 200),
        text("teacher_path", 500),
        text("student_model", 200, nullable=False),
        text("student_model_type", 50),
        text("student_model_size", 50),
        text("student_path", 500),
        text("task_type", 50, server_default="classification"),
        sa.Column("num_classes", sa.Integer(), server_default="10"),
        text("dataset_id", 200, nullable=False),
        text("val_dataset_id", 200),
        sa.Column("total_epochs", sa.Integer()),
        sa.Column("batch_size", sa.Integer()),
        *numbers("learning_rate", "temperature", "alpha"),
        sa.Column("lora_rank", sa.Integer()),
        *numbers("lora_alpha", "lora_dropout"),
        text("gpu_devices", 100),
        sa.Column("training_config", long_text()),
        text("datasets_root", 1000, nullable=False),
        text("models_root", 1000, nullable=False),
        text("output_dir", 1000, nullable=False),
        text("state", 20, nullable=False, index=True),
        sa.Column("planned_epochs", sa.Integer()),
        sa.Column("current_epoch", sa.Integer()),
        *numbers("train_loss", "val_loss", "accuracy", "best_accuracy", "epoch_seconds"),
        text("message", 1000),
        text("model_path", 1000),
        text("model_url", 3000),
        text("error_message", 1000),
        text("reported_end", 20),
        sa.Column("exit_code", sa.Integer()),
        text("runner", 20),
        sa.Column("attempt", sa.Integer(), nullable=False),
        text("devices", 100),
        sa.Column("process_id", sa.Integer()),
        sa.Column("process_started", sa.Double()),
        sa.Column("created_at", time(), nullable=False),
        sa.Column("updated_at", time(), nullable=False),
        *(sa.Column(name, time()) for name in ("queued_at", "started_at", "ended_at")),
        **OPTIONS,
    )
    op.create_table(
        "md_training_history",
        sa.Column("id", key(), primary_key=True),
        task_key(),
        sa.Column("epoch", sa.Integer(), nullable=False),
        *numbers("train_loss", "train_accuracy", "val_loss", "val_accuracy"),
        *numbers("distill_loss", "hard_loss", "soft_loss"),
        *numbers("gpu_usage", "memory_usage", "epoch_time"),
        sa.Column("created_at", time(), nullable=False),
        sa.UniqueConstraint("task_key", "epoch", name="uq_history_epoch"),
        **OPTIONS,
    )
    op.create_table(
        "md_training_evaluation",
        sa.Column("id", key(), primary_key=True),
        task_key(index=True),
        *numbers("precision_value", "recall", "f1_score", "map50", "map95"),
        text("eval_dataset_id", 200),
        text("eval_dataset_name", 200),
        sa.Column("eval_sample_count", sa.Integer()),
        sa.Column("detailed_results", long_text()),
        sa.Column("created_at", time(), nullable=False),
        **OPTIONS,
    )


def downgrade() -> None:
    for table in ("md_training_evaluation", "md_training_history", "md_training_task"):
        op.drop_table(table)
