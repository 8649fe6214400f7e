"""The entry script as a process: options, output, exit codes and signals, seen from a parent like the platform."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.test_backend.platform_process import JAVA, SCRIPT, plain_environment, run_platform
from tests.test_backend.platform_server import PlatformServer, Received
from tests.test_backend.platform_site import Site

# The platform's own way where there is a JDK, else the same from Python.
PARENTS = ["java"] if JAVA else ["python"]


@pytest.mark.parametrize("parent", PARENTS)
def test_bad_options_are_one_line_and_exit_code_2(parent: str, site: Site, platform: PlatformServer) -> None:
    words = site.words(epochs="abc", api_base_url=platform.url)
    ended = run_platform(words, parent=parent)
    assert ended.lines == ["error: --epochs: expected a whole number, got 'abc'"]
    assert ended.code == 2
    assert platform.of("error")[0].query["errorMessage"] == "--epochs: expected a whole number, got 'abc'"


def test_bad_options_are_found_before_torch_is_imported(site: Site) -> None:
    """The whole check, to the last option, in a process that cannot import anything heavy."""
    code = (
        "import sys\n"
        "for name in ('torch', 'zarr', 'transformers', 'timm', 'ultralytics', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from backend.task.request import read_request\n"
        "print(read_request(sys.argv[1:]).student)\n"
    )
    words = site.words(student_model="resnet50")
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=SCRIPT.parent, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("resnet/resnet50\n", "")


def test_names_are_utf8_whatever_the_locale(site: Site, platform: PlatformServer) -> None:
    """As on a server whose locale is GBK or plain C: data sets are found under the names that the platform sends."""
    (site.datasets / "花").mkdir()
    ascii_only = plain_environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    ended = run_platform(
        site.words(dataset_id="花", val_dataset_id="不在", api_base_url=platform.url), environment=ascii_only
    )
    assert ended.lines == [f"error: --val_dataset_id: no data set at {site.datasets}/不在"]
    assert "不在" in platform.of("error")[0].query["errorMessage"]


def test_the_command_line_has_the_same_door(site: Site) -> None:
    command = [sys.executable, str(SCRIPT.with_name("cli.py")), "distill"]
    words = site.words(lora_rank="-1", new_option="x")
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --lora_rank: expected at least 0, got -1\n"
    page = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert page.returncode == 0
    assert "--hard_label_weight" in page.stdout


def test_a_gpu_that_is_not_there(words: Callable[..., list[str]], platform: PlatformServer) -> None:
    ended = run_platform(words(platform, gpu_devices=99))
    assert ended.code == 1
    assert "error: --gpu_devices: GPU 99 is not there" in ended.lines[-1]
    assert "GPU 99" in platform.of("error")[0].query["errorMessage"]


@pytest.mark.slow
@pytest.mark.parametrize("parent", PARENTS)
def test_a_training_from_start_to_end(
    parent: str, words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    """Every call, every file, output line by line, in UTF-8 under LANG=C, from the platform's own parent."""
    import torch

    environment = plain_environment(QWEN_DISTILL_API_TOKEN="s3cr3t")
    line = words(
        platform,
        auto_save_checkpoint="True",
        checkpoint_interval=2,
        num_classes=10,
        new_option="新",
        cache_dir=tmp_path / "cache",  # of its own: the lines of the extraction are part of the output
    )
    ended = run_platform(line, parent=parent, environment=environment)
    assert ended.code == 0, ended.text
    assert ended.lines[0] == "warning: unknown option --new_option: ignored"
    assert "花" in ended.text
    assert not any("\r" in text or "\x1b" in text for text in ended.lines)
    assert "s3cr3t" not in ended.text
    assert ended.times[-1] - ended.arrival("task 7: student") > 1  # lines come when they are written
    calls = platform.kinds()
    assert calls[0] == "progress"
    assert calls[-2:] == ["evaluations", "complete"]
    assert [call.body["epoch"] for call in platform.of("history")] == [1, 2]
    assert platform.of("model-path")[0].query["modelPath"] == str(tmp_path / "out" / "best_model.pt")
    assert all(call.headers["Authorization"] == "Bearer s3cr3t" for call in platform.calls)
    assert platform.of("evaluations")[0].body["evalSampleCount"] == 8
    for name in ("best_model.pt", "checkpoint_epoch_2.pt"):
        content = torch.load(tmp_path / "out" / name, weights_only=True)
        assert {"epoch", "model_state_dict", "accuracy", "config"} <= content.keys()
    assert not (tmp_path / "out" / "checkpoint_epoch_1.pt").exists()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert summary["platform"]["task_id"] == "7"
    assert not (tmp_path / "out" / "undelivered.jsonl").exists()


