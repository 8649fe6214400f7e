"""Starts the entry script as the platform does: a parent of its own that reads merged output line by line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_qwen_vl_distillation.py"
LAUNCHER = Path(__file__).with_name("PlatformLauncher.java")
JAVA = shutil.which("java")


@dataclass
class Ended:
    """What the parent saw: lines with their arrival (seconds), exit code, seconds from the stop to the end."""

    code: int = -1
    stop_s: float = -1.0
    forced: bool = False
    lines: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def arrival(self, part: str) -> float:
        """When the first line with `part` arrived."""
        return next(at for line, at in zip(self.lines, self.times, strict=True) if part in line)


def plain_environment(**changes: str) -> dict[str, str]:
    """The environment of a service: no UTF-8 locale, nothing of ours."""
    dropped = re.compile(r"LC_|LANG|PYTHON|QWEN_DISTILL")
    kept = {name: value for name, value in os.environ.items() if not dropped.match(name)}
    return kept | {"LANG": "C", "QWEN_DISTILL_REPORT_SECONDS": "3"} | changes


def run_platform(
    words: Sequence[str],
    *,
    stop_at: str = "",
    delay_s: float = 0.0,
    parent: str = "python",
    environment: dict[str, str] | None = None,
    timeout_s: float = 250,
) -> Ended:
    """Run the entry script with `words`; at the first line that matches `stop_at`, `delay_s` later, stop it.

    `parent`: `java` is the platform's own way (ProcessBuilder), `python` the same without a virtual machine.
    """
    command = [sys.executable, str(SCRIPT), *words]
    environment = environment or plain_environment()
    run = run_java if parent == "java" else run_python
    return run(command, stop_at, delay_s, environment, timeout_s)


def run_java(
    command: list[str], stop_at: str, delay_s: float, environment: dict[str, str], timeout_s: float
) -> Ended:
    assert JAVA is not None
    launch = [JAVA, "-XX:TieredStopAtLevel=1", str(LAUNCHER), stop_at, str(round(delay_s * 1000)), *command]
    # Java decodes its own arguments by the locale; the child gets the plain environment through env(1).
    unset = [word for name in ("LC_ALL", "LANG") for word in ("-u", name)]
    child = ["env", *unset, "LANG=C", *command]
    launch = [*launch[: -len(command)], *child]
    output = subprocess.run(
        launch,
        env=environment | {"LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        timeout=timeout_s,
        check=False,
    ).stdout.decode("utf-8")
    ended = Ended()
    for line in output.split("\n"):
        kind, _, rest = line.partition(" ")
        if kind == "LINE":
            at, _, text = rest.partition(" ")
            ended.times.append(int(at) / 1000)
            ended.lines.append(text)
        elif kind == "EXIT":
            code, took, forced = rest.split()
            ended.code, ended.stop_s, ended.forced = int(code), int(took) / 1000, forced == "true"
    return ended


def run_python(
    command: list[str], stop_at: str, delay_s: float, environment: dict[str, str], timeout_s: float
) -> Ended:
    ended, started, stopped = Ended(), time.monotonic(), 0.0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    guard = threading.Timer(timeout_s, process.kill)
    guard.start()
    killer = threading.Timer(5, process.kill)
    assert process.stdout is not None
    for raw in process.stdout:
        ended.lines.append(raw.decode("utf-8").removesuffix("\n"))
        ended.times.append(time.monotonic() - started)
        if stop_at and not stopped and re.search(stop_at, ended.lines[-1]):
            time.sleep(delay_s)
            stopped = time.monotonic()
            process.terminate()
            killer.start()
    ended.code = process.wait()
    ended.stop_s = time.monotonic() - stopped if stopped else -1.0
    for timer in (guard, killer):
        timer.cancel()
    ended.forced = ended.code == -9
    return ended
