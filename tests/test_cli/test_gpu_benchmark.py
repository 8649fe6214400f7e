"""benchmarks/gpu.py: figures survive a stage that fails or hangs, goals decide, and every stage runs end to end on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import FIGURE, GOALS, STAGES, StageResult, compare, failed, main, supervise

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_stage_that_fails_keeps_its_figures_and_says_why() -> None:
    result = supervise(
        command(f"print('{FIGURE}' + '{{\"rate\": 2.5}}'); raise ValueError('no such kernel')"), "tower", 30
    )
    assert (result.ok, result.figures, result.error) == (False, {"rate": 2.5}, "ValueError: no such kernel")


def test_a_stage_that_hangs_is_ended_with_its_children_at_the_deadline() -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"print('{FIGURE}' + '{{\"child\": ' + str(child.pid) + '}}', flush=True)\n"
        "time.sleep(60)"
    )
    result = supervise(command(program), "tower", 6)
    assert not result.ok
    assert result.error == "not finished after 6 s"
    assert result.seconds < 30
    ends = time.monotonic() + 10  # the kernel takes its time to end a process that has been killed
    while running(result.figures["child"]) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not running(result.figures["child"])


def running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def stage_results(**changes: float) -> dict[str, StageResult]:
    """Results in which every figure reaches its aim, but for `changes`."""
    results = {name: StageResult(name, True, 1.0) for name in STAGES}
    for goal in GOALS:
        results[goal.stage].figures[goal.figure] = changes.get(goal.figure, goal.aim)
    return results


def test_correctness_decides_the_exit_code_and_speed_does_not() -> None:
    assert not failed(stage_results())
    assert not failed(stage_results(images_per_second_224=1.0))
    assert failed(stage_results(float32_relative=0.1))
    missing = stage_results()
    del missing["extraction"].figures["resumed_identical"]
    assert failed(missing)


def test_the_table_has_a_verdict_for_each_goal() -> None:
    rows = compare(stage_results(images_per_second_224=1400.0, share_pooled=0.5))
    verdicts = {goal.figure: row["result"] for goal, row in zip(GOALS, rows, strict=True)}
    assert verdicts.pop("images_per_second_224") == "must reached"
    assert verdicts.pop("share_pooled") == "missed"
    assert set(verdicts.values()) == {"aim reached"}


def test_an_unknown_stage_lists_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--stages", "tower,towel"])
    assert stopped.value.code == 2
    assert "unknown towel; valid: ceilings, tower" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--work", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [line["stage"] for line in lines] == list(STAGES), run.stderr
    assert [line["error"] for line in lines] == [None] * len(STAGES), run.stderr
    assert run.returncode == 0, run.stdout
    figures = {line["stage"]: line["figures"] for line in lines}
    only_on_gpus = {"idle_pooled", "busy_resnet50", "syncs_per_step"}
    for goal in GOALS:
        assert goal.figure in figures[goal.stage] or goal.figure in only_on_gpus, goal.figure
    assert all(goal.text in run.stdout for goal in GOALS)
