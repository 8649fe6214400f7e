"""Passwords, tokens and signatures in addresses: what is printed, logged or recorded shows `***` instead.

One function for every address: of databases, stores, the platform, dask schedulers and trackers, alone or inside a
library's error message. It is applied where text leaves the program: log lines, error lines, JSON files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# An address ends at a blank, a quote or a bracket. A password may itself contain `/` and `@`: the last `@` counts.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<rest>[^\s'\"<>`]*)")
# Names of parameters whose values are secrets, wherever they stand in the name: `X-Amz-Signature`, `sslpassword`.
_SECRET_WORDS = re.compile(
    r"pass(word|wd|phrase|code)?|pwd|secret|token|signature|credential|api[-_]?key|access[-_]?key|auth|odbc_connect",
    re.IGNORECASE,
)
_SECRET_NAMES = frozenset({"key", "sig", "pw", "jwt", "code", "session"})
_PARAMETER = re.compile(r"(?P<name>[^=&;?#]+)=(?P<value>[^&;#]*)")


def redact(text: str) -> str:
    """The text with the secrets of every `scheme://…` address in it replaced by `***`.

    Hidden are the password before `@` (for http and https also a name alone, which is a token there) and the values of
    parameters after `?` or `#` whose names speak of a secret.
    """
    return _ADDRESS.sub(_redact_address, text) if "://" in text else text


def redact_values(value: Any) -> Any:
    """`redact` of every text in a JSON value; keys stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    return [redact_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def secrets_of(address: str) -> list[str]:
    """The secrets in an address, as written and percent-decoded: a library's message may repeat them alone."""
    from urllib.parse import unquote_plus

    found = []
    for match in _ADDRESS.finditer(address):
        user, _, parameters = _split_user(match["rest"])
        if user is not None and ":" in user:
            found.append(user.partition(":")[2])
        found += [p["value"] for p in _PARAMETER.finditer(parameters) if _is_secret(p["name"])]
    written = [secret for secret in found if secret]
    return sorted({*written, *map(unquote_plus, written)}, key=len, reverse=True)


def _redact_address(match: re.Match[str]) -> str:
    scheme = match["scheme"]
    user, host, parameters = _split_user(match["rest"])
    parameters = _PARAMETER.sub(
        lambda part: f"{part['name']}={HIDDEN}" if _is_secret(part["name"]) and part["value"] else part[0],
        parameters,
    )
    if user is None:
        return f"{scheme}://{host}{parameters}"
    name, colon, _ = user.partition(":")
    if not colon and scheme.lower() in ("http", "https"):
        name = HIDDEN
    return f"{scheme}://{name}{':' + HIDDEN if colon else ''}@{host}{parameters}"


def _split_user(rest: str) -> tuple[str | None, str, str]:
    """`user:password`, the address after `@`, and everything from the first `?` or `#` after that."""
    user, at, tail = rest.rpartition("@")
    if at and not re.search(r"[?#][^@]*=", user):  # an `@` among the parameters belongs to them
        found: str | None = user
    else:
        found, tail = None, rest
        authority = re.match(r"([^/?#@]*)@", rest)
        if authority:
            found, tail = authority[1], rest[authority.end() :]
    place = re.search(r"[?#]", tail)
    cut = place.start() if place else len(tail)
    return found, tail[:cut], tail[cut:]


def _is_secret(name: str) -> bool:
    plain = name.lower()
    return plain in _SECRET_NAMES or _SECRET_WORDS.search(plain) is not None
