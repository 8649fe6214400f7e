"""Ctrl-C, SIGTERM and kill -9 on a real `cli extract`: four seconds, exit code, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from extract.run import run_extraction
from store.job import count_committed, features_job
from store.reader import open_store

ROOT = Path(__file__).parents[2]

# A teacher that answers so many calls at once (in an extraction the first takes the scales), and then hangs.
HANGING = """
import sys, time
from extract.teachers.timm_encoder import TimmTeacher
calls, encode, flag, answers = [], TimmTeacher.encode, sys.argv[1], int(sys.argv[2])
def slow(self, images, **options):
    calls.append(0)
    if len(calls) > answers:
        open(flag + ".hanging", "w").close()
        time.sleep(60)
    return encode(self, images, **options)
TimmTeacher.encode = slow
import cli
sys.argv = ["cli", *sys.argv[3:]]
cli.main()
"""


def patience(seconds: float) -> float:
    """`seconds` of a machine that has nothing else to do."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def arguments(options: dict[str, Any]) -> list[str]:
    words = ["extract", str(options["data"])]
    for name, value in options.items():
        if name != "data":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def start(command: list[str], **extra: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **extra,
    )


def wait_for_rows(out: Path, process: subprocess.Popen[str], rows: int = 1) -> None:
    """Until `rows` rows are committed."""
    while process.poll() is None:
        if (out / "zarr.json").exists():
            job = features_job(out)
            if job is not None and count_committed(out, job) >= rows:
                return
        time.sleep(0.02)
    raise AssertionError(f"ended before it was stopped: {process.communicate()}")


@pytest.fixture
def slow_options(extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """An extraction of 480 digits one by one: it takes some seconds, and commits every 32 rows."""
    data = tmp_path / "many"
    for file in digit_folder.rglob("*.png"):
        for copy in range(8):
            target = data / file.parent.name / f"{file.stem}-{copy}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    return {**extract_options, "data": str(data), "batch_size": 1, "shard_rows": 32, "image_size": 160}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".extract" not in path.parts
    }


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_within_four_seconds_and_the_printed_command_goes_on(
    slow_options: dict[str, Any], number: int, code: int
) -> None:
    out = Path(slow_options["out"])
    process = start(["cli.py", *arguments({**slow_options, "workers": 1})], cwd=ROOT, start_new_session=True)
    wait_for_rows(out, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: decoders get it, too
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < patience(4)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "leaked" not in errors
    message = errors.strip().splitlines()[-1]
    command = message.split("Go on with: ")[1].split()
    assert command[:2] == ["cli", "extract"]
    committed = count_committed(out, features_job(out))  # type: ignore[arg-type]
    assert f"stopped: {committed:,} of 480 images are committed in {out}" in message
    psutil.wait_procs(children, timeout=5)
    assert not [child for child in children if child.is_running()]
    again = start(["cli.py", *command[1:]], cwd=ROOT)
    assert again.communicate(timeout=patience(120))[0].startswith(f"{out}: complete, 480 images")


@pytest.mark.slow
def test_a_signal_stops_the_processes_of_all_devices(slow_options: dict[str, Any]) -> None:
    out = Path(slow_options["out"])
    command = ["cli.py", *arguments({**slow_options, "device": "cpu,cpu"})]
    process = start(command, cwd=ROOT, start_new_session=True)
    wait_for_rows(out, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    sent = time.monotonic()
    process.wait(timeout=30)
    assert time.monotonic() - sent < patience(4)
    assert process.returncode == 143
    _, errors = process.communicate(timeout=30)
    assert "Go on with: cli extract" in errors.strip().splitlines()[-1]
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]
    again = start(command, cwd=ROOT)
    assert again.communicate(timeout=patience(120))[0].startswith(f"{out}: complete, 480 images")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(extract_options: dict[str, Any], tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    process = start(["-c", HANGING, str(flag), "4", *arguments(extract_options)], cwd=ROOT)
    while not flag.with_name("flag.hanging").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - sent < patience(1.5)
    assert process.returncode == 130


@pytest.mark.slow
def test_a_teacher_that_hangs_cannot_hold_up_the_stop(
    extract_options: dict[str, Any], tmp_path: Path
) -> None:
    """What it had encoded is committed nevertheless."""
    flag = tmp_path / "flag"
    # Two answers for loading the teacher, one for the scales, three for the first batches; the next ones hang.
    process = start(["-c", HANGING, str(flag), "6", *arguments({**extract_options, "workers": 1})], cwd=ROOT)
    while not flag.with_name("flag.hanging").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < patience(4)
    assert process.returncode == 143
    assert "stopped: 24 of 60 images are committed" in errors
    assert "leaked" not in errors


@pytest.mark.slow
def test_a_dry_run_can_be_stopped_too(extract_options: dict[str, Any], tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    command = ["-c", HANGING, str(flag), "1", *arguments(extract_options), "--dry-run"]
    process = start(command, cwd=ROOT)
    while not flag.with_name("flag.hanging").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < patience(4)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "stopped: a dry run writes nothing"


@pytest.mark.slow
def test_kill_nine_and_resume_is_bit_identical(slow_options: dict[str, Any]) -> None:
    from extract.config import load_config

    out = Path(slow_options["out"])
    run_extraction(load_config(slow_options))
    whole = files_of(out)
    shutil.rmtree(out)
    for rows in (1, 120, 280):
        process = start(["cli.py", *arguments({**slow_options, "workers": 1})], cwd=ROOT)
        wait_for_rows(out, process, rows)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        psutil.wait_procs(children, timeout=5)
        assert not [child for child in children if child.is_running()]  # decoders go with their parent
    run_extraction(load_config(slow_options))
    assert files_of(out) == whole
    assert open_store(out).manifest.complete
