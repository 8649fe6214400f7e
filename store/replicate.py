"""Copy a complete store as it is, file by file, between folders and URLs.

A file appears at the target when it is whole, and is compared with the store's checksum on the way; the root's zarr.json
comes last, so that a copy that was interrupted is no store. A second run copies what is missing.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from files.cache import cache_folder
from files.writing import PARTIAL_PREFIX, replace_file
from store.errors import StoreError, disk_errors
from store.format import (
    CONTENT,
    LEDGER,
    NOTES_FOLDER,
    OWN_ARRAYS,
    SIZES,
    TOKEN_SCALE,
    Manifest,
    commits_file,
    teacher_of,
)
from store.metadata import (
    ZARR_JSON,
    belongs,
    group_metadata,
    is_url,
    parse_manifest,
    recorded_checksum,
    to_json,
)
from store.mirror import CACHE_VARIABLE
from store.remote import RemoteFiles, refuse_web_server
from store.shards import READ_BLOCK, Layout, crc32c
from store.upload import mapped

MARKER = ".copying"  # at the target, while it is no store: which store is being copied to it


class Files(Protocol):
    """The files of a store, in a folder or at a URL. Keys are relative to it."""

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError, or StoreError."""

    def blocks(self, key: str) -> Iterator[bytes]: ...
    def size(self, key: str) -> int | None: ...
    def names(self, folder: str) -> list[str]: ...
    def write(self, key: str, data: bytes) -> object: ...
    def delete(self, key: str) -> None: ...


class LocalFiles:
    """The files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    def blocks(self, key: str) -> Iterator[bytes]:
        with (self.folder / key).open("rb") as file:
            while block := file.read(READ_BLOCK):
                yield block

    def size(self, key: str) -> int | None:
        try:
            return (self.folder / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        found = (path for path in (self.folder / folder).rglob("*") if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in found]

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)


def files_at(place: str) -> Files:
    return RemoteFiles(place) if is_url(place) else LocalFiles(Path(place))


class Copied(NamedTuple):
    """What a copy did. `skipped`: files that an earlier run had copied."""

    files: int
    bytes: int
    skipped: int


def replicate_store(
    source: str,
    target: str,
    arrays: Collection[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Copied | None:
    """Copy the store at `source` to `target`; None when `stopped` ended it, and the same call continues.

    arrays: names (`features/pooled`) or their beginnings (`targets`) of the arrays to take; None takes all. What
        belongs to every store (keys, validity, sizes) always comes along.
    progress: called with the files done and the files in all.

    Raises StoreError for no or an incomplete store, unknown arrays, a target that is something else, damaged
    files, and a disk or an address that refuses.
    """
    refuse_web_server(target)
    files, place = files_at(source), files_at(target)
    try:
        content = files.read(ZARR_JSON)
    except OSError:
        raise StoreError(f"{source}: no such store (no {ZARR_JSON} in it)") from None
    root = json.loads(content)
    manifest = parse_manifest(root, source)
    if not manifest.complete:
        raise StoreError(f"{source}: incomplete: run its extraction to the end, then copy it")
    plan = Plan(files, root, manifest, chosen_arrays(manifest, arrays, source))
    if arrays is None:
        plan.content = content
    done = begin(place, target, plan.content)
    sizes = {"bytes": 0, "skipped": 0}
    keys = [*plan.files(), *(name for name in files.names(NOTES_FOLDER) if name.startswith(NOTES_FOLDER))]
    if files.size(LEDGER) is not None:
        keys.append(LEDGER)
    for number, key in enumerate([] if done else keys):
        if stopped():
            return None
        progress(number, len(keys))
        if place.size(key) is not None:  # files appear whole
            sizes["skipped"] += 1
            continue
        data = plan.own.get(key)
        if data is None:
            data = read_checked(files, source, key, plan.checksum(key))
        place.write(key, data)
        sizes["bytes"] += len(data)
    progress(len(keys), len(keys))
    if not done:
        place.write(ZARR_JSON, plan.content)
    place.delete(MARKER)
    return Copied(0 if done else len(keys) - sizes["skipped"] + 1, sizes["bytes"], sizes["skipped"])


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """An empty folder in the cache of stores, deleted at the end: for copies of what is at a URL."""
    cache = cache_folder("stores", CACHE_VARIABLE)
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=cache) as place:
            yield Path(place)


@contextlib.contextmanager
def writing_to(target: str) -> Iterator[Path]:
    """Where a new store or a new file is made: at `target`, or for a URL on this disk; it is copied there at the end.

    Raises StoreError for an address that is taken or cannot be written to, before anything is made.
    """
    if not is_url(target):
        yield Path(target)
        return
    refuse_web_server(target)
    address, files = target.rstrip("/"), RemoteFiles(target)
    found = files.listing()  # with an empty key where the address is a file
    if found and MARKER not in found:
        raise StoreError(f"{target}: exists; choose another name or delete it")
    RemoteFiles(f"{address}-check-{secrets.token_hex(8)}").check_writable("")
    with scratch_folder(".convert-") as place:
        made = place / address.rpartition("/")[2]
        yield made
        if made.is_dir():
            replicate_store(str(made), target)
        else:
            with mapped(made) as data:
                files.write("", data)


@contextlib.contextmanager
def reading_from(source: str) -> Iterator[Path]:
    """A file on this disk: `source`, or for a URL a copy that is deleted afterwards. Raises StoreError."""
    if not is_url(source):
        yield Path(source)
        return
    with scratch_folder(".convert-") as place:
        copy = place / source.rpartition("/")[2]
        try:
            RemoteFiles(source).download("", copy)
        except FileNotFoundError:
            raise StoreError(f"{source}: no such file: check the address") from None
        yield copy


def chosen_arrays(manifest: Manifest, arrays: Collection[str] | None, source: str) -> frozenset[str]:
    """The names of the manifest's arrays that are copied."""
    known = [spec.name for spec in manifest.arrays]
    if arrays is None:
        return frozenset(known)
    chosen = {SIZES, CONTENT, *OWN_ARRAYS} & set(known)
    for wanted in arrays:
        found = {
            name for name in known if name in (wanted, wanted + TOKEN_SCALE) or name.startswith(f"{wanted}/")
        }
        if not found:
            raise StoreError(f"{source}: no array {wanted!r}; valid: {', '.join(known)}")
        chosen |= found
    prefixes = {teacher_of(name)[0] for name in chosen}
    return frozenset(chosen | {f"{prefix}{name}" for prefix in prefixes for name in OWN_ARRAYS} & set(known))


