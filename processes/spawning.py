"""Starting processes that need nothing of the program that starts them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
_lock = threading.RLock()


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a Python process that finds this checkout (or installation), and `more`."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, **more}


@contextmanager
def hide_main_module() -> Iterator[None]:
    """Processes that multiprocessing spawns meanwhile do not import the caller's program as `__mp_main__`.

    They would run every line of it that is not behind `if __name__ == "__main__":`, such as the call that started them.
    """
    with _lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType(
            "__main__"
        )  # without a file or a spec there is nothing to import
        try:
            yield
        finally:
            sys.modules["__main__"] = main
