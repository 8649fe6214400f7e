"""Real S3 servers for tests, and the settings with which this process and those that it starts use one."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

KEY, SECRET = "somebody", "something"


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of moto's server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reset_moto()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def localbucket_server(objects: Path | None = None) -> Iterator[str]:
    """The URL of LocalBucket, another S3 server, in a process of its own; its objects are files, below `objects`."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "localbucket", str(objects or folder), "--port", str(port)]
        with serving(command, port) as address:
            yield address


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, f"{command[0]} ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "moto": moto_server,
    "localbucket": localbucket_server,
}


def reset_moto() -> None:
    """All of moto's servers in one process share their buckets."""
    from moto.s3.models import s3_backends

    s3_backends.reset()


def use_endpoint(patch: pytest.MonkeyPatch, endpoint: str, **options: Any) -> None:
    """s3:// is this server, here and in processes that are started; without the client's own repetitions."""
    settings = {
        "endpoint_url": endpoint,
        "key": KEY,
        "secret": SECRET,
        "config_kwargs": {"retries": {"max_attempts": 1}},
        **options,
    }
    patch.setitem(fsspec.config.conf, "s3", settings)
    patch.setenv("FSSPEC_S3", json.dumps(settings))
    files = fsspec.get_filesystem_class("s3")
    patch.setattr(files, "retries", 1)
    files.clear_instance_cache()


def upload(endpoint: str, folder: Path, bucket: str) -> None:
    """Make a bucket with the files of the folder."""
    files = fsspec.filesystem(
        "s3",
        endpoint_url=endpoint,
        key=KEY,
        secret=SECRET,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    files.mkdir(bucket)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files.pipe_file(f"{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())
