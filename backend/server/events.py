"""Changes of tasks, published by any thread, received by coroutines.

A subscription holds at most one change of a task: a newer one replaces it. A slow receiver therefore misses states
between, never the last one, and its memory is bounded by the number of tasks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from backend.server.schemas import TaskView


@dataclass(frozen=True)
class Change:
    """A task as it stands now; `task` is None when it was deleted."""

    task_id: str
    task: TaskView | None

    @cached_property
    def json(self) -> str:
        """The task as the API shows it; made once, for all event streams."""
        return "" if self.task is None else self.task.model_dump_json(by_alias=True)


class Subscription:
    """What one receiver has not yet seen. Iterating waits for the next change; it ends with `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, task_id: str | None) -> None:
        self.loop, self.task_id = loop, task_id
        self.pending: dict[str, Change] = {}
        self.ready = asyncio.Event()
        self.closed = False

    def put(self, change: Change) -> None:
        """Called in the loop's thread."""
        if self.task_id in (None, change.task_id):
            self.pending[change.task_id] = change
            self.ready.set()

    def close(self) -> None:
        self.closed = True
        self.ready.set()

    async def next(self, timeout_s: float) -> Change | None:
        """The next change; None when there was none for `timeout_s` seconds.

        Raises:
            StopAsyncIteration: when the server is closing.
        """
        if not self.pending and not self.closed:
            try:
                await asyncio.wait_for(self.ready.wait(), timeout_s)
            except TimeoutError:
                return None
        if self.closed:
            raise StopAsyncIteration
        change = self.pending.pop(next(iter(self.pending)))
        if not self.pending:
            self.ready.clear()
        return change

    async def __aiter__(self) -> AsyncIterator[Change]:
        while not self.closed:
            try:
                change = await self.next(3600)
            except StopAsyncIteration:
                return
            if change is not None:
                yield change


class Broadcast:
    """Passes changes on to all subscriptions. `publish` never blocks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.subscriptions: set[Subscription] = set()
        self.closed = False

    @contextmanager
    def subscribe(self, task_id: str | None = None) -> Iterator[Subscription]:
        """A subscription to the changes of one task or of all, in the running event loop."""
        subscription = Subscription(asyncio.get_running_loop(), task_id)
        with self.lock:
            self.subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            with self.lock:
                self.subscriptions.discard(subscription)

    def publish(self, change: Change) -> None:
        self.for_each(lambda subscription: subscription.put(change))

    def close(self) -> None:
        """End all subscriptions: the server is closing."""
        self.closed = True
        self.for_each(Subscription.close)

    def for_each(self, action) -> None:  # type: ignore[no-untyped-def]
        with self.lock:
            current = list(self.subscriptions)
        for subscription in current:
            try:
                subscription.loop.call_soon_threadsafe(action, subscription)
            except RuntimeError:  # its loop has ended
                continue
