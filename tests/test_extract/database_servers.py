"""MariaDB and PostgreSQL servers from installed binaries: a temporary folder, a free loopback port, an ordinary user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

START_TIMEOUT_S = 120
PASSWORD = "s3cret:/@"


def find_program(name: str) -> str | None:
    """A program on the path, in sbin, or among Debian's PostgreSQL versions (the newest)."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, versions), os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])
    return shutil.which(name, path=path)


def server_user() -> str | None:
    """The servers refuse to run as root: then an ordinary user that every Debian system has."""
    return "nobody" if os.geteuid() == 0 else None


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder that belongs to the server's user; short, because socket paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="db", dir="/tmp"))
    try:
        user = server_user()
        if user is not None:
            entry = pwd.getpwnam(user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list[str], folder: Path) -> None:
    user = server_user()
    done = subprocess.run(
        command, cwd=folder, user=user, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-1000:]} {done.stderr[-2000:]}"


@contextmanager
def running(
    command: list[str], folder: Path, url: Callable[[], sa.URL], *, stop: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    """The server while it runs; entered when it answers at `url`. stop: what ends it."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, user=server_user(), stdout=output, stderr=output)
    try:
        wait_until_ready(process, url(), log)
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: sa.URL, log: Path) -> None:
    engine = sa.create_engine(url)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with engine.connect():
                break
        except sa.exc.DBAPIError:
            text = log.read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"the server ended: {text}"
            assert time.monotonic() < deadline, f"the server does not answer: {text}"
            time.sleep(0.1)
    engine.dispose()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mariadb() -> Iterator[sa.URL]:
    """A MariaDB server; skips where Debian's mariadb-server-core is not installed."""
    pytest.importorskip("pymysql", reason="pymysql is not installed: make install-dev")
    programs = [find_program("mariadb-install-db"), find_program("mariadbd")]
    if None in programs:
        pytest.skip("MariaDB is not installed: apt-get install mariadb-server-core mariadb-client-core")
    install, server = (str(program) for program in programs)
    with server_folder() as folder:
        data = ["--no-defaults", f"--datadir={folder / 'data'}"]
        run([install, *data, "--auth-root-authentication-method=normal", "--skip-test-db"], folder)
        port = free_port()
        places = [f"--socket={folder / 's'}", f"--pid-file={folder / 'pid'}", f"--port={port}"]
        command = [server, *data, *places, "--bind-address=127.0.0.1", "--skip-name-resolve"]
        root = sa.URL.create("mysql+pymysql", "root", host="127.0.0.1", port=port)
        with running(command, folder, lambda: root):
            engine = sa.create_engine(root)
            with engine.begin() as connection:
                connection.execute(sa.text("CREATE DATABASE pictures CHARACTER SET utf8mb4"))
                connection.execute(sa.text("CREATE USER reader IDENTIFIED BY :p"), {"p": PASSWORD})
                connection.execute(sa.text("GRANT ALL ON pictures.* TO reader"))
            engine.dispose()
            # The plain dialect's name: the source has to find the driver.
            yield sa.URL.create("mysql", "reader", PASSWORD, "127.0.0.1", port, "pictures")


@contextmanager
def postgresql() -> Iterator[sa.URL]:
    """A PostgreSQL server; skips where Debian's postgresql is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: make install-dev")
    programs = [find_program("initdb"), find_program("postgres")]
    if None in programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    install, server = (str(program) for program in programs)
    with server_folder() as folder:
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        data = str(folder / "data")
        rules = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=reader", "--encoding=UTF8"]
        run([install, "-D", data, *rules, "--no-sync", "--locale=C"], folder)
        port = free_port()
        command = [server, "-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
        url = sa.URL.create("postgresql", "reader", PASSWORD, "127.0.0.1", port, "postgres")
        # To SIGTERM it would wait until all clients have closed their connections.
        with running(command, folder, lambda: url.set(drivername="postgresql+psycopg"), stop=signal.SIGINT):
            yield url
