"""Output for a parent that reads lines: no colours, no redrawn bars, and no error when the parent is gone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from backend.task.plain_output import PlainStream

ROOT = Path(__file__).resolve().parents[2]


def written(*texts: str) -> str:
    target = io.StringIO()
    stream = PlainStream(target)
    for text in texts:
        stream.write(text)
    stream.finish()
    return target.getvalue()


def test_lines_are_written_whole() -> None:
    assert written("a", "b\nc", "\n", "d") == "ab\nc\nd\n"


def test_colours_go() -> None:
    assert written("\x1b[1m\x1b[38;5;12mbold\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07\n") == "bold link\n"


def test_of_a_redrawn_line_the_last_state_stays() -> None:
    assert written("1/3\r", "2/3\r", "\x1b[K3/3\n", "a\r\n") == "3/3\na\n"


def test_a_bar_without_an_end_needs_no_memory() -> None:
    stream = PlainStream(io.StringIO())
    for _ in range(1000):
        stream.write("x" * 1000)
    assert len(stream.pending) <= 66_536


def test_a_parent_that_closed_the_pipe_is_no_error() -> None:
    """As after Java's Process.destroy(): the process goes on, saves, and ends with its own exit code."""
    code = (
        "import sys, os\n"
        "from backend.task.plain_output import use_plain_output\n"
        "use_plain_output()\n"
        "sys.stdin.readline()\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    for _ in range(3):\n"
        "        print('x' * 100_000, file=stream, flush=True)\n"
        "os._exit(43)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(30) == 43


def test_a_locale_without_utf8_gets_utf8_all_the_same() -> None:
    code = "from backend.task.plain_output import use_plain_output as u; u(); print('花\\udc80')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == "花\\udc80\n".encode()
