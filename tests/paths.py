"""Our packages, the paths through the code that CONTRIBUTING.md describes, and the calls that a piece of work makes."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The importable names of the product.
OURS = {
    *("backend", "cli", "commands", "console", "extract", "files", "frontend"),
    *("imaging", "processes", "store", "train"),
}

Call = tuple[str, str]  # file relative to the root, qualified name


def described_path(title: str) -> list[Call]:
    """The rows of the table below a heading of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"### {title}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", section, re.MULTILINE)


def traced_calls(work: Callable[[], Any], wanted: list[Call]) -> list[Call]:
    """The wanted functions in the order in which `work` calls them, in all threads that it starts."""
    codes = set(wanted)
    calls: list[Call] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            call = (frame.f_code.co_filename[len(str(ROOT)) + 1 :], frame.f_code.co_qualname)
            if call in codes:
                calls.append(call)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return calls


def first_missing(path: list[Call], calls: list[Call]) -> Call | None:
    """The first step of the path that does not come after the one before it; None when the calls follow it."""
    left = iter(calls)
    return next((step for step in path if step not in left), None)
