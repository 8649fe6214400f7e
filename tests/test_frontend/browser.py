"""A real server process, and a window of a real browser on it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
#: Kept after the tests, for people to look at; git ignores the folder.
SCREENSHOTS = ROOT / "test-results" / "screenshots"
PHONE = {"width": 375, "height": 740}
DESKTOP = {"width": 1280, "height": 860}


class Site:
    """`cli serve` in a process of its own, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.datasets, self.models, self.output = (root / name for name in ("datasets", "models", "output"))
        for folder in (self.datasets, self.models, self.output):
            folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = root / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        roots = [f"--{name}-root={self.root / name}" for name in ("datasets", "models", "output")]
        command = [sys.executable, "-m", "cli", "serve", f"--port={self.port}", *roots, "--jobs=1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.wait(lambda: self.process.poll() is None and self.answers(), 60)  # type: ignore[union-attr]

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/model-distillation/tasks", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def call(self, method: str, path: str, **rest: Any) -> Any:
        answer = httpx.request(method, f"{self.url}/model-distillation{path}", timeout=30, **rest).json()
        assert answer["code"] == 200, answer
        return answer["data"]

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.2)

    def wait_for(self, task_id: str, *states: str, seconds: float = 120) -> dict[str, Any]:
        """The task as soon as it is in one of the states."""
        self.wait(lambda: self.call("GET", f"/tasks/{task_id}")["state"] in states, seconds)
        return dict(self.call("GET", f"/tasks/{task_id}"))


class Visitor:
    """One browser window. It fails the test for requests to other hosts, errors of scripts and missing files."""

    def __init__(self, browser: Any, site: Site, size: dict[str, int], language: str, theme: str) -> None:
        self.site = site
        self.troubles: list[str] = []
        self.context = browser.new_context(viewport=size, locale="en-US", accept_downloads=True)
        self.context.add_cookies(
            [
                {"name": f"distill_{name}", "value": value, "url": site.url}
                for name, value in (("language", language), ("theme", theme))
            ]
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.troubles.append(f"script: {error}"))
        self.page.on("console", self.note_console)
        self.page.on("request", self.watch)

    def watch(self, request: Any) -> None:
        if not request.url.startswith((self.site.url, "data:", "blob:", "about:")):
            self.troubles.append(f"request to another host: {request.url}")

    def note_console(self, message: Any) -> None:
        # A server that is away is part of some tests.
        if message.type == "error" and "ERR_CONNECTION_REFUSED" not in message.text:
            self.troubles.append(f"console: {message.text}")

    def open(self, path: str) -> Any:
        self.page.goto(self.site.url + path)
        self.page.wait_for_selector("h1, .empty")
        self.page.wait_for_function("window.socket === undefined || window.socket.connected")
        return self.page

    def keep(self, name: str) -> None:
        """A screenshot of the whole page, kept after the tests."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.evaluate("scrollTo(0, 0)")
        self.page.wait_for_timeout(300)  # fonts and transitions
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def unnamed(self) -> list[str]:
        """Controls that a screen reader cannot name."""
        return list(self.page.evaluate(UNNAMED))

    def close(self) -> None:
        self.context.close()
        assert self.troubles == []


UNNAMED = """() => [...document.querySelectorAll('button, a[href], input, [role=button], [role=switch], [role=tab], img')]
  .filter(e => e.offsetParent !== null)
  .filter(e => !(e.getAttribute('aria-label') || e.innerText?.trim() || e.getAttribute('alt') || e.placeholder
    || (e.labels && [...e.labels].some(l => l.innerText.trim())) || e.closest('label')?.innerText?.trim()
    || e.closest('[aria-label]') || e.getAttribute('aria-labelledby') || e.getAttribute('aria-hidden') === 'true'))
  .map(e => e.outerHTML.slice(0, 200))"""
