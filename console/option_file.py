"""Options from a file: the same names as on the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from files.reading import load_yaml


def read_option_file(file: Path, error: type[Exception]) -> dict[str, Any]:
    """The options in a `.yaml`, `.yml`, `.toml` or `.json` file; dashes in names count as underscores.

    Raises `error`, the caller's own kind, when the file cannot be read or holds no table of options.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = tomllib.loads(text) if file.suffix == ".toml" else load_yaml(text)
    except OSError as problem:
        raise error(f"configuration {file}: cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"configuration {file}: {' '.join(str(problem).split())[:500]}") from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise error(f"configuration {file}: expected `name: value` lines, got {got}")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
