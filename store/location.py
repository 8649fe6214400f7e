"""Where a store lies: a local folder, or any URL that fsspec knows (`s3://`, `gs://`, `memory://`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from store.errors import StoreError
from store.layout import Layout
from store.mapped import MappedArray
from store.metadata import read_root
from store.zarr_array import ZarrArray

RowArray = MappedArray | ZarrArray


def is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path)


def read_root_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The root's zarr.json, from a folder or a URL. Raises StoreError when there is no store."""
    if not is_url(path):
        return read_root(Path(path))
    if "***" in str(path):
        raise StoreError(
            f"{path}: the password was left out when this address was recorded: give the address again"
        )
    try:
        import fsspec
    except ImportError as error:
        raise StoreError(f"{path}: remote stores need fsspec: pip install fsspec s3fs") from error
    try:
        content = fsspec.open(f"{str(path).rstrip('/')}/zarr.json", "rb")
        with content as file:
            root = json.loads(file.read())
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such store (no zarr.json at this address)") from error
    except ImportError as error:
        raise StoreError(f"{path}: this kind of address needs another package: {error}") from error
    except (
        Exception
    ) as error:  # no network, no credentials, no such protocol: each package has its own errors
        raise StoreError(
            f"{path}: cannot be read: {error}; check address, network and credentials"
        ) from error
    if not isinstance(root, dict):
        raise StoreError(f"{path}/zarr.json: not a Zarr group")
    return root


def open_array(path: str, split: str, name: str, metadata: dict[str, Any]) -> RowArray:
    """The fastest way to an array: memory maps for a local, uncompressed one, else zarr."""
    layout = Layout.from_metadata(metadata, f"{path}/{split}/{name}")
    if is_url(path) or layout.codec != "none":
        return ZarrArray(f"{path}/{split}/{name}", layout)
    return MappedArray(Path(path) / split / name, layout)
