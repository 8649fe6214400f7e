"""One trial, on a worker: `cli train` as a subprocess in its own folder, watched until it ends.

outcome.json records its state: `running` from its start, then how it ended.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from console.devices import SHARE_VARIABLE, available_cores
from files.locking import locked
from processes.children import child_environment, signal_on_parent_death, stop_group
from train.run_folder import CONFIG, METRICS, SUMMARY, RunFolder, write_json

POLL_S = 0.25
STOP_GRACE_S = 15.0  # a training saves and leaves within 4 seconds of SIGTERM
LAST_LINES = 15
LAST_BYTES = 16_384
LOCK_WAIT_S = 60.0  # for the process of a worker that was lost to save and leave
OPTIONS_FILE, LOG_FILE, OUTCOME_FILE, LOCK_FILE = "trial.json", "log.txt", "outcome.json", "trial.lock"
STOPPED = "the sweep was stopped; run the same command again to continue"
RUN_FOLDER = "run"  # below the trial's folder: `cli train --overwrite` empties what it is given


class TrialResult(TypedDict):
    """How a trial ended. `summary` is the content of its summary.json when it is done."""

    state: str  # running | done | failed | timeout | stopped
    reason: str
    last_lines: list[str]
    wall_time_s: float
    summary: dict[str, Any] | None


class Order(TypedDict):
    """What a worker is sent: plain values only."""

    name: str
    store: str
    folder: str
    options: dict[str, Any]
    cores: int | None  # of this trial; None: run_on_worker decides
    gpu_trials: dict[str, int]  # trials at a time by host, where workers offer GPUs
    thread_variables: dict[str, str]  # OMP_NUM_THREADS and the like as the user set them
    timeout_s: float | None


def run_trial(order: Order, stop_requested: Callable[[], bool]) -> TrialResult:
    """Run (or continue) the trial; its output goes to log.txt, its state to outcome.json in its folder."""
    if stop_requested():
        return ended("stopped", STOPPED)
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(folder, stop_requested) as lock:
            write_json(folder / OUTCOME_FILE, ended("running", ""))
            write_json(folder / OPTIONS_FILE, order["options"])
            outcome = train_and_watch(order, folder, lock, stop_requested)
    except FolderBusyError as error:
        return ended("failed", str(error))
    write_json(folder / OUTCOME_FILE, outcome)
    return outcome


def train_and_watch(order: Order, folder: Path, lock: int, stop_requested: Callable[[], bool]) -> TrialResult:
    started = time.monotonic()
    resumed = RunFolder(folder / RUN_FOLDER).is_interrupted()  # any other trial starts again
    with (folder / LOG_FILE).open("ab" if resumed else "wb") as log:
        process = subprocess.Popen(
            command(order, folder, resumed),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(order["cores"], order["thread_variables"]),
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C in the terminal reaches the sweep, which then stops its trials
            preexec_fn=signal_on_parent_death,  # so that its trial can continue on another worker
        )
        state, reason = watch(process, order["timeout_s"], stop_requested)
    return TrialResult(
        state=state,
        reason=reason or failure_reason(process.returncode, folder),
        last_lines=[] if state == "done" else last_lines(folder / LOG_FILE),
        wall_time_s=time.monotonic() - started,
        summary=RunFolder(folder / RUN_FOLDER).read_summary() if state == "done" else None,
    )


def ended(state: str, reason: str) -> TrialResult:
    """The result of a trial that has only a state and a reason."""
    return TrialResult(state=state, reason=reason, last_lines=[], wall_time_s=0.0, summary=None)


class FolderBusyError(Exception):
    """Another process still trains in a trial's folder."""


@contextlib.contextmanager
def only_one(folder: Path, stop_requested: Callable[[], bool]) -> Iterator[int]:
    """Hold the folder's lock; yields its descriptor, which the training process inherits and so holds as well.

    A lost worker's trial is run elsewhere: it must wait until the process that was left behind has saved and left.
    """

    def wait(waited_s: float) -> None:
        if waited_s > LOCK_WAIT_S or stop_requested():
            raise FolderBusyError(f"another process is still training in {folder}: end it, then sweep again")
        time.sleep(POLL_S)

    with locked(folder / LOCK_FILE, wait) as file:
        yield file.fileno()


def command(order: Order, folder: Path, resumed: bool) -> list[str]:
    return [
        *(sys.executable, "-m", "cli", "train", order["store"]),
        *("--student", str(order["options"]["student"])),
        *("--out", str(folder / RUN_FOLDER), "--config", str(folder / OPTIONS_FILE)),
        "--resume" if resumed else "--overwrite",
    ]


def environment(cores: int | None, thread_variables: Mapping[str, str]) -> dict[str, str]:
    """The child's: this checkout or installation on its path, its share of the cores, and what the user set."""
    values = child_environment(PYTHONUNBUFFERED="1")
    if cores is not None:
        values |= {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
        values[SHARE_VARIABLE] = str(max(1, available_cores() // cores))
    return {**values, **thread_variables}


def watch(
    process: subprocess.Popen[bytes], timeout_s: float | None, stop_requested: Callable[[], bool]
) -> tuple[str, str]:
    """Wait for the process; (state, reason), the reason empty where the exit code must explain."""
    started = time.monotonic()
    while process.poll() is None:
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            stop_group(process, STOP_GRACE_S)
            return "timeout", f"did not end within {timeout_s:g} s (--trial-timeout)"
        if stop_requested():
            stop_group(process, STOP_GRACE_S)
            return "stopped", STOPPED
        time.sleep(POLL_S)
    return ("done" if process.returncode == 0 else "failed"), ""


def failure_reason(returncode: int, folder: Path) -> str:
    """One line with the reason why the process ended: its own error line where it printed one."""
    if returncode == 0:
        return ""
    lines = last_lines(folder / LOG_FILE)
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if returncode == -signal.SIGKILL:
        return "killed (signal 9): the machine has most likely run out of memory; use fewer --jobs or a smaller batch"
    if returncode < 0:
        return f"ended by signal {-returncode} ({signal.Signals(-returncode).name})"
    return f"exit code {returncode}: {lines[-1] if lines else 'nothing was printed'}"


def last_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return text.splitlines()[-LAST_LINES:]


def read_run(folder: Path) -> dict[str, bytes]:
    """The files of a finished trial that a report and later commands need, by path below the trial's folder."""
    names = [f"{RUN_FOLDER}/{name}" for name in (CONFIG, METRICS, "best.pt", SUMMARY)]
    return {name: (folder / name).read_bytes() for name in [LOG_FILE, *names] if (folder / name).exists()}
