"""YAML of others: aliases stay small, errors stay short."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.task.errors import OptionError
from backend.task.platform_yaml import flatten_file
from console.options import read_option_file
from files.reading import YamlError, load_yaml, load_yaml_documents

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
)
MERGES = "a: &a {k0: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}' if n else '*a'] * 9)}], k{n + 1}: 1}}\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("text: &t " + "x" * 50_000 + "\nlist: [" + "*t, " * 5_000 + "]\n", "aliases"),
        ("a: &a [*a]", "alias of itself"),
        ("a: &a {b: *a}", "alias of itself"),
        ("[" * 5_000, "nested too deeply"),
        ("a: [", "expected the node content"),
        ("? [a]\n: 1\n", "unhashable|hashable"),
        ("a: 1\n---\na: 2\n", "2 documents"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("x" * 10_000_001, "at most 10,000,000"),
        ("d: 2024-99-99\n", "month"),
    ],
)
def test_what_is_refused_is_one_short_line(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message) as raised:
        load_yaml(text)
    assert len(str(raised.value)) <= 301
    assert "\n" not in str(raised.value)


def test_ordinary_aliases_and_merges_are_read() -> None:
    text = "base: &base {lr: 0.1, names: &n [a, b]}\none: {<<: *base, lr: 0.2}\ntwo: *n\n"
    assert load_yaml(text) == {
        "base": {"lr": 0.1, "names": ["a", "b"]},
        "one": {"lr": 0.2, "names": ["a", "b"]},
        "two": ["a", "b"],
    }
    assert load_yaml("") is None
    assert list(load_yaml_documents("a: 1\n---\nb: 2\n")) == [{"a": 1}, {"b": 2}]


def test_option_files_and_the_platform_use_the_same_loader(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(BOMB)
    with pytest.raises(ValueError, match="aliases") as raised:
        read_option_file(file, ValueError)
    assert len(str(raised.value)) < 600
    with pytest.raises(OptionError, match="not valid YAML: aliases"):
        list(flatten_file(file, {}))
