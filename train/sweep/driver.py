"""Run a sweep: plan, hand the trials that are not done to dask.distributed, show them, write the results."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from console.devices import core_share
from console.output import get_logger, plain_json, redact_values
from files.locking import locked
from files.writing import check_writable
from processes.children import ignore_sigint
from processes.dask_cluster import (
    ClusterStartError,
    connect,
    dask_defaults,
    local_cluster,
    unset_allocator_variable,
    worker_slots,
)
from processes.stop import Stopped, StopRequest
from store.reader import open_store
from train.errors import ConfigError, TrainError
from train.run_folder import PRETRAIN, SUMMARY, make_folder, read_json, warn_of_random_teacher, write_json
from train.sweep.board import Board, TrialState, read_state
from train.sweep.config import SweepConfig, Trial, plan_trials
from train.sweep.trial import (
    OUTCOME_FILE,
    RUN_FOLDER,
    Order,
    TrialResult,
    ended,
    read_run,
    run_trial,
)

if TYPE_CHECKING:
    from distributed import Client, Future

logger = get_logger("sweep")

POLL_S = 1.0
STOP_WAIT_S = 30.0
PLAN_FILE, LOCK_FILE = "sweep.json", "sweep.lock"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# A trial whose worker died this often is marked as lost: most likely it is what kills them.
WORKER_LOSSES_ALLOWED = 2


class Cores(NamedTuple):
    """How many cores a trial gets; None: the worker knows, from the GPU trials that its host runs at a time."""

    of_trial: int | None
    gpu_trials: dict[str, int]


def run_sweep(config: SweepConfig) -> list[TrialState]:
    """Train every trial of the sweep that is not done yet; returns the states of all, in plan order.

    A trial that fails, hangs or loses its worker is marked with its reason, and the others continue.
    Raises:
        ConfigError: an option is not valid for one of the students, or another sweep runs in the folder.
        Stopped: Ctrl-C or SIGTERM; trials that ran have saved their state, the same command continues.
    """
    check_writable(config.out, "--out")
    store = open_store(config.store)
    trials = plan_trials(config, store.fingerprint)
    warn_of_random_teacher(config.store, store)
    with StopRequest() as stop, only_sweep(config.out):
        write_plan(config, trials)
        todo = [trial for trial in trials if not is_done(trial_folder(config.out, trial))]
        for trial in todo:  # how an earlier attempt ended is no news of this one
            (trial_folder(config.out, trial) / OUTCOME_FILE).unlink(missing_ok=True)
        logger.info("%d trials: %d done before, %d to run", len(trials), len(trials) - len(todo), len(todo))
        if todo:
            run_trials(config, todo, stop, Board(config.out, trials))
        if stop.requested:
            raise Stopped("stopped: run the same command again to continue the sweep", stop.exit_code)
    return [read_state(trial_folder(config.out, trial), trial) for trial in trials]


@contextlib.contextmanager
def only_sweep(out: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder: the two would train the same trials."""
    make_folder(out)

    def refuse(waited_s: float) -> None:
        raise ConfigError(
            f"{out}: another sweep is running in this folder: wait for it, or use another --out"
        )

    with locked(out / LOCK_FILE, refuse):
        yield


def trial_folder(out: Path, trial: Trial) -> Path:
    return out / "trials" / trial.name


def is_done(folder: Path) -> bool:
    """A finished trial has its outcome, written after everything else."""
    outcome = read_json(folder / OUTCOME_FILE)
    return outcome is not None and outcome.get("state") == "done"


def write_plan(config: SweepConfig, trials: Sequence[Trial]) -> None:
    """sweep.json: all trials this folder has ever planned, the latest sweep's marked as current."""
    before = (read_json(config.out / PLAN_FILE) or {}).get("trials", [])
    rows = {row["name"]: {**row, "current": False} for row in before}
    rows |= {trial.name: {**trial._asdict(), "current": True} for trial in trials}
    plan = {"config": redact_values(plain_json(config.model_dump())), "trials": list(rows.values())}
    write_json(config.out / PLAN_FILE, plan)


