"""SQL: a query that gives one row per image, from any database that SQLAlchemy supports.

Columns of the query, by name: `key` (or `id`), `image` (or `path`, `file_name`, `blob`): a path below `image_root` or
the encoded bytes; optional `label`, `annotation` (JSON, see `parse_annotation`), `split`. Keys are texts or numbers.

Rows are listed once, streamed through a server-side cursor and without the blobs. A blob is fetched when its sample is
read, by key, together with the next few: `key` should be indexed. The query is only ever read, as a sub-query.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from console.output import HIDDEN, redact, secrets_of
from extract.sources.annotations import Labels, parse_annotation
from extract.sources.base import AnnotationError, Sample, Samples, Source, SourceError
from extract.sources.listing import PROGRESS_EVERY, Progress, make_key, resolve_inside
from extract.sources.table import Rows, split_of, table_source
from imaging.decode import ImageError

if TYPE_CHECKING:
    import sqlalchemy as sa

KEY_COLUMNS = ("key", "sample_key", "id")
IMAGE_COLUMNS = ("image", "path", "image_path", "file_name", "filename", "blob", "bytes")
FETCH_ROWS = 1_000  # rows the server-side cursor sends at a time
# Blobs fetched together. Few, because neighboring samples may be decoded by different processes, each of which
# fetches the whole block.
BLOB_ROWS = 4

# The drivers of the extras `mysql` and `postgresql`.
DRIVERS = {
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}
INSTALL = {"mysql": "pymysql", "mariadb": "pymysql", "postgres": "'psycopg[binary]'"}
OTHER_DRIVERS = "see SQLAlchemy's list of databases and drivers, https://docs.sqlalchemy.org/dialects"


@dataclass(frozen=True)
class Query:
    """A query and which of its columns mean what; `key` and `image` are always there."""

    url: str
    text: str
    columns: tuple[tuple[str, str], ...]

    @property
    def roles(self) -> dict[str, str]:
        return dict(self.columns)


@dataclass(frozen=True, slots=True)
class SqlBlob:
    """The bytes of one row; `block` are the database's keys of the rows to fetch with it."""

    query: Query
    key: Any
    block: tuple[Any, ...]

    def read(self) -> bytes:
        blobs = _blobs(os.getpid())
        if (self.query, self.key) not in blobs:
            blobs.clear()  # one block at a time stays in memory
            blobs.update(fetch_blobs(self.query, self.block))
        try:
            value = blobs.pop((self.query, self.key))
        except KeyError:
            raise ImageError("the row is no longer in the database") from None
        if not isinstance(value, bytes) or not value:
            raise ImageError("no image bytes in this row")
        return value


class BlobSamples(Samples):
    """Rows whose images are blobs; everything else is as in a table."""

    def __init__(self, table: Samples, query: Query, keys: list[Any]) -> None:
        super().__init__(table.keys)
        self.table, self.query, self.database_keys = table, query, keys

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return self.table.target_kinds(rows)

    def build(self, index: int) -> Sample:
        sample = self.table.build(index)
        start = index - index % BLOB_ROWS
        block = tuple(self.database_keys[start : start + BLOB_ROWS])
        blob = SqlBlob(self.query, self.database_keys[index], block)
        return Sample(sample.key, blob, label=sample.label, boxes=sample.boxes)


