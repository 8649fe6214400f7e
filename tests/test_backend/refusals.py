"""What the platform's entry point says to a command line that it refuses."""

from __future__ import annotations

import pytest

from backend.task.errors import OptionError
from backend.task.request import read_request


def problem(words: list[str]) -> str:
    with pytest.raises(OptionError) as caught:
        read_request(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)
