"""What trials follow from a sweep's options, and how their outcomes are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from console.devices import core_share
from console.options import read_option_file
from processes.dask_cluster import ALLOCATOR_VARIABLE, dask_defaults
from train.errors import ConfigError, TrainError
from train.run_folder import RunFolder
from train.sweep.board import best_of, line, read_state
from train.sweep.config import Trial, load_sweep_config, plan_trials
from train.sweep.driver import (
    is_done,
    local_workers,
    only_sweep,
    run_on_worker,
    set_thread_variables,
    thread_share,
    trial_folder,
    visible_gpus,
    write_plan,
)
from train.sweep.trial import Order, environment, failure_reason, only_one, run_trial

STORE = {"store": "features.zarr", "out": Path("sweep")}


def plan(fingerprint: str = "f", **options: Any) -> list[Trial]:
    return plan_trials(load_sweep_config({**STORE, "students": ["resnet18"], **options}), fingerprint)


def test_teachers_are_an_axis_and_each_choice_has_its_control() -> None:
    """The first-named teacher's view of the images is the student's too."""
    trials = plan(set={"teachers": ["qwen2.5-vl", "dino", "qwen2.5-vl+dino"]})
    names = [(trial.options["teachers"], trial.is_control) for trial in trials]
    assert len(set(names)) == len(trials) == 6
    assert all("teachers=" in trial.name for trial in trials)


def test_students_seeds_and_values_are_crossed() -> None:
    trials = plan(
        students=["resnet18", "vit-tiny"],
        seeds=[0, 1],
        set={"learning-rate": ["1e-4", "3e-4"]},
        control=False,
    )
    assert len(trials) == 8
    assert len({trial.name for trial in trials}) == 8
    assert {(t.options["student"], t.options["seed"], t.options["learning_rate"]) for t in trials} == {
        (student, seed, rate)
        for student in ("resnet/resnet18", "vit/vit-tiny")
        for seed in (0, 1)
        for rate in (1e-4, 3e-4)
    }


def test_distillation_options_share_one_control_per_student_and_seed() -> None:
    trials = plan(seeds=[0, 1], set={"feature_loss_type": ["mse", "cosine"], "temperature": ["2", "4"]})
    controls = [trial for trial in trials if trial.is_control]
    assert len(controls) == 2
    assert len(trials) == 2 + 8
    for control in controls:
        assert control.options["control_only"] is True
        assert "temperature" not in control.options
    by_seed = {control.options["seed"]: control.name for control in controls}
    for trial in trials:
        if not trial.is_control:
            assert trial.control_name == by_seed[trial.options["seed"]]


def test_other_options_have_controls_of_their_own() -> None:
    trials = plan(set={"learning_rate": ["1e-4", "3e-4"]})
    controls = {trial.options["learning_rate"] for trial in trials if trial.is_control}
    assert controls == {1e-4, 3e-4}


def test_label_free_trials_have_no_control() -> None:
    assert not any(trial.is_control for trial in plan(set={"task": ["features"]}))


def test_another_option_or_another_store_is_another_trial() -> None:
    names = [
        {trial.name for trial in trials}
        for trials in (plan(), plan(set={"epochs": ["3"]}), plan("other store"), plan(seeds=[1]))
    ]
    assert len(set.union(*names)) == sum(len(group) for group in names)
    assert names[0] == {trial.name for trial in plan()}


def test_the_same_value_written_otherwise_is_the_same_trial() -> None:
    typed = plan(students=["resnet18"], seeds=["0"], set={"learning_rate": ["1e-4", "3e-4"]})
    from_file = plan(students=["resnet/resnet18"], seeds=[0], set={"learning-rate": [0.0001, 0.0003]})
    assert [trial.name for trial in typed] == [trial.name for trial in from_file]
    assert typed[-1].name.startswith("resnet18-seed0-learning_rate=0.0003-")


def test_paths_are_whole_for_workers_elsewhere() -> None:
    (trial,) = plan(set={"student_path": ["weights.pt"], "dropout": ["0"]}, control=False)
    assert trial.options["student_path"] == str(Path("weights.pt").resolve())
    assert trial.options["dropout"] == 0


def test_all_problems_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep_config({**STORE, "students": ["resnet18"], "set": {"learnin_rate": ["1"], "seed": ["1"]}})
    assert "learnin_rate" in str(caught.value)
    assert "did you mean learning_rate" in str(caught.value)
    assert "seed is the sweep's own" in str(caught.value)
    with pytest.raises(ConfigError, match="--students: expected at least one value, got none"):
        load_sweep_config({**STORE, "students": []})


def test_a_value_that_no_trial_can_take_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="epochs"):
        plan(set={"epochs": ["3", "many"]})


def test_a_file_gives_options_and_the_command_line_wins() -> None:
    file = {"students": ["vit-tiny"], "seeds": [5], "epochs": 7, "image_size": 64}
    config = load_sweep_config({**STORE, "students": ["resnet18"], "set": {"epochs": ["9"]}}, file)
    assert config.students == ["resnet18"]
    assert config.seeds == [5]
    assert config.options == {"image_size": 64}
    assert config.set == {"epochs": ["9"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sweep.yaml",
            "students: resnet18, vit-tiny\nseeds: [0, 1]\ntrial-timeout: 60\nepochs: 3\nset:\n  dropout: [0, 0.1]\n",
        ),
        (
            "sweep.toml",
            'students = ["resnet18", "vit-tiny"]\nseeds = "0,1"\ntrial-timeout = 60\nepochs = 3\n[set]\ndropout = [0, 0.1]\n',
        ),
    ],
)
def test_files_take_the_names_of_the_command_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = load_sweep_config(STORE, read_option_file(tmp_path / name, ConfigError))
    assert (config.students, config.seeds, config.trial_timeout_s) == (["resnet18", "vit-tiny"], [0, 1], 60)
    assert (config.options, config.set) == ({"epochs": 3}, {"dropout": [0, 0.1]})


def test_a_second_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="another sweep is running")
    with only_sweep(tmp_path), refused, only_sweep(tmp_path):
        pass
    with only_sweep(tmp_path):
        pass


def test_a_new_plan_keeps_earlier_trials_but_not_as_current(tmp_path: Path) -> None:
    for epochs in ("3", "4"):
        config = load_sweep_config(
            {**STORE, "out": tmp_path, "students": ["resnet18"], "set": {"epochs": [epochs]}}
        )
        write_plan(config, plan_trials(config, "f"))
    rows = json.loads((tmp_path / "sweep.json").read_text())["trials"]
    assert [row["current"] for row in rows] == [False, False, True, True]


def order(folder: Path, store: str, **changes: Any) -> Order:
    values: Any = {
        "name": folder.name,
        "store": store,
        "folder": str(folder),
        "cores": 1,
        "gpu_trials": {},
        "thread_variables": {},
        "timeout_s": None,
    }
    return {**values, "options": {"student": "resnet18"}, **changes}  # type: ignore[typeddict-item, return-value]


def test_a_trial_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    outcome = run_trial(order(folder, str(tmp_path / "nothing.zarr")), lambda: False)
    assert outcome["state"] == "failed"
    assert "nothing.zarr" in outcome["reason"]
    assert not outcome["reason"].startswith("error:")
    assert outcome["last_lines"]
    assert not is_done(folder)
    trial = Trial("trial", {"student": "resnet18"}, False, None)
    state = read_state(folder, trial)
    assert (state.state, state.reason) == ("failed", outcome["reason"])
    assert state.reason in line(state)


def test_a_trial_waits_for_the_process_that_a_lost_worker_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process holds the lock that it inherited, whoever started it."""
    folder = tmp_path / "trial"
    folder.mkdir()
    with only_one(folder, lambda: False) as lock:
        left_behind = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock]
        )
    monkeypatch.setattr("train.sweep.trial.LOCK_WAIT_S", 0.5)
    outcome = run_trial(order(folder, "x"), lambda: False)
    assert outcome["state"] == "failed"
    assert "another process is still training in" in outcome["reason"]
    assert not (folder / "outcome.json").exists()  # it is the other's
    left_behind.communicate(b"\n", timeout=30)
    with only_one(folder, lambda: False):
        pass


