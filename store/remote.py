"""Files at a URL, through fsspec: read in parts, written whole and compared, tried again after a failure, with one line
for what goes wrong.

Credentials are those of each provider's own tools (environment variables, profiles, roles of the machine). fsspec takes
further settings, such as the endpoint of another S3 server, from its configuration (`FSSPEC_S3_ENDPOINT_URL`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from store.errors import RemoteError, StoreError

BLOCK_BYTES = 16 * 1024 * 1024  # one request
CONNECTIONS = 4  # requests of one file at the same time
PART_BYTES = 32 * 1024 * 1024  # of an upload
PARTS = 2  # of one file at the same time
#: Pauses between tries: half a minute outlasts throttling and a short loss of the network.
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: Of uploads: ten minutes more, during which encoding goes on as long as there is room for its shards.
LONG_PAUSES_S = (*PAUSES_S, *([15.0] * 40))
FIRST_PAUSES_S = (0.5,)  # of the first file, where a wrong address is likelier than a fault
CREDENTIAL_ERRORS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "DefaultCredentialsError",  # of Google's client
    "ClientAuthenticationError",  # of Azure's
)
EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
NO_BUCKET_CODES = ("ContainerNotFound",)  # Azure's; other clients raise FileNotFoundError
CLOCK_CODES = ("RequestTimeTooSkewed", "RequestInTheFuture")

#: fsspec's names of the file systems (with their endpoints) that were seen to refuse a second `create`.
CREATE_WORKS: set[str] = set()

Value = TypeVar("Value")
log = logging.getLogger(__name__)
# It prints a traceback for every refused request, which is reported here in one line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class Entry(NamedTuple):
    """What a listing says of a file. `etag`: changes with the content; empty where the file system has none."""

    size: int
    etag: str


class RemoteFiles:
    """The files below a URL. Safe to share between threads, to fork and to pickle: a process opens its own client.

    pauses_s: between tries of each request. sleep: waits so many seconds; may raise to end the waiting.
    """

    def __init__(
        self,
        url: str,
        pauses_s: tuple[float, ...] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self.pauses_s = pauses_s
        self.sleep = sleep

    def read(self, key: str, pauses_s: tuple[float, ...] | None = None) -> bytes:
        """A whole small file. Raises FileNotFoundError, or StoreError for everything else."""
        return self._range(key, 0, None, pauses_s)

    def blocks(self, key: str, size: int | None = None) -> Iterator[bytes]:
        """A file's bytes in order, several requests under way at once. Raises as `read`.

        size: of the file, where it is known, which saves a request. A shorter file ends earlier.
        """
        if size is None:
            size = self._try(key, None, lambda files, path: int(files.info(path)["size"]))
        if not size:  # Azure refuses every range of an empty file
            return
        starts = range(0, size, BLOCK_BYTES)
        if self.url.startswith("http") or len(starts) < 2:
            first = self._range(key, 0, min(size, BLOCK_BYTES))
            yield first
            if len(first) >= size:  # also from a web server that answers every range with the whole file
                return
            starts = starts[1:]
        with ThreadPoolExecutor(CONNECTIONS, "store-download") as pool:
            pending: list[Any] = []
            for start in starts:
                pending.append(pool.submit(self._range, key, start, min(size, start + BLOCK_BYTES)))
                if len(pending) == CONNECTIONS:  # bounds the memory
                    yield pending.pop(0).result()
            for request in pending:
                yield request.result()

    def size(self, key: str) -> int | None:
        """Bytes of a file; None where there is none. Raises StoreError."""
        try:
            return self._try(key, None, lambda files, path: int(files.info(path)["size"]), fresh=True)
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """The keys below a folder, where the file system can list; else none."""

        def find(files: Any, path: str) -> list[str]:
            root = path.removesuffix(folder)
            return [name.removeprefix(root) for name in files.find(path)]

        try:
            return self._try(folder, FIRST_PAUSES_S, find)
        except (FileNotFoundError, StoreError):
            return []

    def listing(self, folder: str = "", pauses_s: tuple[float, ...] | None = None) -> dict[str, Entry]:
        """Every file below a folder, keys relative to the URL; none where there is no such folder. Raises StoreError."""

        def find(files: Any, path: str) -> dict[str, Entry]:
            files.invalidate_cache()
            path = path.rstrip("/")
            start = len(path) - len(folder)
            found = files.find(path, detail=True)
            if not isinstance(found, Mapping):  # adlfs, of an address that is a file
                found = {name: files.info(name) for name in found}
            # s3fs lists an empty folder a second time, as one file: if another host writes in between, as a directory.
            return {
                name[start:].lstrip("/"): Entry(int(info["size"]), etag_of(info))
                for name, info in found.items()
                if info["type"] != "directory"
            }

        try:
            return self._try(folder, pauses_s, find)
        except FileNotFoundError:
            return {}

    def modified(self, key: str) -> float:
        """When a file was written, seconds since 1970 by the server's clock. Raises FileNotFoundError, StoreError."""
        return self._try(key, None, lambda files, path: float(files.modified(path).timestamp()), fresh=True)

    def create(self, key: str, data: bytes) -> bool | None:
        """Write a small file only if there is none; whether it was written. None: this file system cannot do that.

        Raises StoreError.
        """

        def put(files: Any, path: str) -> bool | None:
            make_folder(files, path)
            try:
                files.pipe_file(path, data, mode="create")
            except (NotImplementedError, TypeError):
                return None
            except OSError as error:
                if exists_already(error):
                    # Also when the answer to an earlier try was lost on the way.
                    return bytes(files.cat_file(path)) == data
                if "NotImplemented" in str(error) or "not implemented" in str(error):
                    return None
                raise
            if files._fs_token in CREATE_WORKS:
                return True
            try:  # some file systems ignore the mode
                files.pipe_file(path, data, mode="create")
            except OSError as error:
                if exists_already(error):
                    CREATE_WORKS.add(files._fs_token)
                    return True
                raise
            return None

        return self._try(key, None, put, write=True)

    def write(self, key: str, data: bytes | mmap.mmap) -> str:
        """Write a whole file, which appears under its name when it is complete, and compare what has arrived.

        Returns its etag, as `Entry` has it. Raises StoreError.
        """

        def put(files: Any, path: str) -> str:
            make_folder(files, path)
            if hasattr(files, "_s3"):  # a map is sent in parts, so that a large file need not fit into memory
                large = len(data) >= 2 * PART_BYTES
                body = data if large else bytes(data)
                answer = files.pipe_file(path, body, chunksize=PART_BYTES, max_concurrency=PARTS)
                etag = etag_of(answer) if isinstance(answer, Mapping) else ""
                if etag == digest(data, parts=False):  # which saves a request
                    return etag
            elif "file" in files.protocol:
                partial = f"{path}.partial"
                files.pipe_file(partial, bytes(data))
                files.mv(partial, path)
            else:
                files.pipe_file(path, bytes(data))
            files.invalidate_cache(path.rpartition("/")[0])
            info = files.info(path)
            if not arrived(files, path, info, data):
                raise OSError("what arrived is not what was sent")
            return etag_of(info)

        return self._try(key, None, put, write=True)

    def download(self, key: str, target: Path) -> None:
        """Copy a file to this disk, through no more memory than a part needs. Raises StoreError, FileNotFoundError."""
        self._try(key, FIRST_PAUSES_S, lambda files, path: files.get_file(path, str(target)))

    def check_writable(self, key: str) -> None:
        """Write an empty file and delete it. Raises StoreError."""
        files = RemoteFiles(self.url, FIRST_PAUSES_S)
        files.write(key, b"")
        files.delete(key)

    def delete(self, key: str) -> None:
        """Delete a file, if there is one. Raises StoreError."""
        with contextlib.suppress(FileNotFoundError):
            self._try(key, None, lambda files, path: files.rm_file(path))

    def _range(
        self, key: str, start: int, stop: int | None, pauses_s: tuple[float, ...] | None = None
    ) -> bytes:
        """One request: without a range s3fs asks for the size first, whose refusal has no reason in it."""

        def get(files: Any, path: str) -> bytes:
            try:
                return bytes(files.cat_file(path, start=start, end=stop))
            except Exception as error:
                if codes_of(error) & {"InvalidRange", "416"}:  # the file is empty or shorter
                    return b""
                raise

        return self._try(key, pauses_s, get)

    def _try(
        self,
        key: str,
        pauses_s: tuple[float, ...] | None,
        work: Callable[[Any, str], Value],
        *,
        fresh: bool = False,
        write: bool = False,
    ) -> Value:
        """What `work` returns, tried again where that can help. `fresh`: not from a listing that was kept.

        `write`: FileNotFoundError means that there is no such bucket, and becomes a StoreError.
        """
        where = f"{self.url}/{key}".rstrip("/")
        if pauses_s is None:
            pauses_s = PAUSES_S if self.pauses_s is None else self.pauses_s
        for pause in (*pauses_s, None):
            try:
                import fsspec

                files, path = fsspec.core.url_to_fs(where)
                if fresh:
                    files.invalidate_cache(path.rpartition("/")[0])
                return work(files, path)
            except FileNotFoundError as error:
                if not write:
                    raise
                raise StoreError(
                    f"{where}: cannot be written: {error}; check the address: is there such a bucket?"
                ) from error
            except (
                Exception
            ) as error:  # no network, no credentials, no such protocol: each package has its own errors
                reason = reason_of(error)
                if reason is not None:
                    raise RemoteError(f"{where}: {reason}") from error
                text = " ".join(str(error).split()) or type(error).__name__
                if pause is None:
                    raise RemoteError(
                        f"{where}: does not work: {text[:300]}; check address and network, then run the same command again"
                    ) from error
                log.warning("%s: %s; trying again in %g s", where, text[:200], pause)
                self.sleep(pause)
        raise AssertionError("unreachable")


