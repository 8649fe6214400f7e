"""YOLO students never ask for the network."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.test_train.yolo_runs import (
    make_config,
)
from train.engine.yolo.run import run_yolo

pytest.importorskip("ultralytics")


@pytest.mark.slow
def test_training_with_plots_uses_no_network(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plots are what asks for fonts. Any attempt to connect or to resolve a name fails the test, threads included."""
    import socket

    attempts: list[str] = []

    def refuse(*arguments: Any, **named: Any) -> Any:
        attempts.append(f"{threading.current_thread().name}: {arguments[-1:]}")
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = tmp_path / "out"
    run_yolo(make_config(yolo_store, out, epochs=1, yolo_settings="plots=true"))
    assert not attempts
    assert (out / "ultralytics" / "results.png").exists()
    assert (out / "ultralytics" / "labels.jpg").exists()


def test_telemetry_trackers_and_downloads_are_off() -> None:
    from ultralytics.utils import callbacks, checks, events, plotting

    from train.engine.yolo.offline import prepare_ultralytics

    prepare_ultralytics()
    assert not events.events.enabled
    assert checks.ONLINE is False
    assert callbacks.add_integration_callbacks(object()) is None
    assert plotting.check_font("Arial.ttf") is None
