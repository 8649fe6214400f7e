"""Names, paths and URLs that come from a web form: what is let through, and what each must not reach."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from backend.task.errors import OptionError
from backend.task.options import shown
from console.output import redact

LONGEST_NAME = 200
FORBIDDEN_IN_IDS = frozenset("/\\:*?\"'<>|#%&;$`")
DATABASE_SETTINGS = frozenset({"charset", "collation", "connect_timeout", "sslmode", "ssl_verify_cert"})
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
SERVER_DATABASES = ("mysql", "mariadb", "postgresql")


def check_id(option: str, value: str) -> str:
    """An id that serves as one component of a path or URL.

    Raises:
        OptionError: when it is empty, long, `.`, `..`, starts with a dash or holds separators.
    """
    reason = None
    if not value or len(value.encode("utf-8")) > LONGEST_NAME:
        reason = f"expected 1 to {LONGEST_NAME} bytes"
    elif value in (".", "..") or value.startswith(("-", "~")) or FORBIDDEN_IN_IDS & set(value):
        reason = "expected a plain name without / \\ : .. and the like"
    if reason:
        raise OptionError(f"--{option}: {reason}, got {shown(value)}")
    return value


def check_path(option: str, value: str) -> Path:
    """A path without `..`: the back end joins roots and web-form text, so `..` only ever means an escape."""
    if ".." in re.split(r"[/\\]", value):
        raise OptionError(f"--{option}: '..' is not allowed in a path, got {shown(value)}")
    return Path(value)


def exists_at(option: str, path: Path) -> bool:
    """Whether something is at `path`.

    Raises:
        OptionError: when that cannot be determined: a name too long, a folder that may not be entered.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise OptionError(f"--{option}: {shown(str(path))}: {error.strerror}") from None
    return True


def inside(option: str, root: Path, name: str, allow_symlinks: bool = False) -> Path:
    """`root / name`, which must stay below `root`, symbolic links followed unless they are allowed.

    Raises:
        OptionError: when the name is absolute, holds `..`, or leads outside through a link.
    """
    check_path(option, name)
    if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or name.startswith("~"):
        raise OptionError(f"--{option}: expected a name below {root}, got {shown(name)}")
    path = root / name
    if not allow_symlinks:
        check_inside(option, root, path)
    return path


def check_inside(option: str, root: Path, path: Path) -> None:
    """Raises OptionError when `path`, links followed, is not below `root`."""
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError):
        raise OptionError(f"--{option}: {shown(str(path))} cannot be resolved") from None
    if real != real_root and real_root not in real.parents:
        raise OptionError(f"--{option}: {shown(str(path))} leads outside {root}")


def check_api_url(value: str, allow_local: bool = False) -> str:
    """The platform's base URL without its trailing slash: http or https, a host, nothing else.

    localhost and private networks are where the platform usually lives and are fine; link-local addresses
    (cloud metadata services) are not, unless allowed. Names are checked again by address when connecting.

    Raises:
        OptionError: naming what is wrong.
    """
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise OptionError(f"--api_base_url: {error}, got {shown(redact(value))}") from None
    reason = None
    if parts.scheme not in ("http", "https"):
        reason = "expected http:// or https://"
    elif "@" in parts.netloc:
        raise OptionError(
            "--api_base_url: no user or password in the URL: set QWEN_DISTILL_API_TOKEN instead"
        )
    elif not parts.hostname or port == 0 or not is_host(parts.hostname):
        reason = "expected a host"
    elif parts.query or parts.fragment or re.search(r"[\s\\<>\"]", value):
        reason = "expected no query, fragment or blanks"
    elif not allow_local and is_link_local(parts.hostname):
        reason = "a link-local address is not allowed"
    if reason:
        raise OptionError(f"--api_base_url: {reason}, got {shown(redact(value))}")
    return value.rstrip("/")


