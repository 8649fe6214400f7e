"""Run a sweep: plan, hand the trials that are not done to dask.distributed, show them, write the results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.log import get_logger
from console.stop import Stopped, StopRequest
from store import open_store
from train.sweep.board import Board, TrialState, read_state
from train.sweep.config import SweepConfig, Trial, plan_trials
from train.sweep.worker import (
    OUTCOME_FILE,
    Order,
    Outcome,
    read_json,
    run_trial,
    write_json,
)

if TYPE_CHECKING:
    from distributed import Client, Future

logger = get_logger("sweep")

POLL_S = 1.0
STOP_WAIT_S = 30.0
PLAN_FILE = "sweep.json"
# A trial whose worker died this often is marked as lost: most likely it is what kills them.
WORKER_LOSSES_ALLOWED = 2


def run_sweep(config: SweepConfig) -> list[TrialState]:
    """Train every trial of the sweep that is not done yet; returns the states of all, in plan order.

    A trial that fails, hangs or loses its worker is marked with its reason, and the others go on.
    Raises:
        ConfigError: an option is not valid for one of the students.
        Stopped: Ctrl-C or SIGTERM; trials that ran have saved their state, the same command goes on.
    """
    trials = plan_trials(config, open_store(config.store).fingerprint)
    write_plan(config, trials)
    finished = {trial.name for trial in trials if is_done(trial_folder(config.out, trial))}
    todo = [trial for trial in trials if trial.name not in finished]
    logger.info("%d trials: %d done before, %d to run", len(trials), len(finished), len(todo))
    with StopRequest() as stop:
        if todo:
            run_trials(config, todo, stop, Board(config.out, trials))
        if stop.requested:
            raise Stopped("sweep stopped; run the same command again to go on", stop.exit_code)
    return [read_state(trial_folder(config.out, trial), trial) for trial in trials]


def trial_folder(out: Path, trial: Trial) -> Path:
    return out / "trials" / trial.name


def is_done(folder: Path) -> bool:
    """A finished trial has its outcome, written after everything else."""
    outcome = read_json(folder / OUTCOME_FILE)
    return outcome is not None and outcome.get("state") == "done"


def write_plan(config: SweepConfig, trials: Sequence[Trial]) -> None:
    """sweep.json: all trials this folder has ever planned, the latest sweep's marked as current."""
    config.out.mkdir(parents=True, exist_ok=True)
    before = (read_json(config.out / PLAN_FILE) or {}).get("trials", [])
    rows = {row["name"]: {**row, "current": False} for row in before}
    rows |= {trial.name: {**trial._asdict(), "current": True} for trial in trials}
    plan = {"config": json.loads(config.model_dump_json()), "trials": list(rows.values())}
    write_json(config.out / PLAN_FILE, plan)


def run_trials(config: SweepConfig, todo: Sequence[Trial], stop: StopRequest, board: Board) -> None:
    """Submit the trials and wait; on a stop request the running ones save and leave, the rest never start."""
    from distributed import Event

    with cluster(config, len(todo)) as (client, threads), board:
        event_name = f"stop-{uuid.uuid4().hex}"
        event = Event(event_name, client=client)
        futures = {
            client.submit(
                run_on_worker,
                order(config, trial, threads),
                event_name,
                key=f"{trial.name}-{event_name}",
                pure=False,
                resources={"trial": 1},
            ): trial
            for trial in todo
        }
        collect(config, futures, stop, board)
        if stop.requested:
            event.set()
            wait_for_running(futures)


def order(config: SweepConfig, trial: Trial, threads: int | None) -> Order:
    return Order(
        name=trial.name,
        store=store_address(config.store),
        folder=str(trial_folder(config.out, trial).resolve()),
        options=trial.options,
        threads=threads,
        timeout_s=config.trial_timeout_s,
    )


def store_address(store: str) -> str:
    """Absolute for a folder: workers may have another working directory. URLs stay as they are."""
    return store if "://" in store else str(Path(store).resolve())


def run_on_worker(order: Order, event_name: str) -> Outcome:
    """What dask calls on a worker: one trial, stopped when the sweep's event is set."""
    from distributed import Event

    event = Event(event_name)
    return run_trial(order, every(POLL_S, event.is_set))


