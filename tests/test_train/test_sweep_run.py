"""Whole sweeps on local worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
STUDENT = "timm:test_resnet"
SETTINGS = ["--set", "image-size=32", "--set", "batch-size=8", "--set", "workers=0"]


def sweep(store: Path, out: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "cli", "sweep", str(store), "--out", str(out), "--students", STUDENT),
        *(*SETTINGS, *options),
    ]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/outcome.json")}


@pytest.mark.slow
def test_trials_and_controls_run_and_are_not_repeated(make_store: Any, tmp_path: Path) -> None:
    store, out = make_store(), tmp_path / "sweep"
    done = run(sweep(store, out, "--seeds", "0,1", "--set", "epochs=1", "--json"))
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 4
    assert sum(trial["is_control"] for trial in trials) == 2
    assert all(trial["best"] is not None for trial in trials)
    assert "distributed" not in done.stderr
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/outcome.json")}

    again = run(sweep(store, out, "--seeds", "0,1", "--set", "epochs=1"))
    assert again.returncode == 0, again.stderr
    assert "4 done before, 0 to run" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before

    more = run(sweep(store, out, "--seeds", "0", "--set", "epochs=2", "--no-control"))
    assert more.returncode == 0, more.stderr
    assert len(outcomes(out)) == 5


@pytest.mark.slow
def test_a_failing_trial_does_not_end_the_sweep(make_store: Any, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = run(
        sweep(make_store(), out, "--set", "epochs=1", "--set", "student-path=/nothing/here.pt", "--json")
    )
    assert done.returncode == 1
    trials = json.loads(done.stdout)["trials"]
    assert {trial["state"] for trial in trials} == {"failed"}
    assert all("/nothing/here.pt" in trial["reason"] for trial in trials)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(make_store: Any, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    process = subprocess.Popen(
        sweep(make_store(train=64), out, "--set", "epochs=6", "--jobs", "2"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        trial = wait_for_training(process, out)
        worker = psutil.Process(trial.ppid())
        worker.kill()
        text, _ = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, text
    ended = outcomes(out)
    assert len(ended) == 2
    assert all(outcome["state"] == "done" for outcome in ended.values())
    for name in ended:
        epochs = [json.loads(item)["epoch"] for item in (out / "trials" / name / "run/metrics.jsonl").open()]
        assert epochs == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(make_store: Any, tmp_path: Path) -> None:
    store, out = make_store(train=64), tmp_path / "sweep"
    command = sweep(store, out, "--set", "epochs=6", "--jobs", "2")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_training(process, out)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "run the same command again" in text
    assert "Traceback" not in text
    assert not [
        child
        for child in psutil.process_iter(["cmdline"])
        if str(out) in " ".join(child.info["cmdline"] or [])
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert all(outcome["state"] == "done" for outcome in outcomes(out).values())


@pytest.fixture
def scheduler() -> Iterator[str]:
    """The address of a real `dask scheduler` in a process of its own."""
    with running("distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard") as process:
        yield find_line(process, r"(tcp://\S+)")


@contextlib.contextmanager
def running(module: str, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A module as a process from anywhere but this checkout, ended with its children at the end."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", module, *arguments],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_line(process: subprocess.Popen[str], pattern: str) -> str:
    """The first group of `pattern` in what the process prints."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError("".join(seen))


def start_worker(
    stack: contextlib.ExitStack, scheduler: str, *options: str, prefix: Sequence[str] = ()
) -> None:
    arguments = (scheduler, "--nthreads", "1", "--no-dashboard", *options)
    process = stack.enter_context(running("distributed.cli.dask_worker", *arguments, prefix=prefix))
    find_line(process, "(Registered to)")


@pytest.mark.slow
def test_an_existing_cluster_s_workers_need_only_the_store_and_this_package(
    make_store: Any, tmp_path: Path, scheduler: str
) -> None:
    store, out = make_store(), tmp_path / "sweep"
    command = sweep(store, out, "--set", "epochs=1", "--scheduler", scheduler)
    lonely = run(command)
    assert lonely.returncode == 2
    assert f"scheduler {scheduler} has no workers: start some with `dask worker {scheduler}`" in lonely.stderr
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            start_worker(stack, scheduler)
        done = run(command)
    assert done.returncode == 0, done.stderr
    assert [outcome["state"] for outcome in outcomes(out).values()] == ["done", "done"]


@pytest.mark.slow
def test_a_run_on_a_worker_s_own_disk_is_brought_back(
    make_store: Any, tmp_path: Path, scheduler: str
) -> None:
    """The worker sees another, empty disk where the sweep's folder is."""
    store, out = make_store(), tmp_path / "sweep"
    out.mkdir()
    own_disk = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(out)]
    if subprocess.run([*own_disk, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own for a process needs root")
    with contextlib.ExitStack() as stack:
        start_worker(stack, scheduler, "--resources", "trial=1", prefix=own_disk)
        done = run(sweep(store, out, "--set", "epochs=1", "--no-control", "--scheduler", scheduler))
    assert done.returncode == 0, done.stderr
    (folder,) = (out / "trials").iterdir()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files = ("config.json", "metrics.jsonl", "summary.json", "best.pt")
    assert found == {"outcome.json", "log.txt", *(f"run/{name}" for name in files)}
    again = run(sweep(store, out, "--set", "epochs=1", "--no-control"))
    assert "1 done before, 0 to run" in again.stderr
    assert run([sys.executable, "-m", "cli", "report", str(out)]).returncode == 0


def wait_for_training(process: subprocess.Popen[str], out: Path) -> psutil.Process:
    """The first trial's own process, once it has finished an epoch."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        if any(out.glob("trials/*/run/metrics.jsonl")):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "train" in child.cmdline() and str(out) in " ".join(child.cmdline()):
                    return child
        time.sleep(0.1)
    raise AssertionError("no trial has started training")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "jobs", "expected"), [(["3", "5"], None, ["3", "5"]), (["3"], 2, ["3", "3"])]
)
def test_local_workers_see_one_gpu_each_and_more_jobs_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[str], jobs: int | None, expected: list[str]
) -> None:
    """Real worker processes, a made-up list of GPUs."""
    from train.sweep import driver as sweep_driver
    from train.sweep.config import load_sweep_config

    monkeypatch.setattr(sweep_driver, "visible_gpus", lambda: gpus)
    config = load_sweep_config({"store": "x", "out": tmp_path, "students": [STUDENT], "jobs": jobs})
    with sweep_driver.cluster(config, 5) as (client, slot, cores):
        client.wait_for_workers(2)
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        assert slot == {"trial": 1}
        assert cores.of_trial is not None
    assert sorted(seen.values()) == expected
