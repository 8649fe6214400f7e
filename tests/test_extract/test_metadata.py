"""The record of an extraction's time: kept up to date while it runs, added up over interruptions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from extract.result import read_measured
from extract.run import ExtractionClock


def test_an_extraction_that_was_killed_and_resumed_counts_in_full(tmp_path: Path) -> None:
    killed = ExtractionClock(tmp_path, every_s=0.0)
    for done in (0, 40, 80):
        killed.progress(done, 100, "encoding")
        time.sleep(0.01)
    first = read_measured(tmp_path)
    assert first["encoded"] == 80
    with ExtractionClock(tmp_path, every_s=60.0) as resumed:
        for done in (64, 80, 100):  # what was not committed is encoded again
            resumed.progress(done, 100, "encoding")
            resumed.progress(1, 3, "scoring")
            time.sleep(0.01)
    second = read_measured(tmp_path)
    assert second["encoded"] == 116
    assert second["extraction_s"] >= first["extraction_s"] + 0.02


def test_images_that_came_later_are_another_job(tmp_path: Path) -> None:
    with ExtractionClock(tmp_path) as clock:
        for done, total in ((0, 10), (10, 10), (0, 4), (4, 4)):
            clock.progress(done, total, "encoding")
    assert read_measured(tmp_path)["encoded"] == 14


def test_nothing_to_encode_leaves_no_record(tmp_path: Path) -> None:
    with ExtractionClock(tmp_path) as clock:
        clock.progress(10, 10, "encoding")
    assert read_measured(tmp_path) == {}


def test_an_error_of_the_extraction_is_the_one_that_is_raised(tmp_path: Path) -> None:
    (tmp_path / "gone").write_text("a file where the store was")

    def extract() -> None:
        with ExtractionClock(tmp_path / "gone") as clock:
            clock.progress(0, 10, "encoding")
            clock.progress(5, 10, "encoding")
            raise ValueError("the extraction's own")

    with pytest.raises(ValueError, match="the extraction's own"):
        extract()
