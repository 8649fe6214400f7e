"""The zarr.json files: groups, arrays, and the root with the manifest and everything consolidated."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from files.writing import replace_file
from store.errors import StoreError
from store.format import (
    COMMITS_FOLDER,
    COMPONENTS,
    FORMAT_VERSION,
    KEY_ARRAYS,
    WORK_FOLDER,
    Manifest,
    commits_file,
)

if TYPE_CHECKING:
    from store.shards import Layout

HOW_TO_MAKE = "make one with `cli extract DATA --out STORE`"

ZARR_JSON = "zarr.json"


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def write_group(folder: Path) -> None:
    """Make `folder` a Zarr group, if it is not one yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ZARR_JSON).exists():
        write_json(folder / ZARR_JSON, group_metadata({}))


def write_array_metadata(split: Path, name: str, layout: Layout, attributes: dict[str, Any]) -> None:
    """Write an array's zarr.json, and groups for the folders above it."""
    folder = split / name
    parents = list(Path(name).parents)[:-1]
    for parent in parents:
        write_group(split / parent)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ZARR_JSON, layout.metadata(attributes))


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Write the root's zarr.json: manifest and the metadata of every node, so that one read opens all."""
    nodes = {name: read_json(store / name / ZARR_JSON) for name in listed_nodes(store, manifest)}
    root = group_metadata(manifest.model_dump(mode="json"))
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    write_json(store / ZARR_JSON, root)


def node_names(store: Path) -> list[str]:
    """Every group and array below the root, parents first."""
    names = []
    for folder, children, files in os.walk(store):
        relative = Path(folder).relative_to(store).as_posix()
        if ZARR_JSON in files and relative != ".":
            names.append(relative)
            if read_json(Path(folder) / ZARR_JSON).get("node_type") == "array":
                children.clear()  # Shard files: many, and none of them a node.
        children[:] = sorted(child for child in children if child not in (WORK_FOLDER, COMMITS_FOLDER))
    return sorted(names)


def listed_nodes(store: Path, manifest: Manifest) -> list[str]:
    """The nodes on disk that the manifest knows, with the groups above them.

    While a store is being written, that is fewer than the manifest names; an array that was dropped from
    the manifest is left out at once, whatever is still on disk.
    """
    found = node_names(store)
    arrays = {name for name in found if belongs(name, manifest)}
    groups = {str(parent) for name in arrays for parent in PurePosixPath(name).parents} | set(manifest.splits)
    return [name for name in found if name in arrays or name in groups]


def belongs(node: str, manifest: Manifest) -> bool:
    """Whether a node is an array that the manifest names, or one that comes with it."""
    split, _, name = node.partition("/")
    if split not in manifest.splits:
        return False
    known = {spec.name for spec in manifest.arrays} | {
        spec.offsets_name for spec in manifest.arrays if spec.ragged
    }
    return name.removesuffix(COMPONENTS) in known or name in KEY_ARRAYS


def recorded_checksum(
    read: Callable[[str], Mapping[str, Any]], array: str, shard: int
) -> tuple[int, int] | None:
    """(bytes, crc32c) of a shard file of "<split>/<name>" as the store recorded them; None where it recorded none.

    read: the content of a file of checksums (`commits_file`).
    """
    split, _, name = array.partition("/")
    record = read(commits_file(split, keys=name in KEY_ARRAYS)).get(name, [])
    return (int(record[shard][0]), int(record[shard][1])) if shard < len(record) else None


def remove_strays(store: Path, manifest: Manifest) -> None:
    """Delete arrays and groups that are no part of a complete store: what a killed run had begun to drop."""
    listed = set(listed_nodes(store, manifest))
    for name in reversed(node_names(store)):
        if name not in listed:
            shutil.rmtree(store / name)


def read_root(store: Path) -> dict[str, Any]:
    """The root's zarr.json. Raises StoreError when there is no store."""
    if store.is_file():
        hint = (
            f"make one of it with `cli convert {store} STORE`"
            if store.suffix in (".h5", ".hdf5")
            else HOW_TO_MAKE
        )
        raise StoreError(f"{store}: is a file, not a store; {hint}")
    if not (store / ZARR_JSON).exists():
        what = "not a store (no zarr.json in it)" if store.is_dir() else "no such store"
        raise StoreError(f"{store}: {what}; {HOW_TO_MAKE}")
    root = read_json(store / ZARR_JSON)
    if not isinstance(root, dict):
        raise StoreError(f"{store}/{ZARR_JSON}: not a Zarr group")
    return root


def parse_manifest(root: dict[str, Any], where: str) -> Manifest:
    """The manifest in the root's attributes. Raises StoreError for another format or a damaged one."""
    attributes = root.get("attributes", {})
    found = attributes.get("format_version")
    if found is None:
        raise StoreError(f"{where}: a Zarr group, but not a store of this program (no format_version)")
    if found != FORMAT_VERSION:
        raise StoreError(
            f"{where}: format version {found}, this program reads version {FORMAT_VERSION}; "
            "install the matching version or extract again"
        )
    try:
        return Manifest.model_validate(attributes)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise StoreError(f"{where}: manifest is damaged: {problems}") from error


def is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path)


def to_json(value: Any) -> bytes:
    """The one JSON form of a value, so that equal values make equal files."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    replace_file(path, to_json(value))


def read_json(path: Path) -> Any:
    """Raises StoreError when the file is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}); the file is damaged") from error
