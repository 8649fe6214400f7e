"""Results on stdout: a table for people, one JSON object for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from console.redaction import redact, redact_values
from files.names import printable

MISSING = "-"


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
