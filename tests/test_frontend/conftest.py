"""The server, the browser and their material, shared by the tests of the pages."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.make_pictures import with_chinese_font
from tests.test_frontend.browser import DESKTOP, Site, Visitor

CHROMIUM = Path("/usr/bin/chromium")
TEACHER = "Qwen2.5-VL-tiny"


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of scanned digits and a small teacher, as `make serve` has them."""
    from commands.images import write_digits
    from extract.teachers.tiny import make_tiny_teacher

    root = tmp_path_factory.mktemp("material")
    write_digits(root / "digits", 60)
    make_tiny_teacher(root / TEACHER, depth=1)
    return root


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, material: Path) -> Iterator[Site]:
    """A server with one data set, one teacher and no tasks."""
    made = Site(tmp_path_factory.mktemp("site"))
    for name, root in (("digits", made.datasets), (TEACHER, made.models)):
        shutil.copytree(material / name, root / name, copy_function=os.link)
    made.start()
    yield made
    for task in made.call("GET", "/tasks")["items"]:
        if task["state"] in ("QUEUED", "RUNNING"):
            made.call("POST", f"/tasks/{task['taskId']}/stop")
            made.wait_for(task["taskId"], "STOPPED", "CREATED", "FAILED", "COMPLETED", seconds=30)
    made.kill(signal.SIGTERM)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium without a window; skips where it is not installed.

    Not for the session: Playwright keeps an event loop running, and other modules' tests start their own.
    """
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # other tests run beside these

    environment = with_chinese_font(tmp_path_factory.mktemp("fonts"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], env=environment
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, site: Site) -> Iterator[Callable[..., Visitor]]:
    """`visit(size, language, theme)`: a new window; all are closed, and checked, at the end of the test."""
    opened: list[Visitor] = []

    def open_window(size: dict[str, int] = DESKTOP, language: str = "en", theme: str = "light") -> Visitor:
        opened.append(Visitor(chromium, site, size, language, theme))
        return opened[-1]

    yield open_window
    for visitor in opened:
        visitor.close()
