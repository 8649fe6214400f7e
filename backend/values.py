"""How one value of the platform is read, whether it came as text on a command line or typed in JSON."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from backend.errors import OptionError
from files.reading import open_regular

WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0+)?", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", re.ASCII)
TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})
LONGEST_TEXT = 100_000
LONGEST_SHOWN = 60


def shown(value: object) -> str:
    """A value as an error message shows it: printable, on one line, short."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def as_boolean(value: Any) -> bool:
    """`True`, `true`, `1`, `yes`, `on` and their opposites, in any case."""
    word = str(value).strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise OptionError(f"expected true or false, got {shown(value)}")


def as_integer(value: Any) -> int:
    """`32` and `32.0`; booleans and fractions are refused."""
    text = number_text(value)
    if not WHOLE.fullmatch(text):
        raise OptionError(f"expected a whole number, got {shown(value)}")
    return int(text.partition(".")[0])


def as_float(value: Any) -> float:
    """`0.0001`, `1.0E-4`, `.5`, `32`; infinity and not-a-number are refused."""
    text = number_text(value)
    if not DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
        raise OptionError(f"expected a number, got {shown(value)}")
    return float(text)


def number_text(value: Any) -> str:
    """The text of a number; empty, which no pattern matches, for anything that is none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    if isinstance(value, int) and abs(value) >= 10**18:
        return ""
    return str(value).strip()


def as_text(value: Any) -> str:
    """Text with no control characters; a number in JSON (`"datasetId": 12`) counts as its text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise OptionError(f"expected text, got {shown(value)}")
    if isinstance(value, int) and abs(value) >= 10**18:
        raise OptionError(f"expected text, got {shown(str(type(value)))}")
    text = str(value).strip()
    if len(text) > LONGEST_TEXT:
        raise OptionError(f"expected at most {LONGEST_TEXT} characters, got {len(text)}")
    if not all(is_plain(character) for character in text):
        raise OptionError(f"control characters are not allowed, got {shown(text)}")
    return text


def as_multiline_text(value: Any) -> str:
    """Text where line breaks and tabs count as spaces: an SQL query, a JSON document."""
    return as_text(re.sub(r"[\r\n\t]+", " ", value) if isinstance(value, str) else value)


def as_list(value: Any) -> str:
    """`a,b` or `["a", "b"]` as `a,b`, without spaces and empty items."""
    items = value if isinstance(value, list) else as_text(value).split(",")
    return ",".join(text for text in (as_text(item) for item in items) if text)


def read_text_file(path: Path, largest_bytes: int = 1_000_000) -> str:
    """A small UTF-8 text file. Devices and pipes, which a web form could name, are not read.

    Raises:
        OptionError: when it is no regular file, too large, unreadable or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            content = file.read(largest_bytes + 1)
        if len(content) > largest_bytes:
            raise OptionError(f"{shown(str(path))} is larger than {largest_bytes} bytes")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise OptionError(f"cannot read {shown(str(path))}: {reason}") from None


def is_plain(character: str) -> bool:
    """False for control characters, line separators and lone surrogates (undecodable bytes of argv)."""
    code = ord(character)
    return not (code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029) or 0xD800 <= code <= 0xDFFF)