def every(interval_s: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """`ask`, but at most once an interval: it goes over the network."""
    asked, answer = 0.0, False

    def cached() -> bool:
        nonlocal asked, answer
        if not answer and time.monotonic() - asked >= interval_s:
            asked, answer = time.monotonic(), bool(ask())
        return answer

    return cached


def collect(config: SweepConfig, futures: dict[Future, Trial], stop: StopRequest, board: Board) -> None:
    """Record outcomes as they come, and keep the table of trials up to date."""
    waiting = set(futures)
    while waiting and not stop.requested:
        for future in [future for future in waiting if future.done()]:
            waiting.discard(future)
            record(trial_folder(config.out, futures[future]), future)
        board.update()
        stop.wait(POLL_S)
    board.update()


def record(folder: Path, future: Future) -> None:
    """Keep the outcome here too: a worker of another machine wrote it to its own disk."""
    error = future.exception()
    if error is None:
        outcome = future.result()
    else:
        reason = f"lost: {type(error).__name__}: {' '.join(str(error).split())}"
        outcome = Outcome(state="failed", reason=reason, last_lines=[], wall_time_s=0.0, summary=None)
    folder.mkdir(parents=True, exist_ok=True)
    if read_json(folder / OUTCOME_FILE) != outcome:
        write_json(folder / OUTCOME_FILE, outcome)


def wait_for_running(futures: dict[Future, Trial]) -> None:
    """Cancel what has not started and give what runs the time to save."""
    deadline = time.monotonic() + STOP_WAIT_S
    running = [future for future in futures if not future.done()]
    while running and time.monotonic() < deadline:
        time.sleep(0.2)
        running = [future for future in running if not future.done()]


@contextlib.contextmanager
def cluster(config: SweepConfig, trials: int) -> Iterator[tuple[Client, int | None]]:
    """A client of the scheduler that was named, or of a local cluster; and the threads a CPU trial gets.

    Workers of an existing scheduler must offer the resource `trial` (`dask worker … --resources "trial=1"`,
    one per GPU): without it a trial waits for ever, so that is an error.
    """
    # Workers read it from the environment; their comings and goings are no news to who runs a sweep.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    import dask
    from distributed import Client

    dask.config.set({"distributed.scheduler.allowed-failures": WORKER_LOSSES_ALLOWED})
    if config.scheduler:
        with Client(config.scheduler, timeout=30) as client:
            check_resources(config.scheduler, client)
            yield client, None
        return
    jobs, workers, threads = local_workers(config.jobs, trials)
    logger.info("local cluster: %d trials at a time, %s threads each", jobs, threads or "all")
    from distributed import SpecCluster

    with deaf_to_ctrl_c():
        local = local_spec(SpecCluster, workers)
    with local, Client(local) as client:
        yield client, threads


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: it reaches the whole terminal group, but the sweep decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def check_resources(scheduler: str, client: Client) -> None:
    from train.errors import ConfigError

    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    if not any("trial" in worker.get("resources", {}) for worker in workers.values()):
        raise ConfigError(
            f"scheduler {scheduler} has {len(workers)} workers and none offers the resource trial: "
            f'start them as `dask worker {scheduler} --nthreads 1 --resources "trial=1"`'
        )


def local_spec(spec_cluster: Any, workers: dict[int, dict[str, Any]]) -> Any:
    from distributed import Scheduler

    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "port": 0, "host": "127.0.0.1"}}
    return spec_cluster(workers=workers, scheduler=scheduler, silence_logs=50)


def local_workers(jobs: int | None, trials: int) -> tuple[int, dict[int, dict[str, Any]], int | None]:
    """(trials at a time, one worker process for each, threads of each): a GPU each where there are GPUs."""
    from distributed import Nanny

    gpus = visible_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(jobs or (len(gpus) or max(2, cores // 4)), trials)
    threads = None if gpus else max(1, cores // count)
    options: dict[str, Any] = {"nthreads": 1, "resources": {"trial": 1}, "dashboard": False}
    workers: dict[int, dict[str, Any]] = {}
    for index in range(count):
        env = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        workers[index] = {"cls": Nanny, "options": {**options, "env": env}}
    return count, workers, threads


def visible_gpus() -> list[str]:
    """Indices (or the names the environment gives) of the GPUs that trials may use."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(index) for index in range(torch.cuda.device_count())]