def run_trials(config: SweepConfig, todo: Sequence[Trial], stop: StopRequest, board: Board) -> None:
    """Submit the trials and wait; on a stop request the running ones save and leave, the rest never start."""
    from distributed import Event

    with cluster(config, len(todo)) as (client, slot, cores), board:
        event_name = f"stop-{uuid.uuid4().hex}"
        event = Event(event_name, client=client)
        futures = {
            client.submit(
                run_on_worker,
                order(config, trial, cores),
                event_name,
                key=f"{trial.name}-{event_name}",
                pure=False,
                resources=slot,
            ): trial
            for trial in todo
        }
        collect(config, client, futures, stop, board)
        if stop.requested:
            event.set()
            wait_for_running(futures)


def order(config: SweepConfig, trial: Trial, cores: Cores) -> Order:
    return Order(
        name=trial.name,
        # Workers may have another working directory.
        store=config.store if "://" in config.store else str(Path(config.store).resolve()),
        folder=str(trial_folder(config.out, trial).resolve()),
        options=trial.options | shared_phase_one(config, trial),
        cores=cores.of_trial,
        gpu_trials=cores.gpu_trials,
        thread_variables=set_thread_variables(),
        timeout_s=config.trial_timeout_s,
    )


def shared_phase_one(config: SweepConfig, trial: Trial) -> dict[str, Any]:
    """Trials that differ in phase two alone train phase one once; not part of a trial's name, since it changes nothing."""
    return (
        {"pretrain_cache": str((config.out / PRETRAIN).resolve())}
        if trial.options.get("pretrain_epochs")
        else {}
    )


