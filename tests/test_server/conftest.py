"""What the server's tests share: folders with a small teacher and data set, and servers over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_backend.platform_data import make_class_folders
from tests.test_server.server_process import ServerProcess


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher and two data sets."""
    from extract.teachers.tiny import make_tiny_teacher

    root = tmp_path_factory.mktemp("material")
    make_tiny_teacher(root / "models" / "tiny", depth=1)
    make_class_folders(root / "datasets" / "flowers")
    make_class_folders(root / "datasets" / "花 two")
    return root


@pytest.fixture
def site(tmp_path: Path, material: Path) -> Path:
    """Roots of one server: data sets and models are shared, outputs its own."""
    root = tmp_path / "site"
    root.mkdir()
    for name in ("datasets", "models"):
        (root / name).symlink_to(material / name)
    (root / "output").mkdir()
    return root


@pytest.fixture
def serve(site: Path) -> Iterator[Callable[..., ServerProcess]]:
    """`serve("--jobs", "2")`: a running server; all are ended after the test."""
    servers: list[ServerProcess] = []

    def start(*options: str, **rest: Any) -> ServerProcess:
        server = ServerProcess(site, *options, **rest)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.close()
