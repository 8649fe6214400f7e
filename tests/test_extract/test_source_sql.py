"""The sql source against SQLite, and against real MariaDB and PostgreSQL servers where they are installed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from extract.sources import sql as sql_source
from extract.sources.base import AnnotationError, SourceError
from extract.sources.detect import open_source
from imaging.decode import ImageError, decode_image
from tests.test_extract.database_servers import PASSWORD, mariadb, postgresql
from tests.test_extract.source_datasets import picture, png, save, sql_rows, sql_truth

SERVERS = {"mariadb": mariadb, "postgresql": postgresql}
# The cursors of both drivers that leave the rows on the server.
CURSORS = {"mariadb": "SSCursor", "postgresql": "ServerCursor"}


def fill(url: sa.URL) -> None:
    """The conformance suite's rows, in reverse order, under a table whose name needs no quotes."""
    table = sa.Table(
        "photos",
        sa.MetaData(),
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("picture", sa.LargeBinary(1 << 20)),
        sa.Column("label", sa.String(20)),
        sa.Column("objects", sa.JSON()),
        sa.Column("part", sa.String(10)),
    )
    engine = sa.create_engine(url)
    table.drop(engine, checkfirst=True)
    table.create(engine)
    with engine.begin() as connection:
        for name, image, label, annotation, split in reversed(sql_rows()):
            objects = json.loads(annotation)
            connection.execute(
                table.insert().values(name=name, picture=image, label=label, objects=objects, part=split)
            )
    engine.dispose()


def select(quote: str) -> str:
    columns = f"name AS {quote}key{quote}, picture AS image, label, objects AS annotation, part AS split"
    return f"SELECT {columns} FROM photos WHERE label <> ':none' AND label NOT LIKE '100%'"


@pytest.fixture(scope="module", params=sorted(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, str]]:
    """(name, URL with its password, quote) of a running server with the rows in it."""
    with SERVERS[request.param]() as url:
        driver = sql_source.DRIVERS[url.drivername]
        fill(url.set(drivername=driver))
        yield request.param, url.render_as_string(hide_password=False), "`" if "mysql" in driver else '"'


@pytest.mark.slow
def test_server_gives_keys_pictures_and_targets(server: tuple[str, str, str]) -> None:
    _, url, quote = server
    source = open_source(url, query=select(quote))
    assert source.kind == "sql"
    assert {name: list(part.keys) for name, part in source.splits.items()} == {
        name: sorted(truth) for name, truth in sql_truth().items()
    }
    for split, samples in source.splits.items():
        for sample in samples:
            truth = sql_truth()[split][sample.key]
            assert sample.read() == png(truth.pixels)
            assert source.class_names[sample.label or 0] == truth.label
            boxes = sample.read_boxes((24, 16))
            assert boxes is not None
            assert truth.boxes is not None
            assert [tuple(box) for box in boxes.values.tolist()] == [box for box, _ in truth.boxes]


@pytest.mark.slow
def test_server_keeps_the_rows_and_sends_no_blob_while_listing(server: tuple[str, str, str]) -> None:
    name, url, quote = server
    seen: list[tuple[str, str]] = []
    engine = sql_source._engine(url, os.getpid())

    def note(connection, cursor, statement, *rest):  # type: ignore[no-untyped-def]
        seen.append((type(cursor).__name__, statement))

    sa.event.listen(engine, "before_cursor_execute", note)
    open_source(url, query=select(quote))
    sa.event.remove(engine, "before_cursor_execute", note)
    columns, first, rows = (text for _, text in seen if "FROM (SELECT" in text)
    assert columns.endswith("WHERE 1 = 0")
    assert "LIMIT" in first
    assert "image" not in rows.split("FROM (")[0]
    assert {text: kind for kind, text in seen}[rows] == CURSORS[name]


@pytest.mark.slow
def test_server_errors_hide_the_password(server: tuple[str, str, str]) -> None:
    _, url, _ = server
    with pytest.raises(SourceError, match="nowhere") as caught:
        open_source(url, query="SELECT a FROM nowhere")
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert PASSWORD not in open_source(url, query=select(server[2])).root


def sqlite(folder: Path, rows: list[tuple[object, object, object]]) -> str:
    """A table `t` with columns key, image, label."""
    url = f"sqlite:///{folder / 'data.sqlite'}"
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (key, image, label)")
        for row in rows:
            connection.exec_driver_sql("INSERT INTO t VALUES (?, ?, ?)", row)
    engine.dispose()
    return url


