"""YOLO students never ask for the network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train.yolo_runs import OPTIONS, ROOT, make_config
from train.errors import ConfigError
from train.run import run_training

pytest.importorskip("ultralytics")

UNREACHABLE = """
import json, socket, subprocess, sys, threading
attempts = []
def refuse(*arguments, **named):
    attempts.append(f"{threading.current_thread().name}: {arguments[-1:]}")
    raise OSError("no network in this test")
for name in ("getaddrinfo", "create_connection", "gethostbyname"):
    setattr(socket, name, refuse)
socket.socket.connect = refuse
started = []
class Popen(subprocess.Popen):
    def __init__(self, arguments, *others, **named):
        started.append(str(arguments))
        super().__init__(arguments, *others, **named)
subprocess.Popen = Popen
from train.config import TrainConfig
from train.run import run_training
run_training(TrainConfig(**eval(sys.argv[1])))
import ultralytics.utils
print(json.dumps({
    "attempts": attempts,
    "installers": [text for text in started if any(word in text for word in ("pip", "curl", "wget"))],
    "online": ultralytics.utils.ONLINE,
}))
"""


@pytest.mark.slow
def test_a_whole_training_with_plots_never_tries_to_connect(yolo_store: Path, tmp_path: Path) -> None:
    """In a process and home of its own, where nothing but our code says that there is no network.

    Plots are what asks for fonts. Any attempt to connect, to resolve a name or to install counts, threads included.
    """
    hidden = ("YOLO_", "ULTRALYTICS", "XDG_", "HF_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    options = {
        **OPTIONS,
        "store": str(yolo_store),
        "out": str(tmp_path / "out"),
        "epochs": 1,
        "control": True,
    }
    options["yolo_settings"] = "plots=true"
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, repr(options)],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"attempts": [], "installers": [], "online": False}
    written = tmp_path / "out" / "ultralytics"
    assert (written / "results.png").exists()
    assert (written / "labels.jpg").exists()
    settings = list(tmp_path.glob(".config/**/settings.json"))
    assert not settings  # the user's own settings of ultralytics are not touched


def test_telemetry_trackers_and_downloads_are_off() -> None:
    from ultralytics.utils import callbacks, checks, events, plotting

    from train.students.offline import prepare_ultralytics

    prepare_ultralytics()
    assert not events.events.enabled
    assert checks.ONLINE is False
    assert callbacks.add_integration_callbacks(object()) is None
    assert plotting.check_font("Arial.ttf") is None


WITHOUT_POLARS = """
import sys
class Hidden:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "polars":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "polars" else find(name, *rest)
from console.output import configure_logging
configure_logging()
from train.config import TrainConfig
from train.run import run_training
print(run_training(TrainConfig(**eval(sys.argv[1])))["epochs_done"])
"""


@pytest.mark.slow
def test_training_needs_no_polars(yolo_store: Path, tmp_path: Path) -> None:
    """ultralytics imports polars for its checkpoints and its plots: a machine without it trains, without plots."""
    options = {**OPTIONS, "store": str(yolo_store), "out": str(tmp_path / "out"), "epochs": 2}
    options["yolo_settings"] = "close_mosaic=1"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POLARS, repr(options)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["2"]
    assert "polars is not installed" in done.stderr
    written = tmp_path / "out" / "ultralytics"
    assert not list(written.glob("*.jpg"))
    assert not (written / "results.png").exists()
    from ultralytics.nn.tasks import torch_safe_load

    results = torch_safe_load(written / "last.pt", safe_only=True)[0]["train_results"]
    assert results["epoch"] == [1.0, 2.0]


def test_plots_without_polars_are_an_error_when_asked_for(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find(name) if name != "polars" else None
    )
    config = make_config(yolo_store, tmp_path / "out", yolo_settings="plots=true")
    with pytest.raises(
        ConfigError, match="plots=true: ultralytics draws plots with polars, which is not installed"
    ):
        run_training(config)