def open_sql(
    path: str,
    *,
    query: str | None = None,
    image_root: str | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open the rows of `query` in the database at the URL `path`.

    `image_root`: the folder that image paths start from. Raises SourceError, never with a password in its text.
    """
    if not query or not query.strip():
        raise SourceError("source sql needs a query: --source-option query='SELECT key, image, label FROM …'")
    # A colon before a name would be a parameter to SQLAlchemy.
    text = re.sub(r"(?<![:\w\\]):(?=\w)", r"\\:", query.strip().rstrip(";"))
    with database_errors(path):
        roles, stored = inspect_query(path, text)
        plan = Query(path, text, tuple(sorted(roles.items())))
        if not stored and image_root is None:
            raise SourceError(f"query gives image paths in {roles['image']!r}: pass image_root=FOLDER")
        root, names, where = Path(os.path.abspath(image_root or ".")), Labels(class_names), redact(path)
        splits, keys = read_splits(plan, stored, root, names, progress)
        if not splits:
            raise SourceError(f"{where}: the query gives no rows")
        source = table_source("sql", where, names.finish(where), root, splits, names)
        if stored:
            blobs = {split: BlobSamples(table, plan, keys[split]) for split, table in source.splits.items()}
            source = replace(source, splits=blobs)
        return source


def read_splits(
    query: Query, stored: bool, root: Path, names: Labels, progress: Progress | None
) -> tuple[dict[str, Rows], dict[str, list[Any]]]:
    """The rows of each split in the order of their keys, and the keys as the database has them."""
    roles = query.roles
    splits: dict[str, Rows] = {}
    keys: dict[str, list[Any]] = {}
    for number, record in enumerate(stream_rows(query, stored), start=1):
        if record[roles["key"]] is None:
            raise AnnotationError(f"query row {number}: the key is NULL")
        key = make_key(str(record[roles["key"]]))
        where = f"query row {key!r}"
        split = split_of(record.get(roles.get("split", "")), where)
        keys.setdefault(split, []).append(record[roles["key"]])
        image = "" if stored else path_of(record[roles["image"]], root, where)
        label, boxes, classes = parse_annotation(record.get(roles.get("annotation", "")), names, where)
        own = record.get(roles.get("label", ""))
        label = label if own is None else names.add(own, where)
        splits.setdefault(split, Rows()).add(key, image, label, boxes, classes)
        if progress is not None and number % PROGRESS_EVERY == 0:
            progress(number)
    if progress is not None:
        progress(sum(len(rows.keys) for rows in splits.values()))
    for split, rows in splits.items():
        order = rows.sort()
        keys[split] = [keys[split][row] for row in order]
    return splits, keys


def path_of(value: Any, root: Path, where: str) -> str:
    if not isinstance(value, str):
        raise AnnotationError(f"{where}: the image is {value!r}, expected a path")
    return resolve_inside(root, value, where).relative_to(root).as_posix()


def inspect_query(url: str, text: str) -> tuple[dict[str, str], bool]:
    """Role → column of the query, and whether images are blobs. Raises SourceError."""
    import sqlalchemy as sa

    with connect(url) as connection:
        columns = list(connection.execute(sa.text(f"SELECT * FROM ({text}) AS q WHERE 1 = 0")).keys())
    wanted = {
        "key": KEY_COLUMNS,
        "image": IMAGE_COLUMNS,
        "label": ("label",),
        "annotation": ("annotation",),
        "split": ("split",),
    }
    roles = {
        role: next(name for name in names if name in columns)
        for role, names in wanted.items()
        if any(name in columns for name in names)
    }
    for role in ("key", "image"):
        if role not in roles:
            raise SourceError(
                f"the query gives the columns {', '.join(columns)}: expected one named {' or '.join(wanted[role])}"
            )
    image: Any = sa.column(roles["image"])
    statement = sa.select(image).select_from(sa.text(f"({text}) AS q")).where(image.is_not(None)).limit(1)
    with connect(url) as connection:
        return roles, isinstance(connection.execute(statement).scalar(), bytes | memoryview)


def stream_rows(query: Query, stored: bool) -> Iterator[Mapping[str, Any]]:
    """Every row without its blob, through a server-side cursor."""
    import sqlalchemy as sa

    columns: list[Any] = [sa.column(name) for role, name in query.columns if role != "image" or not stored]
    statement = sa.select(*columns).select_from(sa.text(f"({query.text}) AS q"))
    with connect(query.url) as connection:
        options = connection.execution_options(stream_results=True, yield_per=FETCH_ROWS)
        for row in options.execute(statement).mappings():
            yield dict(row)


def fetch_blobs(query: Query, keys: Sequence[Any]) -> dict[tuple[Query, Any], bytes]:
    """The blobs of some rows. Raises SourceError when the database fails: that is no fault of the image."""
    import sqlalchemy as sa

    key: Any = sa.column(query.roles["key"])
    image: Any = sa.column(query.roles["image"])
    statement = sa.select(key, image).select_from(sa.text(f"({query.text}) AS q")).where(key.in_(list(keys)))
    with database_errors(query.url), connect(query.url) as connection:
        rows = connection.execute(statement).all()
    return {(query, row[0]): bytes(row[1]) if row[1] is not None else b"" for row in rows}


def connect(url: str) -> sa.Connection:
    return _engine(url, os.getpid()).connect()


class database_errors:
    """Turns SQLAlchemy's exceptions into a SourceError of one line that names the database, not its password."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import sqlalchemy as sa

        if isinstance(error, sa.exc.NoSuchModuleError | ModuleNotFoundError):
            name = self.url.split("://", 1)[0]
            hint = next((f"pip install {INSTALL[d]}" for d in INSTALL if name.startswith(d)), OTHER_DRIVERS)
            raise SourceError(f"no driver for {name}: {hint}") from None
        if isinstance(error, sa.exc.SQLAlchemyError):
            cause = getattr(error, "orig", None) or error
            text = " ".join(str(cause).split())
            raise SourceError(f"{redact(self.url)}: {self._without_secrets(text)}"[:500]) from None

    def _without_secrets(self, text: str) -> str:
        import sqlalchemy as sa

        try:
            sa.make_url(self.url)
        except sa.exc.ArgumentError:
            return "the URL is not one: expected dialect://user:password@host/database"
        for secret in secrets_of(self.url):
            text = text.replace(secret, HIDDEN)
        return redact(text)


@lru_cache(maxsize=4)
def _engine(url: str, process: int) -> sa.Engine:
    """The engine of this process: connections do not survive a fork."""
    import sqlalchemy as sa

    parsed = sa.make_url(url)
    if parsed.drivername in DRIVERS:
        parsed = parsed.set(drivername=DRIVERS[parsed.drivername])
    return sa.create_engine(parsed, pool_pre_ping=True)


@lru_cache(maxsize=1)
def _blobs(process: int) -> dict[tuple[Query, Any], bytes]:
    return {}