def test_a_sweep_that_is_stopped_starts_no_more_trials(tmp_path: Path) -> None:
    outcome = run_trial(order(tmp_path / "trial", "x"), lambda: True)
    assert outcome["state"] == "stopped"
    assert not (tmp_path / "trial").exists()


def test_a_trial_says_that_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trial = tmp_path / "trial", Trial("trial", {"student": "resnet18"}, False, None)
    folder.mkdir()
    assert read_state(folder, trial).state == "waiting"
    seen: list[str] = []
    monkeypatch.setattr(
        "train.sweep.trial.command", lambda *_: [sys.executable, "-c", "import time; time.sleep(1)"]
    )
    run_trial(order(folder, "x"), lambda: bool(seen.append(read_state(folder, trial).state)))
    assert seen[0] == "waiting"
    assert "running" in seen
    assert read_state(folder, trial).state == "done"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_trial_that_hangs_is_ended_with_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    monkeypatch.setattr("train.sweep.trial.command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr("train.sweep.trial.STOP_GRACE_S", 0.5)
    outcome = run_trial(order(tmp_path / "trial", "x", timeout_s=1.5), lambda: False)
    assert outcome["state"] == "timeout"
    assert "1.5 s" in outcome["reason"]
    assert outcome["wall_time_s"] < 30


def test_a_trial_that_the_system_kills_is_told_apart_from_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import os; print('epoch 1', flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr("train.sweep.trial.command", lambda *_: [sys.executable, "-c", script])
    outcome = run_trial(order(tmp_path / "trial", "x"), lambda: False)
    assert (outcome["state"], outcome["last_lines"]) == ("failed", ["epoch 1"])
    assert "run out of memory" in outcome["reason"]
    assert "out of memory" in failure_reason(-9, tmp_path)
    assert "SIGSEGV" in failure_reason(-11, tmp_path)
    assert "exit code 3" in failure_reason(3, tmp_path)


def test_records_of_a_run_that_is_writing_are_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "top1": 0.5}\n{"epoch": 2, "top1": 0.75}\n{"epoch": 3, "to')
    records = RunFolder(tmp_path).read_records()
    assert [record["epoch"] for record in records] == [1, 2]
    assert best_of(records) == ("top1", 0.75)


@pytest.mark.parametrize(
    ("gpus", "jobs", "trials", "expected"),
    [
        (["4", "7"], None, 5, ["4", "7"]),
        (["4", "7"], 3, 5, ["4", "7", "4"]),
        (["4", "7"], None, 1, ["4"]),
        (["0"], None, 5, ["0"]),
        (["0"], 2, 5, ["0", "0"]),
        (["GPU-1a", "MIG-2b"], None, 5, ["GPU-1a", "MIG-2b"]),
    ],
)
def test_each_local_trial_has_a_gpu_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str], jobs: int | None, trials: int, expected: list[str]
) -> None:
    monkeypatch.setattr("train.sweep.driver.visible_gpus", lambda: gpus)
    monkeypatch.setattr("train.sweep.driver.core_share", lambda: 12)
    workers, cores = local_workers(jobs, trials)
    assert cores == 12 // len(expected)
    assert [worker["env"]["CUDA_VISIBLE_DEVICES"] for worker in workers] == expected
    assert all(worker["resources"] == {"trial": 1} for worker in workers)


