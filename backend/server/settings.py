"""What `cli serve` is started with: addresses, folders, database, slots; checked once, before anything starts."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from backend.server.errors import ServerError
from console.output import redact

TOKEN_VARIABLE = "QWEN_DISTILL_TOKEN"
DATABASE_VARIABLE = "QWEN_DISTILL_DATABASE_URL"
# Further names under which clients reach the server, as behind a reverse proxy: name,name
HOSTS_VARIABLE = "QWEN_DISTILL_HOSTS"
SHORTEST_TOKEN = 16
DATABASE_FILE = "tasks.sqlite"
WILDCARDS = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one server. Roots are absolute, with links resolved.

    Attributes:
        port: where it listens; never 0, since the training processes report there.
        token: what clients must present; None on a loopback address without one.
        jobs: tasks at a time; None: one per GPU, one without a GPU.
        scheduler: address of a dask scheduler; None: tasks are processes of this machine.
        further_hosts: names that the Host header may have, besides the server's own.
    """

    datasets_root: Path
    models_root: Path
    output_root: Path
    host: str = "127.0.0.1"
    port: int = 8080
    database_url: str = field(default="", repr=False)
    token: str | None = field(default=None, repr=False)
    jobs: int | None = None
    scheduler: str | None = None
    further_hosts: tuple[str, ...] = ()

    @property
    def database(self) -> str:
        """The database's URL: as given, else an SQLite file in the output root."""
        return self.database_url or f"sqlite:///{self.output_root / DATABASE_FILE}"

    @property
    def api_base_url(self) -> str:
        """Where the training processes report: this server, as they reach it."""
        host = self.host
        if host in WILDCARDS:
            host = "127.0.0.1" if self.scheduler is None else address_towards(self.scheduler)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def page_url(self) -> str:
        """What a user of this machine opens in a browser."""
        host = "127.0.0.1" if self.host in WILDCARDS else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def load_settings(
    *,
    datasets_root: Path,
    models_root: Path,
    output_root: Path,
    host: str,
    port: int,
    database_url: str = "",
    jobs: int | None = None,
    scheduler: str | None = None,
) -> Settings:
    """Settings from the options of `cli serve` and the environment.

    Raises:
        ServerError: with every problem on one line.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
    problems = [
        *root_problems("--datasets-root", datasets_root),
        *root_problems("--models-root", models_root),
        *root_problems("--output-root", output_root),
        *token_problems(host, token),
        *scheduler_problems(host, scheduler),
    ]
    if not 1 <= port <= 65535:
        problems.append(f"--port: expected 1 to 65535, got {port}")
    if jobs is not None and jobs < 1:
        problems.append(f"--jobs: expected at least 1, got {jobs}")
    if problems:
        raise ServerError("; ".join(problems))
    names = os.environ.get(HOSTS_VARIABLE, "").split(",")
    return Settings(
        datasets_root=datasets_root.resolve(),
        models_root=models_root.resolve(),
        output_root=output_root.resolve(),
        host=host,
        port=port,
        database_url=database_url,
        token=token,
        jobs=jobs,
        scheduler=scheduler,
        further_hosts=tuple(name.strip().lower() for name in names if name.strip()),
    )


def root_problems(option: str, root: Path) -> list[str]:
    if not root.is_dir():
        return [f"{option}: expected a folder, got {root}: create it or name another"]
    if option == "--output-root" and not os.access(root, os.W_OK | os.X_OK):
        return [f"{option}: {root} is not writable: choose another folder"]
    return []


def token_problems(host: str, token: str | None) -> list[str]:
    """Whoever reaches the server can start processes: outside of this machine only with a token."""
    if token is None:
        if is_loopback(host):
            return []
        return [f"--host {host}: other machines can reach this address: set {TOKEN_VARIABLE} to a secret"]
    if len(token) < SHORTEST_TOKEN or not all("!" <= character <= "~" for character in token):
        return [
            f"{TOKEN_VARIABLE}: expected at least {SHORTEST_TOKEN} printable ASCII characters without blanks"
        ]
    return []


def scheduler_problems(host: str, scheduler: str | None) -> list[str]:
    if scheduler is None:
        return []
    there = urlsplit(scheduler).hostname
    if not there or "://" not in scheduler:
        return [f"--scheduler: expected an address such as tcp://host:8786, got {redact(scheduler)}"]
    if is_loopback(host) and not is_loopback(there):
        return [f"--scheduler {redact(scheduler)}: its workers cannot report to {host}: pass --host too"]
    return []


def is_loopback(host: str) -> bool:
    """Whether the address is reachable from this machine alone; names other than localhost are not looked up."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_towards(scheduler: str) -> str:
    """This machine's address on the network that leads to the scheduler. No packet is sent."""
    parts = urlsplit(scheduler)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 8786))
        return str(probe.getsockname()[0])