def refuse_web_server(url: str) -> None:
    """Raises StoreError for an address that nothing can be written to."""
    if url.partition("://")[0] in ("http", "https"):
        raise StoreError(
            f"{url}: a web server cannot be written to: expected s3://, gs://, az:// or another address that fsspec can "
            "list and write"
        )


def make_folder(files: Any, path: str) -> None:
    if not hasattr(files, "_s3"):  # object stores have no folders
        files.makedirs(path.rpartition("/")[0], exist_ok=True)


def etag_of(info: Mapping[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


def arrived(files: Any, path: str, info: Mapping[str, Any], data: bytes | mmap.mmap) -> bool:
    """Whether a file that was written has this content: by the provider's checksum where it has one, else read back."""
    if int(info["size"]) != len(data):
        return False
    etag = etag_of(info)
    return etag == digest(data, parts="-" in etag) or bytes(files.cat_file(path)) == bytes(data)


def same_content(entry: Entry | None, data: bytes | mmap.mmap) -> bool:
    """Whether a listing shows that a file has this content already; false where its etag does not tell."""
    return (
        entry is not None and entry.size == len(data) and entry.etag == digest(data, parts="-" in entry.etag)
    )


def digest(data: bytes | mmap.mmap, *, parts: bool) -> str:
    """The etag of an object sent whole (its MD5), or in parts (MD5 of theirs). With some encryptions it is another."""
    with memoryview(data) as view:
        if not parts:
            return hashlib.md5(view, usedforsecurity=False).hexdigest()
        starts = range(0, len(view), PART_BYTES)
        sums = [
            hashlib.md5(view[start : start + PART_BYTES], usedforsecurity=False).digest() for start in starts
        ]
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"


def codes_of(error: Exception) -> set[str]:
    """The error code of the server's answer and its HTTP status, as far as the client tells; empty without an answer."""
    found: set[Any] = set()
    for cause in (error, error.__cause__):
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):  # S3's
            found.add(answer.get("Error", {}).get("Code"))
        found.add(getattr(cause, "status", None))  # aiohttp's
        found |= {getattr(cause, name, None) for name in ("error_code", "status_code")}  # Azure's
        found.add(getattr(cause, "code", None))  # gcsfs'
    return {str(getattr(code, "value", code)) for code in found if code}


def exists_already(error: OSError) -> bool:
    """Whether a conditional put was refused. s3fs knows that of Amazon's answer; other servers' answers say less."""
    return isinstance(error, FileExistsError) or bool(codes_of(error) & {"PreconditionFailed", "412"})


def reason_of(error: Exception) -> str | None:
    """What is wrong and what to do, for an error that another try does not help against; None for others."""
    codes = codes_of(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ImportError):
        what = (
            "remote stores need fsspec"
            if error.name == "fsspec"
            else "this kind of address needs another package"
        )
        return f"{what} ({error}): pip install 'qwen-distill[remote]', or the package that is named"
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return f"{error}: expected s3://, gs://, az://, https:// or another address that fsspec knows"
    if names & set(CREDENTIAL_ERRORS):
        return (
            "no credentials: set them as for the provider's own tools (for S3 AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true)"
        )
    if codes & set(EXPIRED_CODES):
        return "the credentials have expired: renew them, then run the same command again"
    if codes & set(CLOCK_CODES):
        return "the server refuses requests because of this machine's clock: set the clock (NTP)"
    if codes & set(NO_BUCKET_CODES):
        return "cannot be written: there is no such bucket or container: check the address"
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")  # gcsfs
    if isinstance(error, PermissionError) or forbidden or codes & {"401", "403"}:
        return "no permission: check the credentials, whether they have expired, and their rights"
    return None
