"""The process that the platform starts (`train_qwen_vl_distillation.py`, `cli distill`): light, always responsive.

It checks the options, starts the process that works (`worker`: torch, extraction, training), and reports what that
one sends over a pipe from a background thread, so that a slow or broken server costs the training nothing. It
passes SIGTERM on, keeps the four-second promise whatever the other process is doing, and reports even its sudden
death. torch is never imported here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from backend.task.call_queue import CallQueue
from backend.task.calls import PIPE_VARIABLE, TaskCalls, read_calls
from backend.task.errors import OptionError
from backend.task.http_client import HttpClient, read_token
from backend.task.options import help_text
from backend.task.plain_output import finish_output, use_plain_output
from backend.task.request import TaskRequest, find_addressee, read_request
from console.output import configure_logging, get_logger, redact
from processes.children import child_environment, exit_now, kill_group
from processes.stop import StopRequest

log = get_logger("platform")

UNDELIVERED = "undelivered.jsonl"
POLL_S = 0.05
# Seconds since SIGTERM: until then the work may end by itself, until then the report may take; four are promised.
WORK_STOP_S = 2.8
STOP_S = 3.4
# What the shortest report gets, also when all of that is gone; and how long a process that was killed is waited for
# (one inside a slow disk's fsync stays until that returns).
REPORT_LEAST_S = 0.3
KILLED_S = 0.2
# How long the last calls of work that has ended may take through the pipe; on an idle machine milliseconds.
DRAIN_S, STOPPED_DRAIN_S = 10.0, 0.3
DEFAULT_CLOSE_S = 30.0
CLOSE_VARIABLE = "QWEN_DISTILL_REPORT_SECONDS"
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
    for text in (*request.warnings, *request.notes):
        log.warning("%s", text)
    return supervise(request, words)


def report_refusal(words: list[str], error: OptionError) -> None:
    """Report to the platform why the task does not start, if task id and URL are valid: one short try.

    In a thread of its own, since looking up a host name has no timeout.
    """
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


def use_utf8_names() -> None:
    """Start this process over (same id, same arguments) where the locale would spell file names otherwise than UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def utf8_words(words: Sequence[str]) -> list[str]:
    """The arguments read as UTF-8, whatever the locale decoded them with."""
    return [os.fsencode(word).decode("utf-8", "surrogateescape") for word in words]


def supervise(request: TaskRequest, words: Sequence[str]) -> int:
    """Run a task to its end and report it; the exit code for the platform."""
    close_s = closing_time()
    client = HttpClient(request.api_base_url, read_token(), request.allow_local_urls)
    queue = CallQueue(client, request.output_dir / UNDELIVERED)
    with StopRequest(patient=True) as stop:
        code = Supervisor(request, words, queue, stop, close_s).run()
        if stop.requested:
            # The four seconds are almost over; the interpreter's own way out can take another one on a busy machine.
            finish_output()
            exit_now(code)
    return code


def closing_time() -> float:
    """Seconds that the last calls may take when the server is in trouble.

    Raises:
        OptionError: when the environment variable is not a number.
    """
    text = os.environ.get(CLOSE_VARIABLE, "")
    try:
        value = float(text or DEFAULT_CLOSE_S)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise OptionError(f"{CLOSE_VARIABLE}: expected seconds between 0 and 3600, got {text!r}")
    return value


class Supervisor:
    """One task: the working process, its calls, the signal, the end."""

    def __init__(
        self, request: TaskRequest, words: Sequence[str], queue: CallQueue, stop: StopRequest, close_s: float
    ) -> None:
        self.request, self.words, self.queue, self.stop, self.close_s = request, words, queue, stop, close_s
        self.calls = TaskCalls(request.task_id)
        self.ended = False

    def run(self) -> int:
        process, relay = self.start()
        returncode = self.wait(process)
        kill_group(process.pid)  # what the work may have left: decoding processes, data loaders, ranks
        relay.join(STOPPED_DRAIN_S if self.stop.requested else DRAIN_S)
        if not self.ended and returncode != 0:
            self.queue.send(self.calls.error(self.sudden_end(returncode)))
        delivered = self.close_queue()
        if not delivered:
            log.warning(
                "platform: not everything was delivered, see %s", self.request.output_dir / UNDELIVERED
            )
        return exit_code(returncode, delivered, self.stop)

    def start(self) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        """The working process, in a session of its own: signals reach it once, from here."""
        reading, writing = os.pipe()
        environment = child_environment(**{PIPE_VARIABLE: str(writing), "PYTHONUTF8": "1"})
        process = subprocess.Popen(
            [sys.executable, "-m", "backend.task.worker", "task", str(os.getpid()), *self.words],
            env=environment,
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(writing)
        relay = threading.Thread(target=self.relay, args=(reading,), name="platform-relay", daemon=True)
        relay.start()
        return process, relay

    def relay(self, reading: int) -> None:
        """Pass calls on; of several that end the task (a rank's and its launcher's) the first one explains most."""
        for call in read_calls(reading):
            if not (call.closes and self.ended):
                self.queue.send(call)
            self.ended = self.ended or call.closes

    def wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """Wait for the end, after a signal only for so long; the return code, None when it had to be killed."""
        passed_on = False
        while process.poll() is None:
            if self.stop.requested and not passed_on:
                passed_on = True
                log.info("stopping: saving a checkpoint")
                process.send_signal(self.stop.signal_number)
            if since(self.stop) > WORK_STOP_S:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(KILLED_S)
                return None
            if passed_on:
                time.sleep(POLL_S)
            else:
                self.stop.wait(POLL_S)
        return process.returncode

    def close_queue(self) -> bool:
        """Deliver what is waiting; a signal shortens that, too. True when nothing was lost."""
        hurried = self.stop.requested
        self.queue.start_closing(self.time_to_report())
        while not self.queue.wait(POLL_S):
            if self.stop.requested and not hurried:
                hurried = True
                self.queue.start_closing(self.time_to_report())
        return self.queue.finish()

    def time_to_report(self) -> float:
        """Seconds for the calls that are waiting: what a stop has left of its time, else what the operator allows."""
        return max(REPORT_LEAST_S, STOP_S - since(self.stop)) if self.stop.requested else self.close_s

    def sudden_end(self, returncode: int | None) -> str:
        """The error to report when the working process could not report it."""
        if returncode is None or self.stop.requested:
            return "stopped; start the task again to resume from the last checkpoint"
        if returncode == -9:
            return "the training process was killed (SIGKILL), as the system does when memory runs out: see the log"
        if returncode < 0:
            return f"the training process died of signal {-returncode}: see the log"
        return f"the training process ended with exit code {returncode}: see the log"


def since(stop: StopRequest) -> float:
    """Seconds since the stop was requested, 0 when it was not."""
    return 0.0 if stop.requested_at is None else time.monotonic() - stop.requested_at


def exit_code(returncode: int | None, delivered: bool, stop: StopRequest) -> int:
    """The platform's exit code: 128 + signal for a stop, as shells count; the work's own otherwise.

    A stop while a finished task waits for a bad server is a stop: the same command again reports once more.
    """
    if returncode is None or (stop.requested and not (returncode == 0 and delivered)):
        return stop.exit_code
    return 128 - returncode if returncode < 0 else returncode
