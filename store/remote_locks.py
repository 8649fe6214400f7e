"""Who is writing which part of a store at a URL: one small file a writer, below `.work/locks`, as beside a local job.

A lock's name is what it covers and a number: `shards-0-8.3`. It is created only if no such file exists (a conditional
put), so of two writers that begin together one gets it. Its content is the owner; writing it again is the heartbeat.
A lock is stale when its process is gone (same host) or when the file is two minutes older than a file written just now:
both times are the server's, so that hosts' clocks do not matter. Whoever takes over a stale lock creates the next
number, which again one of two can; the old owner notices before it adds anything (`check`).

Locks of other, overlapping ranges are looked for after the own one is there, so that of two at least one sees the other.
That is also what is done, after a short wait, where a file system has no conditional put.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

from store.errors import LockedError, StoreError
from store.format import WORK_FOLDER
from store.locks import FOLDER, HEARTBEAT_S, STALE_AFTER_S, Owner, ended_here, this_process
from store.remote import FIRST_PAUSES_S, RemoteFiles

LOCKS = f"{WORK_FOLDER}/{FOLDER}"
SETTLE_S = 2.0  # after a put that is not conditional: what two writers wrote together is visible to both then

log = logging.getLogger(__name__)


class RemoteLock:
    """Held from creation until `release`. Raises LockedError while a live writer holds any part of it.

    what: what is locked, such as `shards`; start, stop: the range of it.
    """

    def __init__(
        self, remote: RemoteFiles, what: str, start: int, stop: int, *, break_lock: bool = False
    ) -> None:
        self.remote = remote
        self.owner = this_process(what, start, stop)
        self.token = secrets.token_hex(8)
        self.content = json.dumps({**asdict(self.owner), "token": self.token}).encode()
        self.name = f"{what}-{start}-{stop}"
        self.key = ""
        taken = self._refuse_overlap(break_lock)
        self.number = 1 + max(taken, default=-1)
        self.key = self._key(self.number)
        if not self._create():
            raise LockedError(
                f"{remote.url}: another process has just begun to write: {self.name}; wait for it"
            )
        try:
            self._refuse_overlap(break_lock)
        except BaseException:
            remote.delete(self.key)
            raise
        for number in taken:
            remote.delete(self._key(number))
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, name="store-lock-heartbeat", daemon=True).start()

    def check(self) -> None:
        """Raises StoreError when another process has taken this lock over: it may be writing the same."""
        found = self.remote.listing(LOCKS)  # one request
        if self.key not in found or self._key(self.number + 1) in found:
            raise StoreError(
                f"{self.remote.url}: this writer's lock was taken over by another process; nothing more is written"
            )

    def release(self) -> None:
        """Let it go; where that does not work, it goes stale."""
        self._stopped.set()
        with contextlib.suppress(StoreError):
            RemoteFiles(self.remote.url, FIRST_PAUSES_S).delete(self.key)

    def _key(self, number: int) -> str:
        return f"{LOCKS}/{self.name}.{number}"

    def _create(self) -> bool:
        """Whether the lock's file is ours."""
        created = self.remote.create(self.key, self.content)
        if created is not None:
            return created
        log.warning(
            "%s: the file system cannot create a file only if there is none: two processes that start within %g s of "
            "each other are told apart by reading the lock again",
            self.remote.url,
            SETTLE_S,
        )
        self.remote.write(self.key, self.content)
        time.sleep(SETTLE_S)
        return self.remote.read(self.key) == self.content

    def _refuse_overlap(self, break_lock: bool) -> list[int]:
        """The numbers of stale locks of this name. Raises LockedError for a live one that overlaps."""
        numbers = []
        for key, other, token in self.others():
            if token == self.token or not other.overlaps(self.owner):
                continue
            if break_lock:
                log.warning("broke the lock of %s", described(other))
            elif self._is_abandoned(key, other):
                log.warning("took over the lock of a dead writer: %s", described(other))
            else:
                raise LockedError(
                    f"{self.remote.url}: already being written: {described(other)}; wait for it, or pass --break-lock "
                    "if you know that it is gone"
                )
            name, _, number = key.rpartition("/")[2].rpartition(".")
            if name == self.name:
                numbers.append(int(number))
            else:
                self.remote.delete(key)
        return numbers

    def others(self) -> Iterator[tuple[str, Owner, str]]:
        """(key, owner, token) of all other locks."""
        for key in sorted(self.remote.listing(LOCKS).keys() - {self.key}):
            try:
                found = json.loads(self.remote.read(key))
                token = found.pop("token")
                yield key, Owner(**found), token
            except (FileNotFoundError, ValueError, TypeError, KeyError):
                continue  # released by now, or not a lock

    def _is_abandoned(self, key: str, owner: Owner) -> bool:
        gone = ended_here(owner)
        if gone is not None:
            return gone
        clock = f"{LOCKS}/clock-{self.token}"
        try:
            self.remote.write(clock, b"")
            return self.remote.modified(clock) - self.remote.modified(key) > STALE_AFTER_S
        except FileNotFoundError:  # released by now
            return True
        finally:
            self.remote.delete(clock)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                if self.remote.size(self.key) is None:
                    return  # taken over; `check` raises for the writer
                self.remote.write(self.key, self.content)
            except StoreError as error:  # the network may be away for a while: the next beat may get through
                log.warning("heartbeat: %s", error)


def described(owner: Owner) -> str:
    return (
        f"{owner.split} {owner.start}:{owner.stop}, process {owner.pid} on {owner.host} since {owner.since}"
    )
