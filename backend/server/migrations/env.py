"""Alembic's entry point: runs the migrations on the connection that `backend.server.database.migrate` passes."""

from alembic import context

from backend.server.database import Base

connection = context.config.attributes["connection"]
# SQLite cannot alter most of a table: batch mode copies it instead.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