QUERY = "SELECT key, image, label FROM t"


def test_image_paths_start_at_image_root(tmp_path: Path) -> None:
    save(tmp_path / "pictures/a.png", picture(1))
    url = sqlite(tmp_path, [(7, "a.png", 2), (8, "gone.png", None)])
    source = open_source(url, query=QUERY, image_root=str(tmp_path / "pictures"), val_fraction=0)
    first, second = source.splits["train"]
    assert (first.key, first.label, second.label) == ("7", 2, None)
    assert source.class_names == ("0", "1", "2")
    assert decode_image(first.read()).size == (24, 16)
    with pytest.raises(ImageError, match="No such file"):
        second.read()


def test_paths_may_not_leave_image_root(tmp_path: Path) -> None:
    url = sqlite(tmp_path, [(7, "../../etc/passwd", 2)])
    with pytest.raises(SourceError, match="is outside the data set's root"):
        open_source(url, query=QUERY, image_root=str(tmp_path))


def test_blobs_are_fetched_by_blocks_and_odd_ones_are_bad_images(tmp_path: Path) -> None:
    rows: list[tuple[object, object, object]] = [(n, png(picture(n)), "x") for n in range(100, 140)]
    rows = [(99, None, "x"), *rows, (201, b"", "x")]  # the first one must not decide what all are
    url = sqlite(tmp_path, rows)
    samples = open_source(url, query=QUERY, val_fraction=0).splits["train"]
    statements: list[str] = []
    engine = sql_source._engine(url, os.getpid())
    sa.event.listen(engine, "before_cursor_execute", lambda *details: statements.append(details[2]))
    by_key = {sample.key: sample for sample in samples}
    assert [by_key[str(n)].read() for n in range(100, 140)] == [png(picture(n)) for n in range(100, 140)]
    assert len(statements) == 40 // sql_source.BLOB_ROWS
    for bad in ("99", "201"):
        with pytest.raises(ImageError, match="no image bytes"):
            by_key[bad].read()
    assert by_key["105"].read() == png(picture(105))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(None, b"x", 1)], "the key is NULL"),
        ([("a", b"x", 1), ("a", b"y", 1)], "keys occur more than once"),
        ([("a", b"x", -3)], "query row 'a': label -3 is negative"),
        ([("a", b"x", "cat"), ("b", b"x", 1)], "partly names .'cat'. and partly numbers"),
        ([], "the query gives no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[tuple[object, object, object]], message: str) -> None:
    url = sqlite(tmp_path, rows)
    with pytest.raises(SourceError, match=message):
        open_source(url, query=QUERY, image_root=str(tmp_path))


def test_bad_annotation_names_the_row(tmp_path: Path) -> None:
    url = sqlite(tmp_path, [("a", b"x", '[{"box": [5, 5, 1, 9], "class": 0}]')])
    with pytest.raises(AnnotationError, match=r"query row 'a': box \[5, 5, 1, 9\] ends before it begins"):
        open_source(url, query="SELECT key, image, label AS annotation FROM t")


@pytest.mark.parametrize(
    ("url", "query", "message"),
    [
        ("sqlite:////nowhere/x.sqlite", QUERY, "unable to open database file"),
        ("nonsense://x", QUERY, "no driver for nonsense: see SQLAlchemy"),
        ("sqlite://", None, "needs a query"),
        ("sqlite://", "SELECT 1 AS a", "the query gives the columns a: expected one named key"),
    ],
)
def test_what_is_missing_is_said(url: str, query: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(url, query=query)


@pytest.mark.parametrize(("url", "driver"), [("mariadb://h/d", "pymysql"), ("postgres://h/d", "psycopg")])
def test_a_missing_driver_is_named(url: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(SourceError, match=f"no driver for {url.split(':')[0]}: pip install '?{driver}"):
        open_source(url, query=QUERY)


def test_split_column_is_used(tmp_path: Path) -> None:
    url = sqlite(
        tmp_path, [(number, png(picture(number)), "valid" if number < 3 else "train") for number in range(9)]
    )
    source = open_source(url, query="SELECT key, image, label AS split FROM t")
    assert {name: len(part) for name, part in source.splits.items()} == {"val": 3, "train": 6}
