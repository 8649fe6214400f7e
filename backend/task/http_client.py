"""One HTTP call, made safely: a deadline over all of it, no redirect to other hosts, no secret in any text."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from backend.task.calls import Call, one_line
from backend.task.errors import OptionError
from backend.task.safety import is_link_local

TOKEN_VARIABLE = "QWEN_DISTILL_API_TOKEN"
CONNECT_TIMEOUT_S = 3.0
LARGEST_ANSWER = 65_536
LONGEST_REASON = 200
REDIRECTS = 2
# Not the call's fault: busy, or a gateway in front of a service that is still starting.
RETRY_STATUS = frozenset({404, 408, 409, 421, 423, 425, 429})


@dataclass(frozen=True)
class Delivery:
    """How a call ended: delivered, worth another try, or (`reached` False) no answer at all."""

    delivered: bool
    reason: str = ""
    retry: bool = True
    reached: bool = True


class RefusedAddressError(OSError):
    """The host's name leads to a link-local address (cloud metadata), which is not allowed."""


def read_token() -> str | None:
    """The bearer token from the environment.

    Raises:
        OptionError: when it holds characters that a header cannot carry (the text does not show it).
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in token):
        raise OptionError(f"{TOKEN_VARIABLE}: expected printable ASCII without blanks")
    return token or None


class HttpClient:
    """Makes calls below `base_url`, one at a time; `abort` ends the one under way from another thread."""

    def __init__(self, base_url: str, token: str | None = None, allow_link_local: bool = False) -> None:
        self.parts = urlsplit(base_url)
        self.token = token
        self.allow_link_local = allow_link_local
        self.socket: socket.socket | None = None

    def deliver(self, call: Call, timeout_s: float) -> Delivery:
        """Make the call; whatever goes wrong is a result, never an exception."""
        started = time.monotonic()
        try:
            return self.follow(call, timeout_s)
        except RefusedAddressError as error:
            return Delivery(False, str(error), retry=False)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = self.clean(str(error) or type(error).__name__)
            if time.monotonic() - started >= timeout_s:  # the timer's shutdown looks like a closed connection
                reason = f"no answer within {timeout_s:.1f} s"
            return Delivery(False, reason, reached=False)

    def abort(self) -> None:
        """End the call under way: its socket is shut down, the call fails at once."""
        current = self.socket
        if current is not None:
            with contextlib.suppress(OSError):
                current.shutdown(socket.SHUT_RDWR)

    def follow(self, call: Call, timeout_s: float) -> Delivery:
        """The call, redirects within the same scheme, host and port included."""
        target = self.parts.path.rstrip("/") + call.target
        for _ in range(REDIRECTS + 1):
            status, location, text = self.exchange(call, target, timeout_s)
            if status not in (301, 302, 307, 308):
                return self.judge(status, text)
            next_url = urlsplit(urljoin(self.origin + target, location))
            if f"{next_url.scheme}://{next_url.netloc}" != self.origin:
                return Delivery(False, "redirected to another host: not followed")
            target = next_url.path + (f"?{next_url.query}" if next_url.query else "")
        return Delivery(False, "redirected in circles")

    @property
    def origin(self) -> str:
        return f"{self.parts.scheme}://{self.parts.netloc}"

    def exchange(self, call: Call, target: str, timeout_s: float) -> tuple[int, str, bytes]:
        """One request and its answer: status, Location, the first bytes of the body.

        A socket's own timeout starts again with every byte; the timer here is what ends a trickling answer.
        """
        connection = self.connect(timeout_s)
        timer = threading.Timer(timeout_s, self.abort)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            connection.request(call.method, target, body=call.payload, headers=self.headers(call))
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Location", ""), answer.read(LARGEST_ANSWER)
        finally:
            timer.cancel()
            under_way, self.socket = self.socket, None
            if under_way is not None:
                under_way.close()
            connection.close()

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        host = self.parts.hostname or ""
        connection = kinds[self.parts.scheme](host, self.parts.port, timeout=timeout_s)
        connection._create_connection = self.open_socket  # type: ignore[attr-defined]
        return connection

    def open_socket(self, address: tuple[str, int], timeout: float, *rest: Any) -> socket.socket:
        """Connect, then look where the name really led: a DNS entry may point at a metadata service."""
        host = address[0] if address[0].isascii() else address[0].encode("idna").decode("ascii")
        found = socket.create_connection((host, address[1]), min(timeout, CONNECT_TIMEOUT_S))
        found.settimeout(timeout)
        if not self.allow_link_local and is_link_local(found.getpeername()[0]):
            found.close()
            raise RefusedAddressError(f"{address[0]} is a link-local address: not allowed")
        # A second handle on the same connection: TLS takes over the first one, and its handshake may stall, too.
        self.socket = found.dup()
        return found

    def headers(self, call: Call) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "qwen-distill", "Connection": "close"}
        if call.body is not None:
            headers["Content-Type"] = "application/json; charset=utf-8"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers

    def judge(self, status: int, text: bytes) -> Delivery:
        """Success is a 2xx answer holding JSON with `code` 200; anything else has a reason."""
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        answer = answer if isinstance(answer, dict) else None
        message = self.clean(str(answer.get("message", ""))) if answer else ""
        if not 200 <= status < 300:
            retry = status >= 500 or status in RETRY_STATUS
            return Delivery(False, f"HTTP {status} {message}".strip(), retry=retry)
        if answer is None:
            return Delivery(False, "the answer is not the platform's JSON")
        if answer.get("code") != 200:
            code = self.clean(str(answer.get("code")))
            refused = isinstance(answer.get("code"), int) and 400 <= answer["code"] < 500
            return Delivery(False, f"code {code} {message}".strip(), retry=not refused)
        return Delivery(True)

    def clean(self, text: str) -> str:
        """Text from outside for a log: one line, short, without the token should a server echo it."""
        if self.token:
            text = text.replace(self.token, "***")
        return one_line(text)[:LONGEST_REASON]
