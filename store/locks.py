"""Who is writing which rows: one small file a writer, beside the job.

A writer first publishes its own lock, then looks for others that overlap; so of two that start together
at least one sees the other. A lock is stale when its process is gone (same host), or when its heartbeat,
the file's modification time, stopped for two minutes (another host or container, or before a reboot).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from store.errors import LockedError, StoreError

HEARTBEAT_S = 15.0
STALE_AFTER_S = 120.0
FOLDER, SUFFIX = "locks", ".lock"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The content of a lock file: its process, and which rows of which split (None: all)."""

    host: str
    boot: str
    namespace: str
    pid: int
    process_start: str
    since: str
    split: str | None
    start: int
    stop: int

    def overlaps(self, other: Owner) -> bool:
        if self.split is None or other.split is None:
            return True
        return self.split == other.split and self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        rows = "every row" if self.split is None else f"{self.split} rows {self.start}:{self.stop}"
        return f"{rows}, process {self.pid} on {self.host} since {self.since}"


def this_process(split: str | None, start: int, stop: int) -> Owner:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Owner(
        host=socket.gethostname(),
        boot=boot_id(),
        namespace=pid_namespace(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()) or "",
        since=since,
        split=split,
        start=start,
        stop=stop,
    )


def boot_id() -> str:
    """Identifies one boot of the machine: after a reboot, a process id may belong to another process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Containers may share a host's name, but each counts its processes from 1."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """When a process of this host started, in whatever unit; None when it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        import psutil

        try:
            return str(round(psutil.Process(pid).create_time()))
        except psutil.NoSuchProcess:
            return None
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RowLock:
    """Held from creation until `release`. Raises LockedError while a live writer holds any of the rows.

    work: the folder of a job, or of a new version, in which the locks are kept.
    """

    def __init__(
        self, work: Path, split: str | None, start: int, stop: int, *, break_lock: bool = False
    ) -> None:
        folder = work / FOLDER
        self.owner = this_process(split, start, stop)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{self.owner.pid}-{secrets.token_hex(6)}{SUFFIX}"
        # Whole at once, so that no other writer reads a part; it need not outlive the process, so it is not synced.
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self.owner)))
        os.rename(partial, self.path)
        try:
            self._refuse_overlap(folder, break_lock)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, name="store-lock-heartbeat", daemon=True).start()

    def check(self) -> None:
        """Raises StoreError when this lock was broken: another process may be writing the rows."""
        if not self.path.exists():
            raise StoreError(
                f"{self.path}: this writer's lock was broken by another process; nothing more is written"
            )

    def release(self) -> None:
        """Let the rows go. A forked child does not own its parent's lock."""
        if os.getpid() == self.owner.pid:
            self._stopped.set()
            self.path.unlink(missing_ok=True)

    def _refuse_overlap(self, folder: Path, break_lock: bool) -> None:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if path == self.path:
                continue
            other = read_owner(path)
            if other is None or not other.overlaps(self.owner):
                continue
            if break_lock:
                log.warning("broke the lock of %s", other)
            elif is_abandoned(path, other):
                log.warning("took over the lock of a dead writer: %s", other)
            else:
                raise LockedError(
                    f"{folder.parents[2]}: already being written: {other}; wait for it, or pass "
                    "--break-lock if you know that it is gone"
                )
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return  # Broken by another process; `check` raises for the writer.
            except OSError as error:  # A network disk may be away for a while: the next beat may get through.
                log.warning("heartbeat of %s: %s", self.path, error)


def is_abandoned(path: Path, owner: Owner) -> bool:
    """Whether a lock's process has ended: looked up if it ran on this host, else known from a stopped heartbeat."""
    if (gone := ended_here(owner)) is not None:
        return gone
    # Both times come from the file system's clock, not from two hosts' clocks.
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent) as now:
            return Path(now.name).stat().st_mtime - path.stat().st_mtime > STALE_AFTER_S
    except FileNotFoundError:
        return True


def ended_here(owner: Owner) -> bool | None:
    """Whether a process of this host has ended; None for one of another host.

    An equal host name alone proves nothing: machines and containers may share one, and a disk.
    """
    if (owner.host, owner.boot, owner.namespace) != (socket.gethostname(), boot_id(), pid_namespace()):
        return None
    return process_start(owner.pid) != owner.process_start


def read_owner(path: Path) -> Owner | None:
    """None when the lock is gone or not readable as one."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
