"""The grammar of the platform's command line.

`--name value`, `--name=value`, bare booleans; underscores or dashes; the last of repeated options wins; an
unknown option is named in a warning and ignored together with its values. An option never takes a following
`--word` for its value, so text from a web form cannot become an option (`--name=--word` says it all the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from backend.errors import OptionError
from backend.options import OPTIONS, canonical_name
from backend.values import shown

BARE = object()


@dataclass
class Arguments:
    """What was read: typed values (None: given as empty, so unset), warnings, and all problems."""

    values: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises OptionError with every problem on one line."""
        if self.problems:
            raise OptionError("; ".join(self.problems))


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read a command line; problems are collected, not raised: `check` does that."""
    arguments = Arguments()
    raw: dict[str, Any] = {}
    for name, values in split_words(words):
        if name is None:
            arguments.warnings.append(f"ignored: {', '.join(shown(value) for value in values)}")
        elif canonical_name(name) not in OPTIONS:
            arguments.warnings.append(f"unknown option --{printable(name)}: ignored")
        else:
            take(arguments, raw, canonical_name(name), values)
    for name, value in raw.items():
        read_into(arguments, name, value)
    return arguments


def split_words(words: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Each option with the words up to the next one; words before the first option come under None."""
    groups: list[tuple[str | None, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((None, [word]))
    return groups


def take(arguments: Arguments, raw: dict[str, Any], name: str, values: list[str]) -> None:
    """Note the option's first value; surplus words are a mistake worth naming, not worth failing."""
    raw.pop(name, None)
    raw[name] = values[0] if values else BARE
    if len(values) > 1:
        surplus = ", ".join(shown(value) for value in values[1:])
        arguments.warnings.append(f"--{name} takes one value, ignored: {surplus}")


def read_into(arguments: Arguments, name: str, value: Any) -> None:
    option = OPTIONS[name]
    if value is BARE and option.kind != "boolean":
        arguments.problems.append(f"--{name}: expected a value, got none")
        return
    try:
        arguments.values[name] = True if value is BARE else option.read(value)
    except OptionError as error:
        arguments.problems.append(f"--{name}: {error}")


def printable(text: str) -> str:
    """A name from outside as a log line shows it: on one line, short."""
    return shown(text)[1:-1]