class Plan:
    """The files of a copy. `content` is its root's zarr.json, `own` other files that differ from the source's."""

    def __init__(
        self, files: Files, root: dict[str, Any], manifest: Manifest, chosen: frozenset[str]
    ) -> None:
        self.manifest = manifest.with_arrays(spec for spec in manifest.arrays if spec.name in chosen)
        nodes: dict[str, Any] = root["consolidated_metadata"]["metadata"]
        arrays = {
            name
            for name, node in nodes.items()
            if node["node_type"] == "array" and belongs(name, self.manifest)
        }
        self.nodes = {
            name: node
            for name, node in nodes.items()
            if name in arrays or any(array.startswith(f"{name}/") for array in arrays)
        }
        written = group_metadata(self.manifest.model_dump(mode="json"))
        written["consolidated_metadata"] = {**root["consolidated_metadata"], "metadata": self.nodes}
        self.content = to_json(written)
        #: File of checksums → array → (bytes, crc32c) of each shard; empty where a web server hides them.
        self.records: dict[str, dict[str, Any]] = {}
        self.own: dict[str, bytes] = {}
        for split in manifest.splits:
            for kind in (commits_file(split), commits_file(split, keys=True)):
                with contextlib.suppress(OSError):
                    record = json.loads(files.read(kind))
                    self.records[kind] = {
                        name: item
                        for name, item in record.items()
                        if belongs(f"{split}/{name}", self.manifest)
                    }
                    self.own[kind] = to_json(self.records[kind])  # the same bytes where all are kept

    def files(self) -> Iterator[str]:
        for name, node in self.nodes.items():
            yield f"{name}/{ZARR_JSON}"
            if node["node_type"] == "array":
                layout = Layout.from_metadata(node, name)
                yield from (f"{name}/{layout.shard_key(shard)}" for shard in range(layout.shards))
        yield from self.own

    def checksum(self, key: str) -> tuple[int, int] | None:
        """(bytes, crc32c) that the store recorded for a shard file; None for other files."""
        array, mark, place = key.partition("/c/")
        if not mark:
            return None
        shard = int(place.partition("/")[0])
        return recorded_checksum(lambda file: self.records.get(file, {}), array, shard)


def read_checked(files: Files, source: str, key: str, expected: tuple[int, int] | None) -> bytes:
    """A file's content. Raises StoreError when it is missing, or not what the store recorded."""
    try:
        data = b"".join(files.blocks(key))
    except OSError as error:
        raise StoreError(
            f"{source}/{key}: is missing ({error.strerror or error}): run cli verify on the source"
        ) from None
    got = len(data), crc32c(data)
    if expected is not None and got != expected:
        raise StoreError(
            f"{source}/{key}: is damaged: {got[0]} bytes with crc32c {got[1]:08x}, expected {expected[0]} bytes with "
            f"{expected[1]:08x}: run cli verify on the source"
        )
    return data


def begin(place: Files, target: str, content: bytes) -> bool:
    """Prepare the target; True when the copy is there already. Raises StoreError when something else is."""
    mark = json.dumps({"store": blake2b(content, digest_size=16).hexdigest()}).encode()
    try:
        there: bytes | None = place.read(ZARR_JSON)
    except OSError:
        there = None
    if there is not None:
        if there == content:
            return True
        raise StoreError(f"{target}: another store: choose another place, or delete it first")
    try:
        marked: bytes | None = place.read(MARKER)
    except OSError:
        marked = None
    # A copy that was killed before its marker had a name left the marker's temporary file.
    if marked is None and set(place.names("")) - {f"{PARTIAL_PREFIX}{MARKER}"}:
        raise StoreError(f"{target}: exists and is no store: a copy needs a place of its own")
    if marked is not None and marked != mark:
        raise StoreError(
            f"{target}: holds a part of a copy of another store: choose another place, or delete it first"
        )
    if marked is None:
        place.write(MARKER, mark)
    return False
