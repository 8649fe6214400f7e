r"""File names that are not UTF-8: Python holds such bytes as lone surrogates, which no JSON file, terminal or store takes.

They are shown and recorded as `\xNN`, as in the keys of a store, and found again from that form.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")


def printable(text: str) -> str:
    r"""The text as valid Unicode: bytes of a file name that are not UTF-8, and lone surrogates, become `\xNN` (`\uNNNN`)."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that do not come from a file name
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def path_on_disk(path: Path) -> Path:
    r"""The file or folder that `path` means: itself, or what has bytes where it has `\xNN`, if only that exists."""
    text = os.fsencode(path)
    if b"\\x" not in text or os.path.lexists(path):
        return path
    found = Path(os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), text)))
    return found if os.path.lexists(found) else path
