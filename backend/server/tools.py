"""Our own commands as processes of the server: what loads torch or reads whole stores stays out of its memory.

Arguments go as a list, never through a shell. At most two run at a time; one that the page no longer waits for is
ended.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from console.output import redact
from processes.children import child_environment, kill_group

AT_A_TIME = 2
_slots = asyncio.Semaphore(AT_A_TIME)


class ToolError(Exception):
    """A command failed; the text is its own error line."""


async def run_command(words: Sequence[str], timeout_s: float, *, accept: Sequence[int] = (0,)) -> str:
    """What `cli WORDS` prints. Raises ToolError when it fails (an exit code not in `accept`) or takes too long."""
    return await run_module("cli", words, timeout_s, accept=accept)


async def run_module(
    module: str, words: Sequence[str], timeout_s: float, *, accept: Sequence[int] = (0,)
) -> str:
    """What `python -m MODULE WORDS` prints; see `run_command`."""
    async with _slots:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", module, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            # These run beside trainings: one thread each.
            env=child_environment(PYTHONUTF8="1", OMP_NUM_THREADS="1"),
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            raise ToolError(f"{module} {words[0]}: no result after {timeout_s:.0f} s") from None
        finally:
            if process.returncode is None:
                kill_group(process.pid)
                await process.wait()
    if process.returncode not in accept:
        raise ToolError(error_line(errors, process.returncode or 0))
    return output.decode("utf-8", "replace")


def error_line(errors: bytes, code: int) -> str:
    """The last line of what a command printed to stderr: our commands end with `error: …`."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    return redact(lines[-1].removeprefix("error: ")) if lines else f"ended with exit code {code}"
