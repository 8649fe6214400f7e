"""A database's password given as a URL parameter is in nothing that an extraction writes or prints."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from console.output import Formatter, get_logger
from extract.result import resume_command
from extract.sources.base import SourceError
from extract.sources.detect import open_source
from store.reader import open_store
from tests.test_extract.extractions import extract
from tests.test_extract.source_datasets import picture, png

SECRET = "s3cr3t"
QUERY = "SELECT name AS key, image, label FROM photos"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """An SQLite file by its URI; SQLite ignores parameters that it does not know."""
    with sqlite3.connect(tmp_path / "data.sqlite") as connection:
        connection.execute("CREATE TABLE photos (name TEXT, image BLOB, label TEXT)")
        rows = [(f"{n}", png(picture(n, 40, 40)), "ab"[n % 2]) for n in range(12)]
        connection.executemany("INSERT INTO photos VALUES (?, ?, ?)", rows)
    connection.close()
    return f"sqlite:///file:{tmp_path / 'data.sqlite'}?uri=true&user=u&password={SECRET}"


def test_nothing_that_an_extraction_writes_holds_the_password(
    url: str, extract_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    get_logger("extract").parent.propagate = True  # type: ignore[union-attr]
    options = {**extract_options, "data": url, "source_options": {"query": QUERY}}
    assert extract(options).rows == 12
    store = open_store(extract_options["out"])
    assert store.manifest.data_root is not None
    assert "password=***" in store.manifest.data_root
    for file in Path(extract_options["out"]).rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    shown = [Formatter("%(message)s").format(record) for record in caplog.records]
    assert not [line for line in shown if SECRET in line]


def test_errors_and_commands_hold_no_password(url: str, extract_options: dict[str, Any]) -> None:
    from extract.config import load_config

    with pytest.raises(SourceError, match=r"password=\*\*\*") as raised:
        open_source(url, query="SELECT nothing FROM nowhere")
    assert SECRET not in str(raised.value)
    with pytest.raises(SourceError) as raised:
        open_source(f"postgresql://127.0.0.1:1/db?user=u&password={SECRET}", query=QUERY)
    assert SECRET not in str(raised.value)
    command = resume_command(load_config({**extract_options, "data": url}))
    assert SECRET not in command
    assert "password=***" in command
