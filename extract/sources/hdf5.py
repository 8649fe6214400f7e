"""HDF5: `images` and `labels` in one file, at the top or in groups called train, val, test.

`images` is uint8 [N, H, W, 3], [N, 3, H, W], [N, H, W, 1] or [N, H, W], or variable-length encoded files. `labels`
int [N] or names; `keys` texts [N] are optional, else a sample's key is its row number in nine digits. Class names
come from `class_names`, the attribute `class_names` of the file or the labels, else from the labels.
"""

from __future__ import annotations

import io
import math
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
from extract.sources.base import Sample, Samples, Source, SourceError, kinds_of_labels, label_of
from extract.sources.listing import Progress, make_key
from extract.sources.splitting import SPLIT_NAMES
from imaging.decode import MOST_PIXELS, ImageError
from store.hdf5_file import Hdf5Error, find_dataset, find_object, open_hdf5_file


@dataclass(frozen=True, slots=True)
class Hdf5Image:
    """One row of an `images` data set; pixel arrays come out as PNG, so that the digest is that of a file."""

    file: str
    dataset: str
    row: int

    def read(self) -> bytes:
        try:
            changed_ns = os.stat(self.file).st_mtime_ns
            value = _open(self.file, self.dataset, os.getpid(), changed_ns)[self.row]
        except (OSError, KeyError, ValueError, MemoryError, Hdf5Error) as error:
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
        super().__init__(keys)
        self.file, self.dataset, self.labels = file, dataset, labels

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return kinds_of_labels(self.labels, rows)

    def build(self, index: int) -> Sample:
        image = Hdf5Image(self.file, self.dataset, index)
        return Sample(self._keys[index], image, label=label_of(self.labels, index))


def open_hdf5(
    path: Path,
    *,
    images: str = "images",
    labels: str = "labels",
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open an HDF5 file. `images`, `labels`: names of the data sets. Raises SourceError."""
    try:
        with open_hdf5_file(path) as file:
            groups = split_groups(file, images)
            if not groups:
                raise SourceError(
                    f"{path}: no data set {images!r}, neither at the top nor in train, val, test"
                )
            given = class_names if class_names is not None else stored_names(file, groups, labels)
            return read_groups(path, groups, images, labels, Labels(given), progress)
    except Hdf5Error as error:
        raise SourceError(f"{path}: {error}") from None
    except (OSError, MemoryError) as error:
        raise SourceError(f"{path}: cannot be read as HDF5: {' '.join(str(error).split())}") from None


def split_groups(file: Any, images: str) -> dict[str, Any]:
    """Split name → group that holds `images`; the file itself, under an empty name, when they are at the top."""
    if find_object(file, images) is not None:
        return {"": file}
    groups = {name: find_object(file, name) for name in file if name.lower() in SPLIT_NAMES}
    return {name: group for name, group in groups.items() if find_object(group, images) is not None}


def read_groups(
    path: Path, groups: dict[str, Any], images: str, labels: str, names: Labels, progress: Progress | None
) -> Source:
    columns, keys = {}, {}
    for name, group in groups.items():
        where = f"{path}:/{name}"
        count = check_images(find_dataset(group, images), where)
        keys[name] = read_keys(group, name, count, where)
        if (values := find_dataset(group, labels)) is not None:
            columns[name] = read_labels(values, count, names, where)
        if progress is not None:
            progress(sum(len(part) for part in keys.values()))
    classes = names.finish(str(path))
    parts: dict[str, Samples] = {}
    for name in groups:
        column = columns.get(name)
        numbers = None if column is None else np.array([names.number(value) for value in column], np.int32)
        split = SPLIT_NAMES.get(name.lower(), "train")
        parts[split] = Hdf5Samples(str(path), f"{name}/{images}".lstrip("/"), keys[name], numbers)
    task = "classification" if classes else "features"
    return Source(kind="hdf5", root=str(path), task=task, class_names=classes, splits=parts)


def check_images(dataset: Any, where: str) -> int:
    """The number of images. Raises SourceError for an array that holds no images."""
    shape, dtype = dataset.shape, dataset.dtype
    encoded = len(shape) == 1 and dtype.kind in "OSV"
    gray = len(shape) == 3
    color = len(shape) == 4 and (shape[-1] in (1, 3, 4) or is_channels_first(shape[1:]))
    if not encoded and not ((gray or color) and dtype == np.uint8):
        raise SourceError(
            f"{where}: {dataset.name} is {dtype} {list(shape)}: expected uint8 [N, H, W, 3], [N, 3, H, W], "
            "[N, H, W], or encoded files (variable-length uint8 [N])"
        )
    pixels = math.prod(shape[1:]) // (1 if gray or encoded else min(shape[1], shape[-1]))
    if pixels > MOST_PIXELS:
        raise SourceError(
            f"{where}: {dataset.name} has images of {pixels:,} pixels (shape {list(shape)}): "
            f"the limit is {MOST_PIXELS:,}"
        )
    return int(shape[0])


def is_channels_first(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3) and shape[-1] not in (1, 3, 4)


def read_keys(group: Any, prefix: str, count: int, where: str) -> list[str]:
    start = f"{prefix}/" if prefix else ""
    dataset = find_dataset(group, "keys")
    if dataset is None:
        return [f"{start}{row:09d}" for row in range(count)]
    if dataset.shape != (count,):
        raise SourceError(f"{where}: {math.prod(dataset.shape)} keys, but {count} images")
    return [make_key(start + as_text(value)) for value in dataset[()]]


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
    columns = (find_dataset(group, labels) for group in groups.values())
    holders = [file, *groups.values(), *(column for column in columns if column is not None)]
    found = next((holder.attrs["class_names"] for holder in holders if "class_names" in holder.attrs), None)
    return None if found is None else [as_text(name) for name in found]


def as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


@lru_cache(maxsize=4)
def _open(file: str, dataset: str, process: int, changed_ns: int) -> Any:
    """A data set opened by this process, as it is now: handles do not survive a fork, and processes of a cluster live on.

    Raises Hdf5Error.
    """
    found = find_dataset(open_hdf5_file(file), dataset)
    if found is None:
        raise Hdf5Error(f"{dataset} is no longer there")
    return found