def test_the_gpus_that_a_sweep_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3c")
    assert visible_gpus() == ["5", "GPU-3c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_trial_sees_the_gpu_of_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr("train.sweep.trial.command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # as dask's nanny sets it in the worker
    run_trial(order(tmp_path / "trial", "x"), lambda: False)
    assert (tmp_path / "trial" / "log.txt").read_text().strip() == "7"


def test_a_trial_does_not_inherit_what_dask_sets_for_a_worker_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is a thread of this process, which stands for one that `dask worker` started."""
    from distributed import LocalCluster

    script = f"import os; print(os.environ.get({ALLOCATOR_VARIABLE!r}))"
    monkeypatch.setattr("train.sweep.trial.command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setenv(ALLOCATOR_VARIABLE, dask_defaults()[ALLOCATOR_VARIABLE])
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        cluster.get_client() as client,
    ):
        client.submit(run_on_worker, order(tmp_path / "trial", "x", cores=None), "stop").result()
    assert (tmp_path / "trial" / "log.txt").read_text().strip() == "None"


def test_local_trials_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.sweep.driver.visible_gpus", list)
    monkeypatch.setattr("train.sweep.driver.core_share", lambda: 12)
    shares = [
        (len(workers), cores) for workers, cores in (local_workers(jobs, 9) for jobs in (None, 2, 5, 20))
    ]
    assert shares == [(3, 4), (2, 6), (5, 2), (9, 1)]


def test_a_trial_has_its_part_of_the_cores_unless_the_user_set_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.sweep.trial.available_cores", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # dask's own, in every worker
    alone = environment(4, {})
    assert (alone["OMP_NUM_THREADS"], alone["MKL_NUM_THREADS"]) == ("4", "4")
    assert core_share(alone, cores=12) == 4
    chosen = environment(4, {"OMP_NUM_THREADS": "2"})
    assert (chosen["OMP_NUM_THREADS"], chosen["MKL_NUM_THREADS"]) == ("2", "4")
    assert core_share(chosen, cores=12) == 4


def test_what_dask_sets_is_not_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    for value, expected in (("1", {}), ("3", {"OMP_NUM_THREADS": "3"})):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert set_thread_variables(dask_defaults()) == expected
        assert set_thread_variables() == {"OMP_NUM_THREADS": value}


def test_threads_of_a_foreign_worker_are_divided_among_its_trials() -> None:
    assert thread_share(16, {"trial": 1}) == 16
    assert thread_share(16, {"trial": 4}) == 4
    assert thread_share(16, {}) == 1  # a trial on each thread
    assert thread_share(1, {"trial": 2}) == 1


def test_trial_folders_lie_below_the_sweep(tmp_path: Path) -> None:
    for student in ("timm:../../x", "resnet18", "/etc/passwd"):
        config = load_sweep_config({**STORE, "students": [student]})
        name = plan_names(config, student)
        folder = trial_folder(tmp_path, Trial(name, {}, False, None)).resolve()
        assert folder.parent == tmp_path / "trials"


def plan_names(config: Any, student: str) -> str:
    from train.sweep.config import trial_name

    return trial_name({"student": student, "seed": 0}, config, "f", "")


@pytest.mark.timeout(120)
def test_workers_that_cannot_be_started_are_one_line_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker whose start fails inside its process: dask's own exception says only that its nanny failed."""
    from train.sweep import driver

    (tmp_path / "broken_preload.py").write_text("raise OSError(12, 'Cannot allocate memory')\n")
    plain = driver.local_workers

    def workers(*arguments: Any) -> Any:
        found, cores = plain(*arguments)
        for worker in found:
            worker["preload"] = [str(tmp_path / "broken_preload.py")]
        return found, cores

    monkeypatch.setattr(driver, "local_workers", workers)
    config = load_sweep_config({**STORE, "students": "resnet18", "jobs": 1})
    with (
        pytest.raises(TrainError, match=r"^1 worker processes .*Cannot allocate memory; try fewer --jobs"),
        driver.cluster(config, 1),
    ):
        pass
