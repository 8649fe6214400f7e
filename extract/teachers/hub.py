"""A checkpoint's folder: a local one, or only the needed files of one on the Hugging Face hub."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from extract.teachers.checkpoint import INDEX_FILE, SINGLE_FILE, one_line, read_json
from extract.teachers.errors import CheckpointError

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
    fetch("preprocessor_config.json", required=False)
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
    """The hub's client, told at once when there is no network: it would retry for a minute, and find the same.

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
