"""Reading only what is needed of a Hugging Face checkpoint folder: a few JSON files and the tower's tensors.

A safetensors file starts with the length of its header (uint64, little-endian) and a JSON header that gives
each tensor's dtype, shape and byte range (https://github.com/huggingface/safetensors). We read the header to know
what is inside and whether the file is whole; the tensors themselves are memory-mapped, never copied on the host.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from extract.teachers.base import CheckpointError
from files.reading import open_regular, read_regular

if TYPE_CHECKING:
    import torch


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DOWNLOAD_AGAIN = "download it again"
HASH_BLOCK_BYTES = 2 << 20
HASH_THREADS = 8
MAX_HEADER_BYTES = 100 << 20


class TensorEntry(NamedTuple):
    """Where one tensor is stored: file, its name there, dtype and shape from the header, byte range in the file."""

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        CheckpointError: when it is missing, unreadable, or no JSON object.
    """
    try:
        content = json.loads(read_regular(file))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: is {file.parent} a checkpoint folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({one_line(error)}): {DOWNLOAD_AGAIN}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, got {type(content).__name__}: {DOWNLOAD_AGAIN}"
        )
    return content


def find_tensors(
    folder: Path, prefixes: tuple[str, ...], wanted: Iterable[str], title: str
) -> dict[str, TensorEntry]:
    """Where the tensors `wanted` (names without prefix) are stored; opens only the files that hold one of them.

    title: of the family whose checkpoint is expected, for messages.

    Raises:
        CheckpointError: when a tensor is listed nowhere, a file is missing, truncated, or lacks what the index lists.
    """
    wanted = list(wanted)
    files = files_of_tensors(folder, prefixes, title)
    absent = [name for name in wanted if name not in files]
    if absent:
        place = folder / (INDEX_FILE if (folder / INDEX_FILE).is_file() else SINGLE_FILE)
        raise CheckpointError(
            f"{place} lists no {prefixes[0]}{absent[0]} ({len(absent)} of {len(wanted)} vision tensors are absent): "
            f"expected a {title} checkpoint; {DOWNLOAD_AGAIN} or give another --teacher-path"
        )
    headers = {file: read_header(file) for file in {files[name][0] for name in wanted}}
    return {name: entry_of(*files[name], headers[files[name][0]]) for name in wanted}


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor → name of its file, from an index file. Raises CheckpointError when it has no map."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map: {DOWNLOAD_AGAIN}")
    return weight_map


def files_of_tensors(folder: Path, prefixes: tuple[str, ...], title: str) -> dict[str, tuple[Path, str]]:
    """`{name without prefix: (file, stored name)}` of all tensors with one of the prefixes."""
    index = folder / INDEX_FILE
    if index.is_file():
        stored: dict[str, Path] = {name: folder / file for name, file in read_weight_map(index).items()}
    elif (folder / SINGLE_FILE).is_file():
        stored = dict.fromkeys(read_header(folder / SINGLE_FILE), folder / SINGLE_FILE)
    else:
        raise CheckpointError(no_weights(folder, title))
    found = {}
    for name, file in stored.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = (file, name)
    return found


