"""CONTRIBUTING.md says how an image gets from the command into a shard: an extraction goes that way."""

from __future__ import annotations

from typing import Any

from commands.extract import extract
from tests.paths import described_path, first_missing, traced_calls


def test_an_extraction_follows_the_described_path(extract_options: dict[str, Any]) -> None:
    path = described_path("From command to shard")
    options = {name: str(value) for name, value in extract_options.items()}
    calls = traced_calls(lambda: extract(json=True, **{**options, "workers": 0}), path)
    assert len(path) >= 10
    assert first_missing(path, calls) is None
    assert first_missing(path[::-1], calls) is not None
