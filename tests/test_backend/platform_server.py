"""A stand-in for the platform's server: as strict as the real one, and, when told, as bad as they get."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
PROGRESS_BODY = {
    "currentEpoch": (int,),
    "totalEpochs": (int,),
    "trainLoss": OPTIONAL_NUMBER,
    "valLoss": OPTIONAL_NUMBER,
    "valAccuracy": OPTIONAL_NUMBER,
    "status": (str,),
}
HISTORY_BODY = {
    "taskId": (str,),
    "epoch": (int,),
    **dict.fromkeys(
        (
            "trainLoss",
            "trainAccuracy",
            "valLoss",
            "valAccuracy",
            "distillLoss",
            "hardLoss",
            "softLoss",
            "gpuUsage",
            "memoryUsage",
            "epochTime",
        ),
        OPTIONAL_NUMBER,
    ),
}
EVALUATION_BODY = {
    "taskId": (str,),
    **dict.fromkeys(("precision", "recall", "f1Score", "map50", "map95"), OPTIONAL_NUMBER),
    "evalDatasetId": (str,),
    "evalDatasetName": (str,),
    "evalSampleCount": (int,),
    "detailedResults": (str,),
}
CONTRACT: dict[str, tuple[str, set[str], set[str], dict[str, tuple[type, ...]] | None]] = {
    # call: method, required query, further query, body
    "progress": ("PUT", {"currentEpoch"}, {"accuracy", "loss"}, PROGRESS_BODY),
    "history": ("POST", set(), set(), HISTORY_BODY),
    "model-path": ("PUT", {"modelPath", "modelUrl"}, set(), None),
    "evaluations": ("POST", set(), set(), EVALUATION_BODY),
    "complete": ("POST", set(), set(), None),
    "error": ("PUT", {"errorMessage"}, set(), None),
}
OPTIONAL_BODY = {"message": (str,)}


@dataclass
class Received:
    """A call that arrived and satisfied the contract."""

    kind: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]
    at: float = field(default_factory=time.monotonic)


class PlatformServer:
    """Listens on a free local port; `behaviour` may be changed at any time."""

    def __init__(self, task_id: str = "7", prefix: str = "/api", port: int = 0) -> None:
        self.task_id, self.prefix = task_id, prefix
        self.behaviour = "ok"
        self.calls: list[Received] = []
        self.violations: list[str] = []
        self.attempted: list[str] = []
        self.changed = threading.Condition()
        self.release = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                owner.answer(self)

            do_POST = do_GET = do_PUT

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that give up are the point of some tests

        self.server = Server(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def stop(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def attempts(self) -> int:
        """How many requests have come in, good or bad."""
        return len(self.attempted)

    def kinds(self) -> list[str]:
        return [call.kind for call in self.calls]

    def of(self, kind: str) -> list[Received]:
        return [call for call in self.calls if call.kind == kind]

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
        """Wait until `holds` is true; it is looked at after every request."""
        with self.changed:
            return self.changed.wait_for(holds, timeout_s)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self.changed:
            self.attempted.append(urlsplit(handler.path).path.rpartition("/")[2])
            self.changed.notify_all()
        length = int(handler.headers.get("Content-Length") or 0)
        payload = handler.rfile.read(length)
        getattr(self, "behave_" + self.behaviour.replace("-", "_"))(handler, payload)
        with self.changed:
            self.changed.notify_all()

    def behave_ok(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        try:
            call = self.check(handler, payload)
        except ValueError as error:
            self.violations.append(f"{handler.command} {handler.path}: {error}")
            self.reply(handler, 400, {"code": 400, "message": str(error), "data": None})
            return
        self.calls.append(call)
        self.reply(handler, 200, {"code": 200, "message": "success", "data": None})

    def behave_500(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        self.reply(handler, 500, {"code": 500, "message": "boom\nline two", "data": None})

    def behave_code_500(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        self.reply(handler, 200, {"code": 500, "message": "database is down", "data": None})

    def behave_html(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        self.reply(handler, 200, b"<html><body>login</body></html>", "text/html")

    def behave_garbage(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        handler.wfile.write(b"\x00\xff\xfe not http at all\r\n\r\n" * 20)
        handler.close_connection = True

    def behave_half_closed(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        handler.connection.shutdown(socket.SHUT_WR)
        handler.close_connection = True

    def behave_stall(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        self.release.wait(60)

    def behave_held(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        """A good answer, as soon as the test lets it go."""
        self.release.wait(60)
        self.behave_ok(handler, payload)

    def behave_trickle(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 10_000:
            handler.wfile.write(bytes([byte]))
            if self.release.wait(0.1):
                return

    def behave_endless(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not self.release.is_set():
            handler.wfile.write(b" " * 65_536)

    def behave_echo(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        message = f"refused {handler.headers.get('Authorization')}"
        self.reply(handler, 401, {"code": 401, "message": message, "data": None})

    def behave_redirect_away(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        handler.send_response(307)
        handler.send_header("Location", f"http://localhost:{self.port}/stolen")  # other name, so another host
        handler.end_headers()

    def behave_redirect_here(self, handler: BaseHTTPRequestHandler, payload: bytes) -> None:
        if handler.path.startswith("/v2"):
            handler.path = handler.path.removeprefix("/v2")
            return self.behave_ok(handler, payload)
        handler.send_response(307)
        handler.send_header("Location", f"/v2{handler.path}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def reply(
        self, handler: BaseHTTPRequestHandler, status: int, content: Any, kind: str = "application/json"
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def check(self, handler: BaseHTTPRequestHandler, payload: bytes) -> Received:
        """The call, if it is exactly what the contract says; else ValueError, which becomes a 400."""
        parts = urlsplit(handler.path)
        base = f"{self.prefix}/model-distillation/tasks/"
        task, _, kind = parts.path.removeprefix(base).partition("/")
        if not parts.path.startswith(base) or unquote(task) != self.task_id or kind not in CONTRACT:
            raise ValueError(f"no such path {parts.path}")
        method, required, further, fields = CONTRACT[kind]
        if handler.command != method:
            raise ValueError(f"method {handler.command}, expected {method}")
        pairs = parse_qsl(
            parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict"
        )
        query = dict(pairs)
        if len(query) < len(pairs) or not required <= set(query) <= required | further:
            raise ValueError(f"query parameters {sorted(query)}, required {sorted(required)}")
        check_query(query)
        body = check_body(handler, payload, fields)
        return Received(kind, query, body, dict(handler.headers.items()))


def check_query(query: dict[str, str]) -> None:
    if "currentEpoch" in query:
        int(query["currentEpoch"])
    for name in ("accuracy", "loss"):
        if name in query:
            float(query[name])
    if not 0 <= float(query.get("accuracy", 0)) <= 100:
        raise ValueError("accuracy is not percent")
    message = query.get("errorMessage", "x")
    if not message or len(message) > 500 or "\n" in message:
        raise ValueError("errorMessage: one line of at most 500 characters")


def check_body(
    handler: BaseHTTPRequestHandler, payload: bytes, fields: dict[str, tuple[type, ...]] | None
) -> Any:
    if fields is None:
        if payload:
            raise ValueError("no body expected")
        return None
    if not handler.headers.get("Content-Type", "").startswith("application/json"):
        raise ValueError("Content-Type is not application/json")
    body = json.loads(payload.decode("utf-8"))
    if not set(fields) <= set(body) <= set(fields) | set(OPTIONAL_BODY):
        raise ValueError(f"fields {sorted(body)}, expected {sorted(fields)}")
    for name, value in body.items():
        kinds = fields.get(name) or OPTIONAL_BODY[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or value != value:
            raise ValueError(f"{name} is {value!r}")
    if "detailedResults" in body:
        json.loads(body["detailedResults"])
    return body