def no_weights(folder: Path, title: str) -> str:
    """Why a folder without index and without a single weights file cannot be used."""
    text = f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}"
    if any(folder.glob("*.safetensors")):
        return f"{text}, only shards: the index file is needed to find the vision tensors in them; download it too"
    if any(folder.glob("*.bin")):
        return f"{text}, only .bin files: save the checkpoint as safetensors (save_pretrained does) and try again"
    return f"{text}: give the folder of a {title} checkpoint"


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, without its metadata; its byte ranges become absolute.

    Raises:
        CheckpointError: when the file is missing, is no safetensors file, or is shorter than its header promises.
    """
    try:
        size = file.stat().st_size
        with open_regular(file) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("header length out of range")
            text = stream.read(length)
            if len(text) < length:
                raise CheckpointError(truncated(file, size, 8 + length))
            header: dict[str, dict[str, Any]] = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(
            f"shard {file.name} is missing in {file.parent}: the vision tower needs it; download it"
        ) from None
    except (OSError, struct.error, ValueError) as error:
        reason = one_line(error)
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({reason}): {DOWNLOAD_AGAIN}"
        ) from None
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    promised = max((entry["data_offsets"][1] for entry in header.values()), default=8 + length)
    if size < promised:
        raise CheckpointError(truncated(file, size, promised))
    return header


def truncated(file: Path, got: int, expected: int) -> str:
    return f"{file} is truncated: got {got:,} bytes, its header promises {expected:,}: {DOWNLOAD_AGAIN}"


def entry_of(file: Path, stored_name: str, header: Mapping[str, dict[str, Any]]) -> TensorEntry:
    if stored_name not in header:
        raise CheckpointError(f"{file} lacks {stored_name}, which the index places there: {DOWNLOAD_AGAIN}")
    entry = header[stored_name]
    return TensorEntry(file, stored_name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])


def load_tensors(
    entries: Mapping[str, TensorEntry], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors on `device` in `dtype`. On a CPU with the stored dtype they stay mapped from the file."""
    from safetensors import SafetensorError, safe_open

    loaded: dict[str, torch.Tensor] = {}
    for file in sorted({entry.file for entry in entries.values()}):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for name, entry in entries.items():
                    if entry.file == file:
                        loaded[name] = shard.get_tensor(entry.stored_name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({one_line(error)}): {DOWNLOAD_AGAIN}") from None
    return loaded


def fingerprint_of(entries: Mapping[str, TensorEntry], architecture: Mapping[str, object]) -> str:
    """blake2b-128 (hex) of the architecture and of every byte of the tensors, in the order of their names.

    It does not depend on how the tensors are spread over files, on the prefix of their names, on tensors we do not
    use, on the device or on the dtype of the computation: the same weights have one fingerprint everywhere.
    The tensors are hashed beside each other through small buffers (0.5 GB/s a core measured; the published towers
    are 1.3 GB, which loading has to read anyway), so that hashing adds next to nothing to the peak memory.
    """
    names = sorted(entries)
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing and reading release the interpreter's lock
        digests = list(pool.map(digest_of_tensor, (entries[name] for name in names)))
    total = hashlib.blake2b(json.dumps(dict(architecture), sort_keys=True).encode(), digest_size=16)
    for name, digest in zip(names, digests, strict=True):
        total.update(f"\n{name} {entries[name].dtype} {entries[name].shape} {digest}".encode())
    return total.hexdigest()


def digest_of_tensor(entry: TensorEntry) -> str:
    """blake2b-128 (hex) of a tensor's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    buffer = memoryview(bytearray(min(HASH_BLOCK_BYTES, max(1, entry.end - entry.start))))
    with open_regular(entry.file) as stream:
        stream.seek(entry.start)
        left = entry.end - entry.start
        while left > 0:
            got = stream.readinto(buffer[: min(left, len(buffer))])
            if not got:
                raise CheckpointError(truncated(entry.file, entry.file.stat().st_size, entry.end))
            digest.update(buffer[:got])
            left -= got
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a local checkpoint's index lists and that are not there; none without an index."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    return sorted(name for name in set(read_weight_map(index).values()) if not (folder / name).is_file())


# -- the folder: a local one, or only the needed files of one on the Hugging Face hub --------------------


CONNECT_TIMEOUT_S = 5.0


def checkpoint_folder(path: str, prefixes: tuple[str, ...]) -> Path:
    """The folder at `path`, or a local copy of what the tower needs of the hub's `owner/name`.

    prefixes: of the tensors that are needed.

    Raises:
        CheckpointError: no such folder and no hub name; or the hub is out of reach.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"--teacher-path {path} is a file: expected the folder of a checkpoint")
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith("/"):
        raise CheckpointError(f"--teacher-path {path}: no such folder, and no hub name (owner/name) either")
    try:
        with hub_client():
            return download_tower(path, prefixes)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors
        raise CheckpointError(unreachable(path, error)) from None


def download_tower(name: str, prefixes: tuple[str, ...]) -> Path:
    """Fetch config, index and the shards that hold needed tensors into the hub's cache; returns the folder there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(file: str, *, required: bool = True) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:
            # Offline the client cannot tell "not in the cache" from "not on the hub".
            if required:
                raise
        except EntryNotFoundError:
            if required:
                raise
        return None

    config = fetch("config.json")
    assert config is not None  # a required file is there or an error was raised
    if fetch("preprocessor_config.json", required=False) is None:
        fetch("processor_config.json", required=False)
    index = fetch(INDEX_FILE, required=False)
    shards = {SINGLE_FILE}
    if index is not None:
        weight_map: dict[str, str] = read_json(index).get("weight_map", {})
        shards = {file for tensor, file in weight_map.items() if tensor.startswith(prefixes)}
    for shard in sorted(shards):
        fetch(shard)
    return config.parent


@contextmanager
def hub_client() -> Iterator[None]:
    """The hub's client, set offline at once when there is no network: it would retry for a minute in vain.

    Files that are already in its cache are used either way.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(endpoint())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def reachable(url: str) -> bool:
    """Whether a connection to the server opens; True behind a proxy, where it cannot be known."""
    parts = urlsplit(url)
    if getproxies():
        return True
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def endpoint() -> str:
    """The hub that is asked."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def unreachable(name: str, error: Exception) -> str:
    return (
        f"--teacher-path {name}: no such folder, and {endpoint()} gave no such checkpoint "
        f"({type(error).__name__}: {one_line(error)[:120]}); set HF_ENDPOINT to a mirror, or run "
        f"`hf download {name} --local-dir DIR` where there is a network and give --teacher-path DIR"
    )
