"""The command line as a whole: fast start, readable errors, the table of commands."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from processes.stop import Stopped
from train.errors import ConfigError
from train.students.families import parse_student_name

ROOT = Path(__file__).parents[2]


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def imported_modules(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = imported_modules(*arguments)
    assert "typer" in modules
    assert not modules & {
        "torch",
        "zarr",
        "transformers",
        "timm",
        "ultralytics",
        "dask",
        "sklearn",
        "pandas",
        "fastapi",
        "sqlalchemy",
    }


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_that_starts_with_an_example(name: str) -> None:
    done = run_cli(name, "--help")
    assert done.returncode == 0, done.stderr
    example = next(text for text in first_paragraphs(done.stdout) if not text.startswith("Usage:"))
    assert example.startswith(f"cli {name}"), example


def first_paragraphs(text: str) -> list[str]:
    """Blocks of text between blank lines, each on one line."""
    blocks = re.split(r"\n\s*\n", text.strip())
    return [" ".join(block.split()) for block in blocks]


def test_version() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (
        0,
        f"qwen-distill {importlib.metadata.version('qwen-distill')}\n",
    )


def test_overview_shows_the_stages_in_order() -> None:
    done = run_cli()
    assert done.returncode == 0, done.stderr
    overview = done.stdout
    assert overview.index("Stage one") < overview.index("Stage two")
    for name in cli.COMMANDS:
        assert name in overview


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["trian"], "unknown command 'trian': did you mean train?", "(cli --help)"),
        (["train"], "STORE: missing; --student: missing; --out: missing", ""),
        (
            ["train", "a", "--lr", "1e-3"],
            "No such option: --lr: did you mean --learning-rate or --lora-rank?",
            "(cli train --help)",
        ),
        (["probe", "a", "--batchsize", "3"], "No such option: --batchsize", "(cli probe --help)"),
        (
            ["sweep", "a", "--out", "b", "--epochs", "2"],
            "--epochs is an option of cli train: pass it as --set epochs=2",
            "",
        ),
        (
            ["sweep", "a", "--out", "b", "--student", "x"],
            "No such option: --student: did you mean --students",
            "",
        ),
        (["sweep", "a", "b", "--out", "c"], "unexpected argument 'b' after the store", "(cli sweep --help)"),
    ],
)
def test_a_misused_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, hint: str
) -> None:
    done = run_cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith(hint)


def test_students_takes_names_and_lists_their_recipes() -> None:
    done = run_cli("students", "timm:resnet10t", "vit-tiny")
    assert done.returncode == 0, done.stderr
    assert "timm:resnet10t" in done.stdout
    assert "5.4 M" in done.stdout
    assert "224 px, adamw 5e-05, batch 64, hybrid" in done.stdout


def test_an_error_is_one_line_without_traceback(tmp_path: Path) -> None:
    done = run_cli("inspect", str(tmp_path / "nothing.zarr"))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nothing.zarr" in line


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: No space left on device: free some space, then",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x/a"),
            1,
            "error: /x/a: Read-only file system: choose another folder",
        ),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (Stopped("stopped in epoch 2", 130), 130, "stopped in epoch 2"),
    ],
)
def test_what_the_system_does_is_one_line(
    raised: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(path: str) -> None:
        raise raised

    monkeypatch.setattr("store.summary.describe_store", refuse)
    monkeypatch.setattr("sys.argv", ["cli", "inspect", "a.zarr"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == code
    assert line.startswith(text)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_cli("inspect", str(tmp_path / "nothing.zarr"), "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_shows_types_and_the_recipes_defaults() -> None:
    """Defaults stand in square brackets, which rich would otherwise take for markup and drop."""
    environment = {**os.environ, "COLUMNS": "300"}
    shown = {
        name: subprocess.run(
            [sys.executable, "-m", "cli", name, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        ).stdout
        for name in ("train", "extract")
    }
    for line in (
        r"--learning-rate +<float> +Peak learning rate\. \[default: the student's recipe, 0\.0001 for resnet\]",
        r"--image-size +<int> +.*\[default: the student's recipe, 224 for resnet\]",
        r"--augment +<choice> +.*\[default: auto\]",
        r"--epochs +<int> +.*\[default: 100\]",
        r"--student-path +<path>",
        r"--mixup-alpha +<float> +.*\[default: 0\]",
    ):
        assert re.search(line, shown["train"]), line
    assert re.search(
        r"--resize +<choice> +How .*\. squash, letterbox, center-crop\. \[default: squash\]", shown["extract"]
    )


def test_a_family_without_a_size_lists_its_sizes() -> None:
    for name in ("unet", "UNET/"):
        with pytest.raises(ConfigError, match="needs a size: one of unet/small, unet/medium, unet/large"):
            parse_student_name(name)
