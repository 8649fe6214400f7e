"""What `train_qwen_vl_distillation.py` and `cli distill` run. torch is not imported before all options are good."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from backend.errors import OptionError
from backend.options import help_text
from backend.plain_output import finish_output, use_plain_output
from backend.request import TaskRequest, read_request
from console.log import configure_logging, get_logger
from console.redaction import redact

log = get_logger("platform")

REFUSAL_S = 3.0


def main(words: Sequence[str] | None = None, program: str = "train_qwen_vl_distillation.py") -> int:
    """Run one task of the platform from its command line; the exit code (0 success, 2 bad options, 143 stopped).

    Raises nothing for what a user can do something about: that is one line and an exit code.
    """
    use_utf8_names()
    use_plain_output()
    configure_logging()
    words = utf8_words(sys.argv[1:] if words is None else words)
    try:
        return start(words, program)
    except OptionError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        finish_output()


def start(words: list[str], program: str) -> int:
    if "--help" in words or "-h" in words:
        print(help_text(program))
        return 0
    try:
        request = read_request(words)
    except OptionError as error:
        report_refusal(words, error)
        raise
    say_warnings(request)
    from backend.supervisor import supervise

    return supervise(request, words)


def report_refusal(words: list[str], error: OptionError) -> None:
    """Tell the platform why the task does not start, if what is needed for that is in order: one short try.

    In a thread of its own, since looking up a host's name knows no deadline.
    """
    from backend.calls import TaskCalls
    from backend.http_client import HttpClient, read_token
    from backend.request import find_addressee

    try:
        addressee = find_addressee(words)
        if addressee is not None:
            task_id, url, allow_local = addressee
            client, call = HttpClient(url, read_token(), allow_local), TaskCalls(task_id).error(str(error))
            thread = threading.Thread(target=client.deliver, args=(call, REFUSAL_S), daemon=True)
            thread.start()
            thread.join(REFUSAL_S + 0.5)
    except OptionError:
        return


def say_warnings(request: TaskRequest) -> None:
    for text in (*request.warnings, *request.notes):
        log.warning("%s", text)


def use_utf8_names() -> None:
    """Start this process over (same id, same arguments) where the locale would spell file names otherwise than UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def utf8_words(words: Sequence[str]) -> list[str]:
    """The arguments read as UTF-8, whatever the locale decoded them with."""
    return [os.fsencode(word).decode("utf-8", "surrogateescape") for word in words]
