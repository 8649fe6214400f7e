"""The demo on a user's own data, whatever its annotations are; and the next command that `extract` proposes."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_backend.platform_data import make_clips, make_masks, make_yolo, pictures

ROOT = Path(__file__).parents[2]


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", "demo", "--smallest", "--out", str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def make_unlabelled(root: Path) -> Path:
    root.mkdir(parents=True)
    for number, picture, _ in pictures(0, 24):
        picture.save(root / f"{number}.png")
    return root


def test_data_that_cannot_be_opened_ends_the_demo_before_it_writes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run_demo(tmp_path / "out", "--data", str(tmp_path / "empty"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no images in {tmp_path / 'empty'}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    done = run_demo(tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr == f"error: --out {tmp_path / 'out'}: cannot be created: File exists\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "student", "metric"),
    [
        (make_unlabelled, "resnet18 --out runs/resnet18 --task features", "cosine"),
        (make_yolo, "yolov8n --out runs/yolov8n", "map50_95"),
        (make_masks, "unet/small --out runs/unet-small", "miou"),
        (make_clips, "lstm/small --out runs/lstm-small", "top1"),
    ],
)
def test_the_demo_takes_any_data(
    make: Callable[[Path], Path], student: str, metric: str, tmp_path: Path
) -> None:
    data, out = make(tmp_path / "data"), tmp_path / "out"
    done = run_demo(out, "--data", str(data))
    assert done.returncode == 0, done.stderr
    assert f"next: cli train {out / 'features.zarr'} --student {student}\n" in done.stdout
    assert f"The report: {out / 'sweep' / 'report.html'}" in done.stdout
    with (out / "sweep" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    assert all(row[metric] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_that_runs_in_its_own_way(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "demo", "--smallest", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        lines = iter(demo.stderr.readline, "")
        assert any("folder data set" in line for line in lines), "the extraction never began"
        demo.send_signal(number)
        rest = list(lines)
    assert demo.returncode == 128 + number
    assert any(line.startswith("stopped: ") and "Go on with: cli extract" in line for line in rest)
    assert rest[-1] == "the demo was stopped: the same command continues\n"
