"""A proxy before an HTTP server that notes every request and makes faults on the way.

    with fault_proxy(server.url, rule) as proxy:
        ...  # use proxy.url as the endpoint
    proxy.requests  # (method, path) of every request

`rule(request)` returns None where a request passes, or a fault: one of the functions below.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

HOP_HEADERS = {"connection", "transfer-encoding", "expect", "content-length", "keep-alive"}


class Request(NamedTuple):
    """path: unquoted and without the first slash ("bucket/a.zarr/zarr.json"). count: 1 for the first request with this
    method and path. query: as sent ("partNumber=1&uploadId=…")."""

    method: str
    path: str
    count: int
    query: str
    body: bytes


class Response(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange:
    """One request under way: what a fault can do with it."""

    def __init__(self, handler: BaseHTTPRequestHandler, server: str, body: bytes) -> None:
        self.handler, self.server, self.body = handler, server, body

    def forward(self) -> Response:
        """Have the server answer the request. The signature stays valid: the headers are those of the client."""
        address = urlsplit(self.server)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        try:
            connection.putrequest(
                self.handler.command, self.handler.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.handler.headers.items():
                if name.lower() not in HOP_HEADERS:
                    connection.putheader(name, value)
            if self.body or self.handler.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(self.body)))
            connection.endheaders(self.body)
            answer = connection.getresponse()
            body = answer.read()
            headers = [
                (name, value) for name, value in answer.getheaders() if name.lower() not in HOP_HEADERS
            ]
            length = answer.getheader("Content-Length") if self.handler.command == "HEAD" else str(len(body))
            if length is not None and answer.status not in (204, 304):
                headers.append(("Content-Length", length))
            return Response(answer.status, headers, body)
        finally:
            connection.close()

    def begin(self, response: Response) -> None:
        """Send status and headers."""
        self.handler.send_response_only(response.status)
        for name, value in response.headers:
            self.handler.send_header(name, value)
        self.handler.end_headers()

    def send(self, response: Response) -> None:
        self.begin(response)
        if self.handler.command != "HEAD":
            self.handler.wfile.write(response.body)

    def close(self) -> None:
        """End the connection."""
        self.handler.close_connection = True


Fault = Callable[[Exchange], None]
Rule = Callable[[Request], Fault | None]


def s3_error(status: int, code: str) -> Fault:
    """An error as S3 sends it, without asking the server."""

    def fault(exchange: Exchange) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code} of the proxy</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        exchange.send(Response(status, headers, body))

    return fault


SLOW_DOWN = s3_error(503, "SlowDown")
INTERNAL_ERROR = s3_error(500, "InternalError")
ACCESS_DENIED = s3_error(403, "AccessDenied")
CLOCK_SKEW = s3_error(403, "RequestTimeTooSkewed")
EXPIRED = s3_error(400, "ExpiredToken")


def cut(exchange: Exchange) -> None:
    """The connection is lost in the middle of the answer's body (before the answer, where it has none)."""
    response = exchange.forward()
    if response.body:
        exchange.begin(response)
        exchange.handler.wfile.write(response.body[: len(response.body) // 2])
    exchange.close()


def dropped(exchange: Exchange) -> None:
    """The connection is lost before the request reaches the server."""
    exchange.close()


def lost(exchange: Exchange) -> None:
    """The server has done what was asked, and its answer is lost."""
    exchange.forward()
    exchange.close()


def wrong_bytes(exchange: Exchange) -> None:
    """One bit of the answer's body is another, and no checksum of the server's comes with it."""
    response = exchange.forward()
    headers = [item for item in response.headers if not item[0].lower().startswith("x-amz-checksum")]
    exchange.send(response._replace(headers=headers, body=flipped(response.body)))


def wrong_upload(exchange: Exchange) -> None:
    """One bit of what is sent is another when it reaches the server."""
    exchange.body = flipped(exchange.body)
    exchange.send(exchange.forward())


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


def slow(seconds: float, parts: int = 10) -> Fault:
    """The answer's body comes in parts, over this time."""

    def fault(exchange: Exchange) -> None:
        response = exchange.forward()
        exchange.begin(response)
        step = max(1, -(-len(response.body) // parts))
        for start in range(0, len(response.body), step):
            time.sleep(seconds / parts)
            exchange.handler.wfile.write(response.body[start : start + step])

    return fault


@dataclass
class Proxy:
    """`rule` may be replaced while the proxy runs."""

    url: str
    rule: Rule | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_of(self, method: str, path: str, query: str, body: bytes) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            self.counts[method, path] += 1
            count = self.counts[method, path]
        return self.rule(Request(method, path, count, query, body)) if self.rule else None


@contextmanager
def fault_proxy(server: str, rule: Rule | None = None) -> Iterator[Proxy]:
    """A proxy before the server at this URL, for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def answer(self) -> None:
            address = urlsplit(self.path)
            body = self.read_body()
            fault = proxy.fault_of(self.command, unquote(address.path).lstrip("/"), address.query, body)
            exchange = Exchange(self, server, body)
            try:
                fault(exchange) if fault else exchange.send(exchange.forward())
            except (ConnectionError, TimeoutError):  # the client was killed, or the server has ended
                exchange.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = answer

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *arguments: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that was killed: nothing to report."""

    listener = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{listener.server_port}", rule)
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
