"""As much of Amazon's S3 as reading takes, over a folder: list, head, get with ranges. Real HTTP, no signatures."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


class Faults:
    """What a server does instead of answering, and the (method, key) of every request that came.

    `answer(method, key, count)` of the count-th request for the key: None answers it, a status is an error, bytes are
    sent as the object's, "cut" ends the connection in the middle.
    """

    def __init__(self, answer: Callable[[str, str, int], int | bytes | str | None] | None = None) -> None:
        self.answer = answer or (lambda method, key, count: None)
        self.requests: list[tuple[str, str]] = []

    def of(self, method: str, key: str) -> int | bytes | str | None:
        self.requests.append((method, key))
        return self.answer(method, key, self.requests.count((method, key)))


@contextmanager
def object_server(folder: Path, faults: Faults | None = None) -> Iterator[str]:
    """Serve the folder's files as the objects of s3://bucket. Yields the endpoint's URL."""
    instead = faults or Faults()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            address = urlsplit(self.path)
            key = unquote(address.path).removeprefix(f"/{BUCKET}").lstrip("/")
            file = folder / key
            fault = instead.of(self.command, key)
            if isinstance(fault, int):
                code = {403: "AccessDenied", 503: "SlowDown"}.get(fault, "InternalError")
                self.send(fault, f"<Error><Code>{code}</Code></Error>".encode(), "application/xml")
            elif isinstance(fault, bytes):
                self.send_range(fault)
            elif fault == "cut":
                self.cut(file.read_bytes())
            elif not key:
                self.send(200, listing(folder, parse_qs(address.query)), "application/xml")
            elif file.is_file():
                self.send_range(file.read_bytes())
            else:
                self.send(404, b"<Error><Code>NoSuchKey</Code></Error>", "application/xml")

        def cut(self, data: bytes) -> None:
            """A connection that is lost half-way."""
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True

        def send_range(self, data: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                return self.send(200, data, "application/octet-stream")
            first, last = asked.groups()
            start = int(first) if first else len(data) - int(last)
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            content_range = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.send(206, data[start:stop], "application/octet-stream", content_range)

        def send(self, status: int, body: bytes, kind: str, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def listing(folder: Path, query: dict[str, list[str]]) -> bytes:
    """ListObjectsV2: every key below the prefix, with the delimiter's folders."""
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    keys = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    contents, folders = [], set()
    for key in sorted(key for key in keys if key.startswith(prefix)):
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
            contents.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{keys[key].stat().st_size}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;0&quot;</ETag></Contents>"
            )
    prefixes = [
        f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
    ]
    body = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult>{body}{''.join(contents)}{''.join(prefixes)}</ListBucketResult>".encode()
