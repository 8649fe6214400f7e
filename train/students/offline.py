"""ultralytics without the network: no downloads, no telemetry, no experiment trackers, no update checks.

Importing this module sets environment variables, before anything imports ultralytics: offline, no installing of
packages, no banners, settings apart from the user's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import Any

from files.cache import cache_folder
from train.errors import TrainError

PACKAGE = "ultralytics"
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ.setdefault("YOLO_VERBOSE", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", str(cache_folder("ultralytics")))

UNICODE_FONT = "Arial.Unicode.ttf"  # what ultralytics asks for where a class name is not ASCII
INSTALL = 'pip install "ultralytics>=8.4.190,<8.5"'


class UltralyticsMissingError(TrainError):
    """YOLO students need ultralytics, which is not installed."""


def prepare_ultralytics() -> None:
    """Import ultralytics and switch off everything in it that would use the network. Safe to call twice.

    `YOLO_OFFLINE` (set above) covers ultralytics that is imported for the first time; the
    switches below also cover a process that had. Only this process is affected, no settings file.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise UltralyticsMissingError(
            f"YOLO students need ultralytics, which is not installed: {INSTALL} (license AGPL-3.0)"
        )
    utils: Any = importlib.import_module("ultralytics.utils")
    checks: Any = importlib.import_module("ultralytics.utils.checks")
    events: Any = importlib.import_module("ultralytics.utils.events")
    for module in (utils, checks, events):
        module.ONLINE = False
    events.events.enabled = False
    callbacks: Any = importlib.import_module("ultralytics.utils.callbacks")
    callbacks.add_integration_callbacks = no_integrations
    for name in ("ultralytics.utils.checks", "ultralytics.utils.plotting", "ultralytics.data.utils"):
        importlib.import_module(name).check_font = local_font  # type: ignore[attr-defined]
    trainer: Any = importlib.import_module("ultralytics.engine.trainer")
    trainer.check_amp = amp_is_checked_elsewhere
    utils.LOGGER.setLevel(logging.WARNING)


def no_integrations(instance: Any) -> None:
    """Instead of telemetry, Platform, ClearML, Comet, DVC, MLflow and Ray Tune: nothing. We log ourselves."""


def local_font(font: str = "") -> str | None:
    """Instead of downloading Arial: None, for Pillow's own font, or for names outside ASCII one that has Chinese."""
    if font != UNICODE_FONT:
        return None
    from train.fonts import file_with

    path = file_with(frozenset("中文"))
    return None if path is None else str(path)


def amp_is_checked_elsewhere(model: Any) -> bool:
    """Instead of downloading a model to compare precisions with: the configured precision is taken."""
    return True
