"""Options from a file: the same names as on the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def read_option_file(file: Path, error: type[Exception]) -> dict[str, Any]:
    """The options in a `.yaml`, `.yml`, `.toml` or `.json` file; dashes in names count as underscores.

    Raises `error`, the caller's own kind, when the file cannot be read or holds no table of options.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        content: Any = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except OSError as problem:
        raise error(f"configuration {file}: cannot be read: {problem.strerror}") from None
    except (ValueError, yaml.YAMLError) as problem:
        raise error(f"configuration {file}: {' '.join(str(problem).split())}") from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise error(f"configuration {file}: expected `name: value` lines, got {got}")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
