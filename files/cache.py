"""Where this program keeps what can be fetched or computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str, variable: str | None = None) -> Path:
    """The folder in the environment variable, else `~/.cache/qwen-distill/<name>` (or below `$XDG_CACHE_HOME`)."""
    if variable is not None and (chosen := os.environ.get(variable)):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen-distill" / name
