"""What a data set that has changed looks like on the command line: a dry run, the result, `cli verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from commands import store as commands
from commands.extract import print_estimate, print_result
from extract.plan import DifferentStore
from tests.test_extract.extractions import files_of, interrupt
from tests.test_extract.source_datasets import WRITERS, picture, save
from tests.test_extract.test_run_follow import Follower


@pytest.fixture
def follower(extract_options: dict[str, Any], tmp_path: Path) -> Follower:
    return Follower(extract_options, WRITERS["folder"](tmp_path / "data"))


def change(root: Path) -> None:
    """One of each: corrected class, removed, renamed, copied, other bytes, new, new class."""
    (root / "train/bird/0.png").rename(root / "train/dog/0.png")
    (root / "train/cat/1.png").unlink()
    shutil.copy(root / "train/dog/2.png", root / "val/dog/copy.png")
    save(root / "train/bird/3.png", picture(71))
    save(root / "train/zebra/new.png", picture(72))


def verify(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(commands.verify)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_dry_run_says_what_would_change_and_changes_nothing(
    follower: Follower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follower.extract()
    before = files_of(follower.options["out"])
    change(tmp_path / "data")
    result = follower.extract(dry_run=True)
    expected = {"unchanged": 8, "relabeled": 0, "renamed": 1, "copied": 1, "moved": 0, "removed": 1}
    assert result.changes == {**expected, "changed": 1, "new": 1, "encode": 2}
    assert result.estimate is not None
    assert result.estimate["to_encode"] == 2
    assert result.estimate["needed_bytes"] > 0
    assert files_of(follower.options["out"]) == before
    print_estimate(result.as_dict())
    shown = capsys.readouterr().out
    assert "the data set has changed since the store was made: 1 renamed, 1 copied, 1 removed" in shown
    assert "class names: 1 added (zebra)" in shown
    assert "to encode: 2 images, the others are in the store" in shown
    assert follower.extract().encoded == 2
    assert follower.extract(dry_run=True).estimate["to_encode"] == 0  # type: ignore[index]


def test_a_dry_run_of_an_incomplete_store_counts_what_is_left(follower: Follower) -> None:
    interrupt({**follower.options, "batch_size": 2}, rows=4)
    estimate = follower.extract(dry_run=True).estimate
    assert estimate is not None
    assert 0 < estimate["to_encode"] < 11


def test_a_dry_run_refuses_other_options_as_the_run_would(follower: Follower) -> None:
    follower.extract()
    with pytest.raises(DifferentStore, match="image_size is 64, asked for 32"):
        follower.extract(dry_run=True, image_size=32)


def test_the_result_says_what_was_followed(
    follower: Follower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follower.extract()
    change(tmp_path / "data")
    print_result(follower.extract().as_dict())
    shown = capsys.readouterr().out
    assert "encoded 2 images" in shown
    assert "followed the data set: 1 renamed, 1 copied, 1 removed, 1 changed, 1 new; class names:" in shown


class TestVerify:
    def test_a_store_that_is_its_data_set_passes(self, follower: Follower) -> None:
        follower.extract()
        result = verify(follower.options["out"], "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["data"] == {"compared": True, "skipped": None}

    def test_one_that_is_not_is_a_finding(self, follower: Follower, tmp_path: Path) -> None:
        follower.extract()
        change(tmp_path / "data")
        result = verify(follower.options["out"])
        assert result.exit_code == 1
        assert "has changed since: 1 renamed" in result.stdout
        assert "the command that made the store, run again, follows it" in result.stdout
        follower.extract()
        assert verify(follower.options["out"]).exit_code == 0

    def test_a_data_set_that_is_gone_is_no_finding(self, follower: Follower, tmp_path: Path) -> None:
        follower.extract()
        (tmp_path / "data").rename(tmp_path / "moved")
        result = verify(follower.options["out"])
        assert result.exit_code == 0
        assert "the data set was not compared: " in result.stdout
        assert "does not exist" in result.stdout
        change(tmp_path / "moved")
        assert verify(follower.options["out"], "--data", tmp_path / "moved").exit_code == 1

    def test_every_file_is_read_when_asked_for(self, follower: Follower, tmp_path: Path) -> None:
        import os

        file = tmp_path / "data/train/bird/0.png"
        follower.extract()
        status, data = file.stat(), bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert verify(follower.options["out"]).exit_code == 0
        result = verify(follower.options["out"], "--check-content")
        assert "has changed since: 1 changed" in result.stdout

    def test_a_validation_split_that_was_cut_is_cut_again(
        self, extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path
    ) -> None:
        from tests.test_extract.extractions import extract

        shutil.copytree(digit_folder, tmp_path / "digits")
        options = {**extract_options, "data": str(tmp_path / "digits"), "val_fraction": 0.3}
        extract(options)
        assert verify(options["out"]).exit_code == 0
        next(iter(sorted((tmp_path / "digits").rglob("*.png")))).unlink()
        assert "has changed since: 1 removed" in verify(options["out"]).stdout
