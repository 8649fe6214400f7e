"""HDF5: `images` and `labels` in one file, at the top or in groups called train, val, test.

`images` is uint8 [N, H, W, 3], [N, 3, H, W], [N, H, W, 1] or [N, H, W], or variable-length encoded files. `labels`
int [N] or names; `keys` texts [N] are optional, else a sample's key is its row number in nine digits. Class names
come from `class_names`, the attribute `class_names` of the file or the labels, else from the labels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from extract.sources.annotations import Labels
from extract.sources.base import Sample, Samples, Source, SourceError, kinds_of_labels
from extract.sources.listing import Progress, make_key
from extract.sources.splitting import SPLIT_NAMES
from imaging.errors import ImageError


@dataclass(frozen=True, slots=True)
class Hdf5Image:
    """One row of an `images` data set; pixel arrays come out as PNG, so that the digest is that of a file."""

    file: str
    dataset: str
    row: int

    def read(self) -> bytes:
        try:
            value = _open(self.file, os.getpid(), os.stat(self.file).st_mtime_ns)[self.dataset][self.row]
        except (OSError, KeyError, ValueError) as error:
            raise ImageError(f"row {self.row} of {self.dataset} cannot be read: {error}") from None
        if isinstance(value, bytes):
            return value
        if value.ndim == 1:
            return np.asarray(value, np.uint8).tobytes()
        if value.ndim == 3 and is_channels_first(value.shape):
            value = value.transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(value[..., 0] if value.shape[-1] == 1 and value.ndim == 3 else value).save(
            buffer, "PNG", compress_level=1
        )
        return buffer.getvalue()


class Hdf5Samples(Samples):
    """Rows of one `images` data set."""

    def __init__(
        self, file: str, dataset: str, keys: list[str], labels: npt.NDArray[np.int32] | None
    ) -> None:
        self.file, self.dataset, self.labels = file, dataset, labels
        self._keys = keys

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return kinds_of_labels(self.labels, rows)

    def build(self, index: int) -> Sample:
        label = None if self.labels is None or self.labels[index] < 0 else int(self.labels[index])
        return Sample(self._keys[index], Hdf5Image(self.file, self.dataset, index), label=label)


def open_hdf5(
    path: Path,
    *,
    images: str = "images",
    labels: str = "labels",
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open an HDF5 file. `images`, `labels`: names of the data sets. Raises SourceError."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            groups = {"": file} if images in file else {n: file[n] for n in file if n.lower() in SPLIT_NAMES}
            groups = {name: group for name, group in groups.items() if images in group}
            if not groups:
                raise SourceError(
                    f"{path}: no data set {images!r}, neither at the top nor in train, val, test"
                )
            given = class_names if class_names is not None else stored_names(file, groups, labels)
            return read_groups(path, groups, images, labels, Labels(given), progress)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read as HDF5: {error}") from None


def read_groups(
    path: Path, groups: dict[str, Any], images: str, labels: str, names: Labels, progress: Progress | None
) -> Source:
    columns, keys = {}, {}
    for name, group in groups.items():
        where = f"{path}:/{name}"
        count = check_images(group[images], where)
        keys[name] = read_keys(group, name, count, where)
        if labels in group:
            columns[name] = read_labels(group[labels], count, names, where)
        if progress is not None:
            progress(sum(len(part) for part in keys.values()))
    classes = names.finish(str(path))
    parts: dict[str, Samples] = {}
    for name in groups:
        values = columns.get(name)
        numbers = None if values is None else np.array([names.number(value) for value in values], np.int32)
        split = SPLIT_NAMES.get(name.lower(), "train")
        parts[split] = Hdf5Samples(str(path), f"{name}/{images}".lstrip("/"), keys[name], numbers)
    task = "classification" if classes else "features"
    return Source(kind="hdf5", root=str(path), task=task, class_names=classes, parts=parts)


def check_images(dataset: Any, where: str) -> int:
    """The number of images. Raises SourceError for an array that holds no images."""
    shape, dtype = dataset.shape, dataset.dtype
    encoded = len(shape) == 1 and dtype.kind in "OSV"
    grey = len(shape) == 3
    colour = len(shape) == 4 and (shape[-1] in (1, 3, 4) or is_channels_first(shape[1:]))
    if not encoded and not ((grey or colour) and dtype == np.uint8):
        raise SourceError(
            f"{where}: {dataset.name} is {dtype} {list(shape)}: expected uint8 [N, H, W, 3], [N, 3, H, W], "
            "[N, H, W], or encoded files (variable-length uint8 [N])"
        )
    return int(shape[0])


def is_channels_first(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3) and shape[-1] not in (1, 3, 4)


def read_keys(group: Any, prefix: str, count: int, where: str) -> list[str]:
    start = f"{prefix}/" if prefix else ""
    if "keys" not in group:
        return [f"{start}{row:09d}" for row in range(count)]
    keys = [make_key(start + as_text(value)) for value in group["keys"][()]]
    if len(keys) != count:
        raise SourceError(f"{where}: {len(keys)} keys, but {count} images")
    return keys


def read_labels(dataset: Any, count: int, names: Labels, where: str) -> list[str | int | None]:
    if dataset.shape != (count,):
        raise SourceError(
            f"{where}: labels have shape {list(dataset.shape)}, expected [{count}], one per image"
        )
    values = [as_text(value) if isinstance(value, bytes | str) else value for value in dataset[()].tolist()]
    # -1 is HDF5's usual way to leave a label out, there being no empty number.
    return [
        names.add(None if value == -1 else value, f"{where}: label {row}") for row, value in enumerate(values)
    ]


def stored_names(file: Any, groups: dict[str, Any], labels: str) -> list[str] | None:
    """The attribute `class_names` of the file, of a group, or of its labels."""
    holders = [file, *groups.values(), *(group[labels] for group in groups.values() if labels in group)]
    found = next((holder.attrs["class_names"] for holder in holders if "class_names" in holder.attrs), None)
    return None if found is None else [as_text(name) for name in found]


def as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


@lru_cache(maxsize=4)
def _open(file: str, process: int, changed_ns: int) -> Any:
    """An open file for this process, as it is now: handles do not survive a fork, and processes of a cluster live on."""
    import h5py

    return h5py.File(file, "r")