def run_on_worker(order: Order, event_name: str) -> tuple[TrialResult, str]:
    """What dask calls on a worker: one trial, stopped when the sweep's event is set. Also returns where it ran."""
    from distributed import Event, get_worker

    unset_allocator_variable()
    worker: Any = get_worker()
    if order["cores"] is None:
        beside = order["gpu_trials"].get(host_of(worker.address))
        share = thread_share(worker.state.nthreads, worker.state.total_resources)
        # Workers of GPUs have one thread each whatever the machine has; other workers' threads are their cores.
        order = {**order, "cores": max(1, core_share() // beside) if beside else share}
        order["thread_variables"] = set_thread_variables(dask_defaults())
    return run_trial(order, every(POLL_S, Event(event_name).is_set)), worker.address


def thread_share(threads: int, resources: Mapping[str, float]) -> int:
    """A worker's threads, divided among the trials that it runs at a time."""
    return max(1, int(threads // max(resources.get("trial", threads), 1)))


def set_thread_variables(defaults: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The variables that set numbers of threads and that the user has set: their values are not those of `defaults`."""
    found = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    return {name: value for name, value in found.items() if value != defaults.get(name)}


def host_of(address: str) -> str:
    """`tcp://10.0.0.1:4711` → `10.0.0.1`"""
    return address.rpartition("://")[2].rpartition(":")[0]


def every(interval_s: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """`ask`, but at most once an interval: it goes over the network."""
    asked, answer = 0.0, False

    def cached() -> bool:
        nonlocal asked, answer
        if not answer and time.monotonic() - asked >= interval_s:
            asked, answer = time.monotonic(), bool(ask())
        return answer

    return cached


def collect(
    config: SweepConfig, client: Client, futures: dict[Future, Trial], stop: StopRequest, board: Board
) -> None:
    """Record outcomes as they come, and keep the table of trials up to date."""
    waiting = set(futures)
    while waiting and not stop.requested:
        for future in [future for future in waiting if future.done()]:
            waiting.discard(future)
            record(trial_folder(config.out, futures[future]), client, future)
        board.update()
        stop.wait(POLL_S)
    board.update()


def record(folder: Path, client: Client, future: Future) -> None:
    """Keep the outcome here too: a worker of another machine wrote it to its own disk, and so the run's files."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome, worker = future.result()
        if outcome["state"] == "done" and not (folder / RUN_FOLDER / SUMMARY).exists():
            bring_back(folder, client, worker)
    except Exception as error:  # KilledWorker, or dask's own when the scheduler is gone
        outcome = ended("failed", f"lost: {type(error).__name__}: {' '.join(str(error).split())}")
    if read_json(folder / OUTCOME_FILE) != outcome:
        write_json(folder / OUTCOME_FILE, outcome)


def bring_back(folder: Path, client: Client, worker: str) -> None:
    """Copy a finished trial's files from the disk of the worker that ran it."""
    # Not as a task: the worker's threads belong to the next trials.
    files = client.run(read_run, folder.resolve(), workers=[worker])[worker]
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def wait_for_running(futures: dict[Future, Trial]) -> None:
    """Give what runs the time to save; what has not started leaves at once."""
    deadline = time.monotonic() + STOP_WAIT_S
    running = [future for future in futures if not future.done()]
    while running and time.monotonic() < deadline:
        time.sleep(0.2)
        running = [future for future in running if not future.done()]


@contextlib.contextmanager
def cluster(config: SweepConfig, trials: int) -> Iterator[tuple[Client, dict[str, float], Cores]]:
    """A client of the scheduler that was named, or of a local cluster; what a trial takes of a worker's resources;
    and the trials' cores.
    """
    import dask

    dask.config.set({"distributed.scheduler.allowed-failures": WORKER_LOSSES_ALLOWED})
    if config.scheduler:
        try:
            with connect(config.scheduler, timeout_s=30) as client:
                slot = trial_slot(config.scheduler, client)
                yield client, slot, Cores(None, count_gpu_trials(client) if "GPU" in slot else {})
        except ClusterStartError as error:
            raise ConfigError(f"scheduler {config.scheduler}: cannot be reached: {error}") from None
        return
    workers, cores = local_workers(config.jobs, trials)
    logger.info("local cluster: %d trials at a time, %d cores each", len(workers), cores)
    try:
        # Ctrl-C reaches the whole terminal group, but the sweep decides when its workers end.
        with local_cluster(workers, ignore_sigint()) as client:
            yield client, {"trial": 1}, Cores(cores, {})
    except ClusterStartError as error:
        raise TrainError(
            f"{len(workers)} worker processes for the trials cannot be started: {error}; try "
            "fewer --jobs, or start workers yourself (dask worker) and name their --scheduler"
        ) from error


def trial_slot(scheduler: str, client: Client) -> dict[str, float]:
    """What a trial takes of a worker: a `GPU` or a `trial` where workers offer them, else one of its threads."""
    slot, count = worker_slots(client)
    if not count:
        raise ConfigError(f"scheduler {scheduler} has no workers: start some with `dask worker {scheduler}`")
    if not slot:
        logger.info(
            "%s: the workers offer neither GPU nor trial as a resource: a trial on each of their %d threads",
            *(scheduler, count),
        )
    return slot


def count_gpu_trials(client: Client) -> dict[str, int]:
    """Trials at a time on each host whose workers offer GPUs."""
    counts: dict[str, int] = {}
    for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
        gpus = int(worker.get("resources", {}).get("GPU", 0))
        counts[host_of(address)] = counts.get(host_of(address), 0) + gpus
    return counts


def local_workers(jobs: int | None, trials: int) -> tuple[list[dict[str, Any]], int]:
    """(options of one worker process for each trial at a time, cores of each trial).

    Where there are GPUs a trial sees one of them; more `jobs` than GPUs share them.
    """
    gpus, cores = visible_gpus(), core_share()
    count = min(jobs or (len(gpus) or max(2, cores // 4)), trials)
    workers = [
        {
            "resources": {"trial": 1},
            "env": {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {},
        }
        for index in range(count)
    ]
    return workers, max(1, cores // count)


def visible_gpus() -> list[str]:
    """Indices (or the names the environment gives) of the GPUs that trials may use."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(index) for index in range(torch.cuda.device_count())]