def weights(folder: Path) -> dict[str, Any]:
    import torch

    return dict(torch.load(folder / "best_model.pt", weights_only=True)["model_state_dict"])


def history(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "epoch_time_s"} for record in records]


def reported_epochs(calls: list[Received]) -> list[int]:
    return [call.body["epoch"] for call in calls if call.kind == "history"]


# Epochs of less than a tenth of a second, and so many that no delay lets a run end before it is stopped: each test
# of a stop says what must hold wherever between two epochs, or within one, the stop arrived.
QUICK_STUDENT: dict[str, object] = {"student_model": "timm:test_resnet"}
LONG = 60


@pytest.mark.slow
@pytest.mark.parametrize("parent", PARENTS)
def test_a_stop_in_training_is_resumed_as_if_it_had_not_been(
    parent: str, words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    options: dict[str, object] = {**QUICK_STUDENT, "epochs": LONG, "lr_scheduler": "cosine", "workers": 1}
    stopped = run_platform(words(platform, **options), stop_at=f"epoch 2/{LONG}", parent=parent)
    assert stopped.code == 143, stopped.text
    assert stopped.stop_s < 4
    assert not stopped.forced
    assert "stopped" in platform.of("error")[-1].query["errorMessage"]
    assert (tmp_path / "out" / "last.pt").exists()
    before = list(platform.calls)
    resumed = run_platform(words(platform, **options), parent=parent)
    assert resumed.code == 0, resumed.text
    assert "resuming it" in resumed.text
    first, second = reported_epochs(before), reported_epochs(platform.calls[len(before) :])
    assert len(first) >= 2
    assert second
    assert first + second == list(range(1, LONG + 1))
    undisturbed = run_platform(words(platform, **options, output_dir=tmp_path / "undisturbed"))
    assert undisturbed.code == 0, undisturbed.text
    assert history(tmp_path / "out") == history(tmp_path / "undisturbed")
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "undisturbed")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("parent", PARENTS)
def test_a_stop_in_extraction_is_resumed_as_if_it_had_not_been(
    parent: str, words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    """Extraction takes several seconds here, so that a stop after the teacher's line always falls into it."""
    options: dict[str, object] = {**QUICK_STUDENT, "dataset_id": "big", "epochs": 1, "image_size": 112}
    cache = tmp_path / "cache"
    stopped = run_platform(
        words(platform, **options, cache_dir=cache), stop_at="^teacher", delay_s=0.5, parent=parent
    )
    assert stopped.code == 143, stopped.text
    assert stopped.stop_s < 4
    assert not stopped.forced
    assert "stopped" in platform.of("error")[-1].query["errorMessage"]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    resumed = run_platform(words(platform, **options, cache_dir=cache))
    assert resumed.code == 0, resumed.text
    other = run_platform(
        words(platform, **options, cache_dir=tmp_path / "other", output_dir=tmp_path / "out2")
    )
    assert other.code == 0, other.text
    (one,), (two,) = (tuple((tmp_path / name).glob("*.zarr")) for name in ("cache", "other"))
    assert one.name == two.name
    assert same_features(one, two)
    assert history(tmp_path / "out") == history(tmp_path / "out2")


def same_features(one: Path, two: Path) -> bool:
    from store.reader import open_store

    first, second = open_store(one), open_store(two)
    return all(
        np.array_equal(
            first[split].read("features/pooled").view(np.uint16),
            second[split].read("features/pooled").view(np.uint16),
        )
        for split in ("train", "val")
    )


def start(line: list[str]) -> subprocess.Popen[str]:
    """The entry script, with its merged output to be read here."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *line],
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def read_to(process: subprocess.Popen[str], part: str) -> str:
    """The output up to the line that holds `part`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if part in line:
            return seen
    raise AssertionError(f"no line with {part!r}: {seen}")


def started_by(process: subprocess.Popen[str], kind: str = "") -> list[psutil.Process]:
    """The processes below one of ours; with `kind` only those workers (`task`, `rank`)."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            words = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if not kind or ["backend.task.worker", kind] == words[2:4]:
            found.append(child)
    return found


@pytest.mark.slow
def test_two_tasks_at_once_extract_once(
    words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    """The first is held where it extracts until the second waits for it: no luck is needed for them to meet."""
    options: dict[str, object] = {**QUICK_STUDENT, "epochs": 1, "cache_dir": tmp_path / "cache"}
    one = start(words(platform, **options, output_dir=tmp_path / "one"))
    read_to(one, "extracting into the cache")
    (worker,) = started_by(one, "task")
    worker.suspend()
    two = start(words(platform, **options, output_dir=tmp_path / "two"))
    read_to(two, f"waiting for the features that another task extracts (task 7, process {worker.pid}")
    worker.resume()
    outputs = [process.communicate(timeout=250)[0] for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    assert "features: taken from the cache" in outputs[1]
    assert "extracting into the cache" not in outputs[1]
    assert history(tmp_path / "one") == history(tmp_path / "two")


@pytest.mark.slow
def test_when_the_platform_kills_the_process_nothing_goes_on(
    words: Callable[..., list[str]], platform: PlatformServer
) -> None:
    process = start(words(platform, **QUICK_STUDENT, epochs=100_000, gpu_devices="cpu,cpu"))
    read_to(process, "epoch 1/100000")
    below = started_by(process)
    assert len(started_by(process, "task")) == 1
    assert len(started_by(process, "rank")) == 2
    process.kill()
    _, alive = psutil.wait_procs(below, timeout=60)
    # Nobody may be there to collect the dead.
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


@pytest.mark.slow
def test_a_second_sigterm_breaks_nothing_off(
    words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    process = start(words(platform, epochs=100_000))
    read_to(process, "epoch 1/100000")
    process.terminate()
    read_to(process, "stopping")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped" in platform.of("error")[-1].query["errorMessage"]
    assert (tmp_path / "out" / "last.pt").exists()


@pytest.mark.slow
def test_a_stalling_server_changes_nothing_but_the_report(
    words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    platform.behaviour = "stall"
    ended = run_platform(words(platform))
    assert ended.code == 0, ended.text
    kinds = [
        json.loads(line)["kind"] for line in (tmp_path / "out" / "undelivered.jsonl").read_text().splitlines()
    ]
    assert sorted(set(kinds)) == ["complete", "evaluations", "history", "model-path", "progress"]
    assert kinds.count("history") == 2
    assert "not everything was delivered" in ended.text


@pytest.mark.slow
def test_a_stop_while_a_stalling_server_holds_the_end_up(
    words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    """All the work is done, a minute is given to the report, and the stop cuts that short: nothing is lost."""
    platform.behaviour = "stall"
    ended = run_platform(
        words(platform, **QUICK_STUDENT),
        stop_at="task 7: complete",
        environment=plain_environment(QWEN_DISTILL_REPORT_SECONDS="60"),
    )
    assert ended.code == 143, ended.text
    assert ended.stop_s < 4
    lines = (tmp_path / "out" / "undelivered.jsonl").read_text().splitlines()
    assert "complete" in {json.loads(line)["kind"] for line in lines}


@pytest.mark.slow
def test_several_devices_are_ranks_and_stop_together(
    words: Callable[..., list[str]], platform: PlatformServer, tmp_path: Path
) -> None:
    options: dict[str, object] = {**QUICK_STUDENT, "gpu_devices": "cpu,cpu", "epochs": LONG}
    stopped = run_platform(words(platform, **options), stop_at=f"epoch 1/{LONG}")
    assert stopped.code == 143, stopped.text
    assert stopped.stop_s < 4
    assert not stopped.forced
    resumed = run_platform(words(platform, **options))
    assert resumed.code == 0, resumed.text
    assert [record["epoch"] for record in history(tmp_path / "out")] == list(range(1, LONG + 1))
    assert reported_epochs(platform.calls) == list(range(1, LONG + 1))
    assert platform.kinds()[-1] == "complete"


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_training(
    words: Callable[..., list[str]], platform: PlatformServer
) -> None:
    process = start(words(platform, **QUICK_STUDENT, gpu_devices="cpu,cpu", epochs=100_000))
    read_to(process, "epoch 1/100000")
    ranks = started_by(process, "rank")
    assert len(ranks) == 2
    ranks[-1].kill()
    assert "training failed, exit codes of the ranks" in process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "training failed" in platform.of("error")[-1].query["errorMessage"]
