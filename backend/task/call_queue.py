"""Calls to the platform from a background thread: training never waits for the server.

The queue, in short:

- `send` appends and returns. Newer progress replaces waiting progress; a full queue drops its oldest call.
- One thread makes one call at a time. A call stays in the queue while it is made: `settle` removes it when it was
  delivered or refused, and leaves it for another try otherwise, with pauses that double.
- Two kinds of failure pause differently. No answer at all (`reached` False) means that the server is down, so that
  every call waits (`pause_until`). An error answer concerns one call, which alone waits (`not_before`).
- Closing sets a deadline. Pauses become short, other calls go first and the end-of-task call last, because a
  platform that has marked a task as complete may refuse the rest. In the second half of the time it goes first.
- What is left at the end goes to `undelivered.jsonl`.

`changed` guards all fields. It is not held during a call, so that `send` never waits for the network.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backend.task.calls import Call
from backend.task.http_client import Delivery
from console.output import get_logger

log = get_logger("report")

# Seconds that the thread may take to notice that its deadline has passed.
LATE_S = 0.2
# Seconds of the closing time that a call already under way may take, at most.
ANSWER_S = 1.0


class Client(Protocol):
    """What delivers one call (`HttpClient`)."""

    def deliver(self, call: Call, timeout_s: float) -> Delivery: ...

    def abort(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the queue waits, in seconds."""

    call_s: float = 10.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    closing_pause_s: float = 0.5
    queue_length: int = 10_000


@dataclass
class Waiting:
    """A call in the queue."""

    call: Call
    attempts: int = 0
    not_before: float = 0.0
    reason: str = "not sent before the end"


