"""Who may talk to the server: Host and Origin checks, the token, the size of requests. Plain ASGI, before everything else.

- Host: a web page on another site can have its name resolve to 127.0.0.1; its requests carry that name.
- Origin: a page of another site can send forms and open sockets to this server; browsers say where they come from.
- Token: `Authorization: Bearer …`, or a cookie that the login page sets, which holds a keyed hash of it.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from backend.server.settings import WILDCARDS, Settings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 4_000_000
COOKIE = "qwen_distill_session"
LOGIN = "/login"
# Of every answer: nothing is guessed to be a script, and no page of another site shows ours in a frame.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>qwen-distill</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font-family:sans-serif;max-width:24rem;margin:20vh auto;padding:0 1rem}}
input,button{{font-size:1rem;padding:.5rem;width:100%;box-sizing:border-box;margin-top:.5rem}}</style>
<h1>qwen-distill</h1><form method="post" action="/login">
<label>Token 令牌 <input type="password" name="token" autocomplete="current-password" autofocus required></label>
<button>Sign in 登录</button></form><p>{message}</p></html>"""


class RefusedError(Exception):
    """The request is not let through."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """Wraps the application; what it refuses never reaches it."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.hosts = allowed_hosts(settings)
        self.session = session_of(settings.token) if settings.token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        send = with_headers(send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self.check_host(headers)
            self.check_origin(scope, headers)
            if self.session is not None and scope["type"] == "http" and scope["path"] == LOGIN:
                await self.login(scope, receive, send)
                return
            self.check_token(headers)
            if scope["type"] == "http":
                receive = await read_body(headers, receive)
        except RefusedError as error:
            await self.refuse(error, scope, headers, send)
            return
        await self.app(scope, receive, send)

    def check_host(self, headers: MutableMapping[str, str]) -> None:
        """Raises RefusedError for a Host header that is not this server's."""
        name = host_name(headers.get("host", ""))
        if name in self.hosts or (self.settings.host in WILDCARDS and is_address(name)):
            return
        raise RefusedError(
            403, f"Host {name[:100]!r} is not a name of this server: QWEN_DISTILL_HOSTS adds names"
        )

    def check_origin(self, scope: Scope, headers: MutableMapping[str, str]) -> None:
        """Raises RefusedError for what a page of another site sends: changes, and sockets, which see everything."""
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        same = origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        if not same or site in ("cross-site", "same-site"):
            raise RefusedError(403, "requests from pages of other sites are refused")

    def check_token(self, headers: MutableMapping[str, str]) -> None:
        """Raises RefusedError without the token, where one is needed."""
        if self.settings.token is None or self.session is None:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same_secret(value.strip(), self.settings.token):
            return
        if same_secret(read_cookie(headers.get("cookie", "")), self.session):
            return
        raise RefusedError(401, "a token is needed: Authorization: Bearer …, or sign in at /login")

    async def refuse(
        self, error: RefusedError, scope: Scope, headers: MutableMapping[str, str], send: Send
    ) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if error.status == 401 and "text/html" in headers.get("accept", ""):
            await respond(send, 303, b"", [(b"location", LOGIN.encode())])
            return
        answer = json.dumps({"code": error.status, "message": str(error), "data": None}).encode()
        extra = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
        await respond(send, error.status, answer, [(b"content-type", b"application/json"), *extra])

    async def login(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page that asks a browser's user for the token, and what its form sends."""
        message, status = "", 200
        if scope["method"] == "POST":
            body = await (await read_body({}, receive))()
            form = parse_qs(body["body"].decode("utf-8", "replace"))
            if same_secret(form.get("token", [""])[0].strip(), self.settings.token or ""):
                cookie = f"{COOKIE}={self.session}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
                await respond(send, 303, b"", [(b"location", b"/"), (b"set-cookie", cookie.encode())])
                return
            message, status = "Wrong token. 令牌错误。", 401
        page = LOGIN_PAGE.format(message=html.escape(message)).encode()
        await respond(send, status, page, [(b"content-type", b"text/html; charset=utf-8")])


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """The names under which clients reach the server."""
    names = {"localhost", "127.0.0.1", "::1", settings.host.lower(), *settings.further_hosts}
    if not is_loopback(settings.host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names - WILDCARDS)


def host_name(header: str) -> str:
    """The name or address in a Host header, without port and brackets; empty for anything odd."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def session_of(token: str) -> str:
    """What the cookie holds: it proves the token and does not reveal it; another token ends all sessions."""
    return hmac.new(token.encode(), b"qwen-distill session", hashlib.sha256).hexdigest()


def same_secret(given: str, expected: str) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def read_cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def with_headers(send: Send) -> Send:
    """A `send` that adds HEADERS."""

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return send_with


async def read_body(headers: MutableMapping[str, str], receive: Receive) -> Receive:
    """A `receive` that gives the whole body at once, then what follows (the client's leaving).

    Raises:
        RefusedError: when it is larger than LARGEST_BODY, as announced or as received.
    """
    announced = headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > LARGEST_BODY:
        raise RefusedError(413, f"the request is larger than {LARGEST_BODY} bytes")
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LARGEST_BODY:
            raise RefusedError(413, f"the request is larger than {LARGEST_BODY} bytes")
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
