"""Text that leaves the program: log lines on stderr; results on stdout, a table for people, one JSON object for machines.

Passwords, tokens and signatures in addresses are replaced by `***` in all of it, and in JSON files. One function for every
address: of databases, stores, the platform, dask schedulers and trackers, alone or inside a library's error message.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from files.names import printable

MISSING = "-"
ROOT = "qwen_distill"
STORE = "store"  # imports nothing of ours, so its loggers bear its own name
HIDDEN = "***"

# An address ends at a blank, a quote or a bracket. A password may itself contain `/` and `@`: the last `@` counts.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<rest>[^\s'\"<>`]*)")
# Names of parameters whose values are secrets, wherever they stand in the name: `X-Amz-Signature`, `sslpassword`.
_SECRET_WORDS = re.compile(
    r"pass(word|wd|phrase|code)?|pwd|secret|token|signature|credential|api[-_]?key|access[-_]?key|auth|odbc_connect",
    re.IGNORECASE,
)
_SECRET_NAMES = frozenset({"key", "sig", "pw", "jwt", "code", "session"})
_PARAMETER = re.compile(r"(?P<name>[^=&;?#]+)=(?P<value>[^&;#]*)")


def print_json(value: Any) -> None:
    """Print one JSON object (not-a-number becomes null, paths and numpy scalars become plain values)."""
    print(json.dumps(redact_values(plain_json(value)), ensure_ascii=False, indent=2), flush=True)


def plain_json(value: Any) -> Any:
    """The same value made of dict, list, str, int, float, bool and None only; texts are valid Unicode."""
    if isinstance(value, Mapping):
        return {printable(str(key)): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain_json(value.tolist())
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return printable(str(value))


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str], title: str | None = None
) -> None:
    """Print rows as a table: drawn by rich in a terminal, aligned plain text elsewhere.

    `columns` names the keys to show, in order; a mapping gives each its heading.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    cells = [[cell(row.get(name)) for name in headings] for row in rows]
    numeric = [all(isinstance(row.get(name), (int, float, NoneType)) for row in rows) for name in headings]
    if sys.stdout.isatty():
        print_rich_table(cells, list(headings.values()), numeric, title)
    else:
        print_plain_table(cells, list(headings.values()), numeric, title)


def cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return printable(redact(str(value)))
    return f"{value:,.0f}" if isinstance(value, int) or 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def print_plain_table(
    cells: Sequence[Sequence[str]], headings: Sequence[str], numeric: Sequence[bool], title: str | None
) -> None:
    if title:
        print(title)
    widths = [max(len(text) for text in column) for column in zip(headings, *cells, strict=True)]
    for line in (headings, *cells):
        parts = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(parts).rstrip(), flush=True)


def print_rich_table(
    cells: Sequence[Sequence[str]], headings: Sequence[str], numeric: Sequence[bool], title: str | None
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for heading, right in zip(headings, numeric, strict=True):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(text) for text in line))
    Console().print(table)


def get_logger(name: str) -> logging.Logger:
    """The logger of a part of the program; it prints nothing until `configure_logging` was called."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure_logging(level: int = logging.INFO) -> None:
    """Print our log lines on stderr; calling it again changes the level only.

    Libraries' own loggers are left alone. Only commands call this: importing the package must not.
    """
    for name in (ROOT, STORE):
        ours = logging.getLogger(name)
        ours.setLevel(level)
        ours.propagate = False
        if not ours.handlers:
            handler = StderrHandler()
            handler.setFormatter(Formatter("%(message)s"))
            ours.addHandler(handler)
    # torch warns about torchao's classes whenever both are installed: nothing that a user could act on.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever `sys.stderr` is now: tests and the platform's entry point replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class Formatter(logging.Formatter):
    """`warning: text` from level WARNING on, the bare text below; passwords in addresses are hidden."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(redact(super().format(record)))
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def redact(text: str) -> str:
    """The text with the secrets of every `scheme://…` address in it replaced by `***`.

    Hidden are the password before `@` (for http and https also a name alone, which is a token there) and the values of
    parameters after `?` or `#` whose names speak of a secret.
    """
    return _ADDRESS.sub(_redact_address, text) if "://" in text else text


def redact_values(value: Any) -> Any:
    """`redact` of every text in a JSON value; keys stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    return [redact_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def secrets_of(address: str) -> list[str]:
    """The secrets in an address, as written and percent-decoded: a library's message may repeat them alone."""
    from urllib.parse import unquote_plus

    found = []
    for match in _ADDRESS.finditer(address):
        user, _, parameters = _split_user(match["rest"])
        if user is not None and ":" in user:
            found.append(user.partition(":")[2])
        found += [p["value"] for p in _PARAMETER.finditer(parameters) if _is_secret(p["name"])]
    written = [secret for secret in found if secret]
    return sorted({*written, *map(unquote_plus, written)}, key=len, reverse=True)


def _redact_address(match: re.Match[str]) -> str:
    scheme = match["scheme"]
    user, host, parameters = _split_user(match["rest"])
    parameters = _PARAMETER.sub(
        lambda part: f"{part['name']}={HIDDEN}" if _is_secret(part["name"]) and part["value"] else part[0],
        parameters,
    )
    if user is None:
        return f"{scheme}://{host}{parameters}"
    name, colon, _ = user.partition(":")
    if not colon and scheme.lower() in ("http", "https"):
        name = HIDDEN
    return f"{scheme}://{name}{':' + HIDDEN if colon else ''}@{host}{parameters}"


def _split_user(rest: str) -> tuple[str | None, str, str]:
    """`user:password`, the address after `@`, and everything from the first `?` or `#` after that."""
    user, at, tail = rest.rpartition("@")
    if at and not re.search(r"[?#][^@]*=", user):  # an `@` among the parameters belongs to them
        found: str | None = user
    else:
        found, tail = None, rest
        authority = re.match(r"([^/?#@]*)@", rest)
        if authority:
            found, tail = authority[1], rest[authority.end() :]
    place = re.search(r"[?#]", tail)
    cut = place.start() if place else len(tail)
    return found, tail[:cut], tail[cut:]


def _is_secret(name: str) -> bool:
    plain = name.lower()
    return plain in _SECRET_NAMES or _SECRET_WORDS.search(plain) is not None
