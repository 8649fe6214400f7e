"""Options of an extraction: read from files and the command line, checked together, before anything heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from extract.config import ConfigError, load_config, parse_max_bad, parse_shard_range
from extract.plan import decode_workers
from extract.result import resume_command


def test_all_problems_come_in_one_report_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"data": "a", "imgae_size": 3, "grid": -1, "device": "tpu", "max_bad": "lots"})
    text = str(error.value)
    for part in (
        "unknown option imgae_size: did you mean image_size",
        "--out: missing",
        "grid: must be auto, native, 0",
        "device: must be auto, cpu, cuda",
        "max_bad: must be a share like 1% or a count like 20 (got lots)",
    ):
        assert part in text
    assert "\n" not in text
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".yaml", "image-size: 448\nresize: letterbox\n"),
        (".toml", "image_size = 448\nresize = 'letterbox'\n"),
    ],
)
def test_a_file_and_options_make_the_same_object_and_options_win(
    tmp_path: Path, suffix: str, content: str
) -> None:
    file = tmp_path / f"options{suffix}"
    file.write_text(content)
    config = load_config({"data": "d", "out": "s", "resize": "squash", "grid": None}, file)
    assert (config.image_size, config.resize, config.grid) == (448, "squash", "auto")
    assert config == load_config({"data": "d", "out": "s", "image_size": 448})


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.yaml", "- 1\n", "expected `name: value` lines"),
        ("a.toml", "image_size = \n", "a.toml:"),
        ("missing.yaml", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str | None, text: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_config({}, tmp_path / name)


@pytest.mark.parametrize(("text", "allowed"), [("1%", 3), ("0", 0), ("20", 20), ("100%", 300), ("0.5%", 1)])
def test_max_bad_is_a_share_or_a_count(text: str, allowed: int) -> None:
    assert load_config({"data": "d", "out": "s", "max_bad": text}).allowed_bad(300) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"), [("1%", 1), ("0.1%", 1), ("0%", 0), ("0", 0), ("7", 7), ("10%", 2)]
)
def test_a_share_allows_one_bad_image_however_few_there_are(text: str, allowed: int) -> None:
    assert load_config({"data": "d", "out": "s", "max_bad": text}).allowed_bad(20) == allowed


@pytest.mark.parametrize("text", ["-1", "101%", "x%", "1.5", ""])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a share"):
        parse_max_bad(text)


@pytest.mark.parametrize(
    ("text", "shards"), [("0:8", (0, 8)), ("3:", (3, None)), ("5", (5, 6)), (":2", (0, 2))]
)
def test_shard_ranges(text: str, shards: tuple[int, int | None]) -> None:
    assert parse_shard_range(text) == shards


@pytest.mark.parametrize("text", ["4:2", "a:b", "1:x", "-1:2"])
def test_wrong_shard_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="first < end"):
        parse_shard_range(text)


def test_shard_range_and_scheduler_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config({"data": "d", "out": "s", "shard_range": "0:2", "scheduler": "tcp://a:1"})


def test_a_shard_range_takes_one_device() -> None:
    """The processes of several devices share all shards; the range would be ignored."""
    with pytest.raises(ConfigError, match="shard_range takes one device, not cuda:0,cuda:1"):
        load_config({"data": "d", "out": "s", "shard_range": "0:2", "device": "cuda:0,cuda:1"})


def test_the_resume_command_is_the_command_that_was_given() -> None:
    given: dict[str, Any] = {
        "data": "my photos",
        "out": Path("s.zarr"),
        "image_size": "448",
        "split": ["val=b", "train=a"],
        "source_options": ["query=select 1"],
        "exact_preprocessing": True,
        "overwrite": True,
    }
    command = resume_command(load_config(given))
    assert command == (
        "cli extract 'my photos' --out s.zarr --split val=b --split train=a "
        "--source-option 'query=select 1' --image-size 448 --exact-preprocessing"
    )
    assert "--overwrite" not in command  # that would delete what it is to go on with


def test_the_resume_command_holds_no_password() -> None:
    url = "postgresql://reader:s3cret@db:5432/pictures"
    command = resume_command(load_config({"data": url, "out": Path("s.zarr")}))
    assert command == "cli extract 'postgresql://reader:***@db:5432/pictures' --out s.zarr"


def test_a_pair_without_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match="split: expected NAME=VALUE, got val"):
        load_config({"data": "d", "out": "s", "split": ["val"]})


@pytest.mark.parametrize(
    ("cores", "share", "workers"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (8, 1, 7), (16, 1, 13), (16, 2, 6), (64, 1, 16), (4, 8, 1)],
)
def test_decoders_leave_cores_to_the_other_threads(
    monkeypatch: pytest.MonkeyPatch, cores: int, share: int, workers: int
) -> None:
    monkeypatch.setattr("extract.plan.core_share", lambda: cores)
    assert decode_workers(load_config({"data": "d", "out": "o"}), share) == workers
    assert decode_workers(load_config({"data": "d", "out": "o", "workers": 7}), share) == 7
