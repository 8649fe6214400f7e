"""The server process: one per output root, listening until SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from backend.server.errors import ServerError
from backend.server.events import Broadcast
from backend.server.settings import Settings
from console.output import get_logger
from files.locking import locked
from processes.stop import StopRequest

if TYPE_CHECKING:
    from fastapi import FastAPI

log = get_logger("server")

LOCK_FILE = ".server.lock"
# How long the end of the server waits for requests and pages.
CLOSE_S = 2


def run_server(settings: Settings, add_pages: Callable[[FastAPI], None]) -> None:
    """Serve until a signal ends it. Running tasks continue. `add_pages` adds the front end to the application.

    Raises:
        ServerError: when it cannot start: the address is in use, the database does not answer.
    """
    from backend.server.app import create_app

    with only_server(settings.output_root), listening_socket(settings) as listener:
        app = create_app(settings)
        add_pages(app)
        log.info("serving on %s (API: %s/docs)", settings.page_url, settings.page_url)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=CLOSE_S,
        )
        with StopRequest(patient=True):  # uvicorn passes the signal on when it has ended
            ClosingServer(config, app.state.tasks.broadcast).run(sockets=[listener])
        log.info("the server has ended; tasks that run continue, and are found again at the next start")


class ClosingServer(uvicorn.Server):
    """Ends the event streams first, which would otherwise never end by themselves."""

    def __init__(self, config: uvicorn.Config, broadcast: Broadcast) -> None:
        super().__init__(config)
        self.broadcast = broadcast

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.broadcast.close()
        await super().shutdown(sockets)


@contextlib.contextmanager
def only_server(root: Path) -> Iterator[None]:
    """Keep a second server out of the output root: both would start the same tasks."""

    def refuse(waited_s: float) -> None:
        raise ServerError(f"--output-root {root}: another server uses it: choose another one")

    with locked(root / LOCK_FILE, refuse):
        yield


@contextlib.contextmanager
def listening_socket(settings: Settings) -> Iterator[socket.socket]:
    """The socket, bound before anything else starts. Raises ServerError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = ": choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise ServerError(f"{settings.host}:{settings.port}: {reason}{hint}") from None
    with listener:
        yield listener