def is_host(host: str) -> bool:
    """True for host names (also internationalized) and addresses, false for what would confuse a header."""
    if ":" in host:
        return read_address(host.partition("%")[0]) is not None
    try:
        encoded = host.encode("idna").decode("ascii")
    except UnicodeError:
        return False
    return re.fullmatch(r"[A-Za-z0-9._\-]+", encoded) is not None


# Metadata services of clouds outside 169.254/16 and fe80::/10: AWS over IPv6, Alibaba Cloud, Oracle Cloud.
METADATA_ADDRESSES = frozenset(
    ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_link_local(host: str) -> bool:
    """True for link-local addresses and those of metadata services, however they are written; false for names."""
    address = read_address(host.partition("%")[0])
    return address is not None and any(
        meant.is_link_local or meant in METADATA_ADDRESSES for meant in meanings(address)
    )


def resolves_to_link_local(host: str) -> bool:
    """The same for names too, by what they resolve to now; false for a name that is not known."""
    if is_link_local(host):
        return True
    if not host or read_address(host) is not None:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False  # connecting reports it
    return any(is_link_local(str(entry[4][0])) for entry in found)


def meanings(address: Address) -> Iterator[Address]:
    """The address itself, and the IPv4 address that an IPv6 one carries: mapped, compatible, 6to4, Teredo or NAT64."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        carried = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        number = int(address)
        if address in NAT64 or number >> 32 == 0:
            carried.append(ipaddress.IPv4Address(number & 0xFFFFFFFF))
        yield from (one for one in carried if one is not None)


def read_address(host: str) -> Address | None:
    """The address that `host` spells, also as 2852039166 or 0xa9fea9fe, which connecting understands, too."""
    # Resolvers ignore the root's dot, and internationalized names turn full-width digits into plain ones.
    host = unicodedata.normalize("NFKC", host).rstrip(".")
    for read in (ipaddress.ip_address, lambda text: ipaddress.ip_address(socket.inet_aton(text))):
        try:
            return read(host)
        except (ValueError, OSError):
            continue
    return None


def check_database_url(value: str, root: Path, allow_local: bool = False) -> str:
    """A database URL from outside: a server, or an SQLite file below the data sets' root.

    Raises:
        OptionError: for any other local file, other schemes, link-local hosts; the text holds no password.
    """
    scheme, separator, rest = value.partition("://")
    dialect = scheme.lower().partition("+")[0]
    if not separator or dialect not in (*SERVER_DATABASES, "sqlite"):
        expected = ", ".join((*SERVER_DATABASES, "sqlite"))
        raise OptionError(f"--dataset_url: expected one of {expected} before ://, got {shown(scheme)}")
    if dialect == "sqlite":
        check_sqlite_file(rest, root, allow_local)
        return value
    try:
        parts = urlsplit(value)
        host, settings = parts.hostname or "", parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        raise OptionError("--dataset_url: the host cannot be read") from None
    if not allow_local and resolves_to_link_local(host):
        raise OptionError(f"--dataset_url: a link-local host is not allowed, got {shown(host)}")
    odd = sorted(set(settings) - DATABASE_SETTINGS)
    if odd and not allow_local:
        # Drivers take files and other hosts from here (unix_socket, read_default_file, local_infile, host).
        raise OptionError(f"--dataset_url: {shown(odd[0])} is not allowed after '?'")
    return value


def check_sqlite_file(rest: str, root: Path, allow_local: bool) -> None:
    """`sqlite:///relative` and `sqlite:////absolute` below the root; `file:` URIs only when allowed."""
    if allow_local:
        return
    name = rest.partition("?")[0].removeprefix("/")
    if name.lower().startswith("file:") or "?" in rest or name in ("", ":memory:"):
        raise OptionError("--dataset_url: expected sqlite:///FILE without parameters")
    check_path("dataset_url", name)
    try:
        check_inside("dataset_url", root, Path(name))
    except OptionError as error:
        raise OptionError(f"{error}: set distillation.security.allow-local-urls or copy it there") from None
