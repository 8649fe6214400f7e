"""What the server's tests share: folders with a small teacher and data sets, and servers over them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from backend.server.app import create_app
from backend.server.settings import Settings
from backend.server.tasks import Tasks
from tests.test_backend.platform_data import make_class_folders
from tests.test_server.server_process import ServerProcess, free_port

TOKEN = "correct horse battery".replace(" ", "-")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher and data sets."""
    from extract.teachers.tiny import make_tiny_teacher

    root = tmp_path_factory.mktemp("material")
    make_tiny_teacher(root / "models" / "tiny", depth=1)
    make_class_folders(root / "datasets" / "flowers")
    make_class_folders(root / "datasets" / "花 two")
    (root / "datasets" / "empty" / "train").mkdir(parents=True)
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
def folders(tmp_path: Path) -> Path:
    """Roots with a name of a teacher and of a data set, and nothing inside: enough to create tasks."""
    root = tmp_path / "site"
    for name in ("datasets/flowers/train", "datasets/花 two/train", "models/tiny", "output"):
        (root / name).mkdir(parents=True)
    return root


@pytest.fixture
def settings(folders: Path) -> Settings:
    return settings_of(folders)


def settings_of(root: Path, **changes: Any) -> Settings:
    roots = {f"{name}_root": (root / name).resolve() for name in ("datasets", "models", "output")}
    return Settings(**{**roots, "port": free_port(), **changes})


class LiveServer:
    """The application in a thread of this process, listening on a real port."""

    def __init__(self, settings: Settings, prepare: Callable[[Tasks], None] | None = None) -> None:
        """`prepare` is called before the queue starts."""
        import uvicorn

        self.settings = settings
        self.app: FastAPI = create_app(settings)
        self.tasks: Tasks = self.app.state.tasks
        if prepare is not None:
            prepare(self.tasks)
        config = uvicorn.Config(
            self.app, port=settings.port, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{settings.port}/model-distillation", timeout=60, trust_env=False
        )

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def live(settings: Settings) -> Iterator[LiveServer]:
    """A server in this process, without tasks that run."""
    server = LiveServer(settings)
    yield server
    server.close()


@pytest.fixture
def guarded(folders: Path) -> Iterator[LiveServer]:
    """The same with a token."""
    server = LiveServer(settings_of(folders, token=TOKEN))
    yield server
    server.close()


@pytest.fixture
def serve(site: Path) -> Iterator[Callable[..., ServerProcess]]:
    """`serve("--jobs", "2")`: a running server process; all are ended after the test."""
    servers: list[ServerProcess] = []

    def start(*options: str, **rest: Any) -> ServerProcess:
        server = ServerProcess(site, *options, **rest)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.close()
