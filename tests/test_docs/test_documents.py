"""The documents: every link, path, command, option and quoted message in them exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cli import COMMANDS, load

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?:\]\(|<img src=\")([^)\s\"]+)")
SPAN = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
OUR_PATH = re.compile(
    r"(backend|benchmarks|commands|console|docs|extract|files|imaging|processes|scripts|store|tests|train)"
    r"/[\w./*-]*(\.\w+|/)"
)
README_LINES = 180
PICTURE_BYTES = 150_000
PLATFORM_SYMPTOMS = 12  # rows of the last table of docs/platform.md


@cache
def tracked_files() -> tuple[Path, ...]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file())


def documents() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".md"]


def product_files() -> list[Path]:
    outside = {"tests", "benchmarks", "scripts"}
    return [
        path
        for path in tracked_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] not in outside
    ]


def blocks_and_prose(text: str) -> tuple[list[str], str]:
    """The lines of code blocks (fenced or indented), and everything else."""
    code, prose, fenced = [], [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
        else:
            prose.append(line)
    return code, "\n".join(prose)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@cache
def options_of(command: str) -> frozenset[str]:
    made = load(command, COMMANDS[command])
    names = {name for parameter in made.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return frozenset({*names, "--help", "--debug"})


@cache
def platform_options() -> frozenset[str]:
    """The options of `cli distill`, which has a grammar of its own."""
    command = [sys.executable, "-m", "cli", "distill", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(OPTION.findall(shown))


def known_options() -> set[str]:
    known = {option for command in COMMANDS for option in options_of(command)} | platform_options()
    return known | {"--install-completion", "--version", *script_options()}


@cache
def script_options() -> frozenset[str]:
    files = [path for path in tracked_files() if path.relative_to(ROOT).parts[0] in ("benchmarks", "scripts")]
    return frozenset(name for path in files for name in declared_options(path))


def declared_options(path: Path) -> set[str]:
    return {name for text in string_literals(path) for name in OPTION.findall(text)}


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of every `cli …` and `python FILE …` that a document shows, in blocks and in prose."""
    code, prose = blocks_and_prose(text.replace("\\\n", " "))
    shown = [line.split("  #")[0] for line in code if not line.startswith("#")] + SPAN.findall(prose)
    for line in shown:
        for part in re.split(r" && | \|\| ", line):
            part = re.sub(r"^(srun |\w+=\S+ )+", "", part.strip())
            if part.startswith(("cli ", "python benchmarks/", "python scripts/", "python3 benchmarks/")):
                yield shlex.split(part, posix=True)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    broken = []
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_document_exist_with_their_options(path: Path) -> None:
    problems = []
    for words in commands_in(path.read_text(encoding="utf-8")):
        given = {match for word in words for match in OPTION.findall(word.split("=")[0])}
        if words[0] == "cli":
            if words[1].startswith("-") or words[1] == "…":
                known = known_options()
            elif words[1] not in COMMANDS:
                problems.append(" ".join(words))
                continue
            else:
                known = set(options_of(words[1])) | (platform_options() if words[1] == "distill" else set())
        else:
            script = ROOT / words[1]
            if not script.is_file():
                problems.append(" ".join(words))
                continue
            known = declared_options(script) | {"--help"}
        problems += [f"{' '.join(words)}: {option}" for option in sorted(given - known)]
    assert not problems


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_options_and_paths_in_prose_exist(path: Path) -> None:
    _, prose = blocks_and_prose(path.read_text(encoding="utf-8"))
    missing, options = [], known_options()
    for span in SPAN.findall(prose):
        name = OPTION.match(span)
        # `--lora-*` and `--no-NAME` stand for all options that begin so.
        if name and not any(
            known == name[0] or (name[0].endswith("-") and known.startswith(name[0])) for known in options
        ):
            missing.append(span)
        if OUR_PATH.fullmatch(span) and not list(ROOT.glob(span)):
            missing.append(span)
    assert not missing


def test_cited_documents_are_in_the_tree() -> None:
    names = {path.name for path in documents()}
    cited = re.compile(r"\b[A-Za-z][A-Za-z0-9_.-]*\.md\b")
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in tracked_files()
        if path.suffix in (".py", ".md", ".toml", ".sh") and path != Path(__file__).resolve()
        for name in cited.findall(path.read_text(encoding="utf-8"))
        if name not in names and "`NAME.md`" not in name
    ]
    assert not missing


def test_both_readmes_have_the_same_sections_commands_and_links() -> None:
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
    )
    for text in (english, chinese):
        assert len(text.splitlines()) <= README_LINES
    for pattern in (r"^(#+) ", r"^(```\w*|!\[|<img|\|---)"):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(pattern, chinese, re.MULTILINE)
    assert list(commands_in(english)) == list(commands_in(chinese))
    own = {"README.md", "README.zh-CN.md"}
    links = [
        [target.replace(".zh-CN", "") for target in LINK.findall(text) if target not in own]
        for text in (english, chinese)
    ]
    assert links[0] == links[1]


def test_the_platform_pages_have_the_same_sections_and_tables() -> None:
    pages = [
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("platform.md", "platform.zh-CN.md")
    ]
    numbers = [re.findall(r"^## (\d+)\.", page, re.MULTILINE) for page in pages]
    rows = [[line.count("|") for line in page.splitlines() if line.startswith("|")] for page in pages]
    assert numbers[0] == numbers[1]
    assert rows[0] == rows[1]


def test_pictures_are_small() -> None:
    pictures = [path for path in tracked_files() if path.suffix in (".png", ".webp")]
    assert pictures
    assert [path.name for path in pictures if path.stat().st_size > PICTURE_BYTES] == []


@cache
def string_literals(path: Path) -> tuple[str, ...]:
    """The string constants of a Python file; what an f-string inserts is `…`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return tuple(found)


@pytest.mark.parametrize("name", ["troubleshooting.md", "platform.md", "platform.zh-CN.md"])
def test_quoted_messages_are_those_of_the_program(name: str) -> None:
    """Each `message` in the tables of error messages is in the code; … stands for what varies."""
    literals = "\0".join(text for path in product_files() for text in string_literals(path))
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    rows = rows if name == "troubleshooting.md" else rows[-PLATFORM_SYMPTOMS:]
    quoted = [span for row in rows for span in SPAN.findall(row) if " " in span]
    assert quoted
    missing = []
    for message in quoted:
        pieces = [piece.strip() for piece in message.split("…")]
        missing += [message for piece in pieces if len(piece) > 3 and piece not in literals][:1]
    assert not missing
