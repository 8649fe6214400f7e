"""What `benchmarks/peers.py` measures, on real processes; LightlyTrain itself is not installed in the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.peers import Usage, epoch_and_start, link_photos, run_measured

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
filler = bytearray(80_000_000)
with open(sys.argv[1], "w") as file:
    for epoch in range(3):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        file.write('{"loss": 1}\\n{"epoch": %d}\\n{"epo' % epoch)
        file.flush()
        file.seek(file.tell() - 5)
    file.truncate()
time.sleep(0.5)
"""


def test_epochs_are_timed_by_their_records(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    used = run_measured([sys.executable, "-c", CHILD, str(metrics)], tmp_path / "log.txt", metrics)
    assert len(used.epoch_wall) == len(used.epoch_cpu) == 2
    assert sum(used.epoch_cpu) == pytest.approx(1.0, abs=0.4)
    assert sum(used.epoch_wall) < used.wall
    assert used.cpu == pytest.approx(1.5, abs=0.5)
    assert 80 < used.memory < 400


def test_a_command_that_fails_ends_the_benchmark_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ended with exit code 3:\nbroken"):
        run_measured([sys.executable, "-c", "print('broken'); raise SystemExit(3)"], tmp_path / "log.txt")


def test_an_epoch_is_the_median_and_the_rest_is_the_start() -> None:
    usages = [Usage(40, 20, 0, [10, 12], [5, 6]), Usage(50, 25, 0, [11, 11], [5, 5])]
    assert epoch_and_start(usages, "wall") == (11, 12)  # 40 - 33 and 50 - 33
    assert epoch_and_start(usages, "cpu") == (5, 7.5)


@pytest.mark.parametrize(("count", "held_out"), [(20, 2), (5, 1), (27, 2)])
def test_both_sides_get_the_photos_that_do_not_validate(tmp_path: Path, count: int, held_out: int) -> None:
    for number in range(40):
        place = tmp_path / "data" / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number}.jpg")
    folder = link_photos(tmp_path / "data", tmp_path / "photos", count)
    train, val = ({path.resolve() for path in (folder / name).iterdir()} for name in ("train", "val"))
    assert (len(train), len(val), train & val) == (count, held_out, set())
    with pytest.raises(SystemExit, match="40 photos, but --photos 400 needs 440"):
        link_photos(tmp_path / "data", tmp_path / "photos", 400)


def test_an_environment_without_lightly_train_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/peers.py", "--data", str(tmp_path), "--peer-python", sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"--peer-python {sys.executable}: ModuleNotFoundError: No module named 'lightly_train'; "
        "install lightly-train==0.18.0 there"
    )