class CallQueue:
    """The queue and its thread. `send` returns at once and may be called from any thread."""

    def __init__(self, client: Client, undelivered: Path, patience: Patience | None = None) -> None:
        self.client, self.undelivered, self.patience = client, undelivered, patience or Patience()
        self.changed = threading.Condition()
        self.queue: list[Waiting] = []
        self.lost = 0  # calls that were given up
        self.failures = 0  # since the last delivery
        self.pause_until = 0.0
        self.started_closing = self.deadline = float("inf")
        self.current: Waiting | None = None  # the call under way, still in the queue
        self.ended = False
        self.thread = threading.Thread(target=self.run, name="platform-calls", daemon=True)
        self.thread.start()

    def send(self, call: Call) -> None:
        """Queue a call; a waiting one that it replaces is dropped, a full queue gives up its oldest."""
        with self.changed:
            if call.replaces is not None:
                self.queue = [item for item in self.queue if item.call.replaces != call.replaces]
            if len(self.queue) >= self.patience.queue_length:
                self.give_up(self.queue.pop(0), "the queue was full")
            self.queue.append(Waiting(call))
            self.changed.notify()

    def close(self, timeout_s: float) -> bool:
        """Deliver what is waiting within `timeout_s` seconds, then stop; True when nothing was lost."""
        self.start_closing(timeout_s)
        self.wait(timeout_s + LATE_S)
        return self.finish()

    def start_closing(self, timeout_s: float) -> None:
        """From now on all that counts is to deliver what is waiting within `timeout_s` seconds.

        Called again, it changes the time that is left. A call that a stalled server holds longer is cut off.
        """
        with self.changed:
            now = time.monotonic()
            self.started_closing, self.deadline, self.pause_until = now, now + timeout_s, 0.0
            # Every call gets one more try, whatever pause it was in.
            for item in self.queue:
                item.not_before = 0.0
            self.changed.notify_all()
            if timeout_s < self.patience.call_s:
                self.cut_off_stalled_call(min(ANSWER_S, timeout_s / 4))

    def cut_off_stalled_call(self, patience_s: float) -> None:
        """End the call under way, but not one that a good server is answering: it would be sent twice."""
        current = self.current
        # Waiting releases the lock, so that the thread can settle the call.
        if not self.changed.wait_for(lambda: current is None or self.current is not current, patience_s):
            self.client.abort()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; True when there is nothing left to wait for."""
        self.thread.join(max(0.0, min(timeout_s, self.deadline + LATE_S - time.monotonic())))
        return not self.thread.is_alive() or time.monotonic() >= self.deadline + LATE_S

    def finish(self) -> bool:
        """Give up what is still waiting; True when nothing was lost. Later calls are ignored."""
        with self.changed:
            self.ended = True
            self.give_up_all()
        self.client.abort()
        return self.lost == 0

    def run(self) -> None:
        """The thread: take the next call that is due, make it, settle the result."""
        while True:
            with self.changed:
                item = self.next_item()
                while item is None:
                    if self.ended or time.monotonic() >= self.deadline or (self.closing and not self.queue):
                        return
                    self.changed.wait(self.time_to_wait())
                    item = self.next_item()
                self.current = item
            result = self.client.deliver(item.call, self.time_for_call())
            with self.changed:
                self.current = None
                self.changed.notify_all()
                # `finish` has recorded this call as undelivered already: what came of it does not count any more.
                if self.ended:
                    return
                self.settle(item, result)

    @property
    def closing(self) -> bool:
        return self.deadline < float("inf")

    def next_item(self) -> Waiting | None:
        """The call to make now. The end-of-task call goes last, unless half of the closing time is gone."""
        now = time.monotonic()
        if not self.pause_until <= now < self.deadline:
            return None
        others = [item for item in self.queue if not item.call.closes]
        last = [item for item in self.queue if item.call.closes]
        hurry = self.closing and now > (self.started_closing + self.deadline) / 2
        ordered = last + others if hurry else others or last
        return next((item for item in ordered if item.not_before <= now), None)

    def time_to_wait(self) -> float | None:
        """Seconds until something may be due; None: until something is sent."""
        if not self.queue:
            return None
        now = time.monotonic()
        due = max(min(item.not_before for item in self.queue), self.pause_until, now)
        return max(0.01, min(due, self.deadline, now + 1.0) - now)

    def time_for_call(self) -> float:
        remaining = self.deadline - time.monotonic()
        if remaining >= self.patience.call_s * 2:
            return self.patience.call_s
        # Close to the end one stalled call must leave time for the next.
        return max(0.1, min(self.patience.call_s, remaining / 2))

    def settle(self, item: Waiting, result: Delivery) -> None:
        item.attempts += 1
        if result.delivered:
            self.recovered()
            self.drop(item)
            if item.call.closes:
                # Progress has the status RUNNING: it must not arrive after the end.
                self.queue = [other for other in self.queue if other.call.kind != "progress"]
        elif not result.retry:
            self.drop(item)
            self.give_up(item, result.reason)
        else:
            self.postpone(item, result)

    def drop(self, item: Waiting) -> None:
        self.queue = [other for other in self.queue if other is not item]

    def postpone(self, item: Waiting, result: Delivery) -> None:
        item.reason = result.reason
        pause = self.pause(self.failures if not result.reached else item.attempts - 1)
        if result.reached:
            item.not_before = time.monotonic() + pause
        else:
            self.pause_until = time.monotonic() + pause
        if self.failures == 0:
            log.warning("platform: %s not delivered (%s): trying again", item.call.kind, result.reason)
        self.failures += 1

    def pause(self, failures: int) -> float:
        if self.closing:
            return min(self.patience.closing_pause_s, max(0.05, (self.deadline - self.started_closing) / 20))
        return float(min(self.patience.first_pause_s * 2 ** min(failures, 16), self.patience.longest_pause_s))

    def recovered(self) -> None:
        if self.failures:
            log.info("platform: answers again, %d calls waiting", max(0, len(self.queue) - 1))
        self.failures = 0

    def give_up(self, item: Waiting, reason: str) -> None:
        """Keep one call in `undelivered.jsonl` and in the log."""
        log.warning("platform: %s given up after %d attempts: %s", item.call.kind, item.attempts, reason)
        self.keep([(item, reason)])

    def give_up_all(self) -> None:
        """The same for what is still waiting at the end, in one line."""
        if self.queue:
            kinds = Counter(item.call.kind for item in self.queue)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            log.warning("platform: not delivered: %s (%s)", counts, self.queue[-1].reason)
        self.keep([(item, item.reason) for item in self.queue])
        self.queue.clear()

    def keep(self, given_up: list[tuple[Waiting, str]]) -> None:
        self.lost += len(given_up)
        records = [
            {"time": time.time(), **item.call.record(), "attempts": item.attempts, "reason": reason}
            for item, reason in given_up
        ]
        if not records:
            return
        try:
            self.undelivered.parent.mkdir(parents=True, exist_ok=True)
            with self.undelivered.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except OSError as error:
            log.warning("platform: cannot write %s: %s", self.undelivered, error.strerror)
