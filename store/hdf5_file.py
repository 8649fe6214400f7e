"""HDF5 files from elsewhere: only what the file itself holds is read, and only in sizes that are possible.

A data set of an HDF5 file can name other files as the place of its values (external raw storage, external links,
virtual data sets): the author of the file would choose which local file is read. A shape costs nothing to declare,
so shapes are compared with what is stored before anything is allocated.
"""

from __future__ import annotations

import math
import os
import stat
from typing import Any

from store.errors import StoreError

MAX_ROW_BYTES = MAX_CHUNK_BYTES = 1 << 30
MAX_SOFT_LINKS = 16


class Hdf5Error(StoreError):
    """A file or data set that is not read; the text names the data set and the reason, not the file."""


def open_hdf5_file(path: str | os.PathLike[str]) -> Any:
    """The open h5py.File. Raises Hdf5Error for anything but a readable HDF5 file."""
    import h5py

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Hdf5Error("not a readable HDF5 file: not a regular file")
        return h5py.File(path, "r")
    except OSError as error:
        raise Hdf5Error(f"not a readable HDF5 file: {' '.join(str(error).split())}") from None


def find_object(group: Any, name: str) -> Any | None:
    """The data set or group called `name` (parts joined with `/`) below `group`; None when there is none.

    Soft links are followed inside the file. Raises Hdf5Error for a link to another file, without following it.
    """
    import h5py

    parts, links = name.split("/"), 0
    found = group.file if name.startswith("/") else group
    while parts:
        part = parts.pop(0)
        if part in ("", "."):
            continue
        if not isinstance(found, h5py.Group):
            return None
        link = found.get(part, getlink=True)
        if link is None:
            return None
        if isinstance(link, h5py.SoftLink):
            links += 1
            if links > MAX_SOFT_LINKS:
                raise Hdf5Error(f"{name}: more than {MAX_SOFT_LINKS} soft links, one after the other")
            parts = link.path.split("/") + parts
            found = found.file if link.path.startswith("/") else found
        elif isinstance(link, h5py.HardLink):
            found = found[part]
        else:
            where = getattr(link, "filename", "another place")
            raise Hdf5Error(
                f"{name} is an external link to {where!r}: other files are not read; copy the data into this file"
            )
    return found


def find_dataset(group: Any, name: str) -> Any | None:
    """The data set called `name` below `group`, checked; None when there is none.

    Raises Hdf5Error when its values are not in this file, were never written, need a filter that is not available,
    or have rows or chunks that are too large.
    """
    import h5py

    dataset = find_object(group, name)
    if dataset is None:
        return None
    if not isinstance(dataset, h5py.Dataset):
        raise Hdf5Error(f"{name} is not a data set")
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()  # asked first: the shape of a virtual one opens its sources
    reason = None
    if layout == h5py.h5d.VIRTUAL:
        reason = "is a virtual data set, made of parts of other files"
    elif layout == h5py.h5d.CONTIGUOUS and dataset.external:
        reason = f"has its values in another file, {dataset.external[0][0]!r}"
    if reason:
        raise Hdf5Error(f"{dataset.name} {reason}: other files are not read; copy the data into this file")
    for place in range(properties.get_nfilters()):
        number, _, _, text = properties.get_filter(place)
        if not h5py.h5z.filter_avail(number):
            shown = text.decode("utf-8", "replace") or "without a name"
            raise Hdf5Error(
                f"{dataset.name} is compressed by filter {number} ({shown}), which is not available here: "
                "rewrite the file with `h5repack -f GZIP=4`"
            )
    _check_sizes(dataset, layout)
    return dataset


def _check_sizes(dataset: Any, layout: int) -> None:
    """Compare the shape with the limits and with what is stored."""
    import h5py

    if dataset.shape is None:
        raise Hdf5Error(f"{dataset.name} is empty (it has no shape)")
    itemsize = dataset.id.get_type().get_size()
    row_bytes = math.prod(dataset.shape[1:]) * itemsize
    if row_bytes > MAX_ROW_BYTES:
        raise Hdf5Error(
            f"{dataset.name} has rows of {row_bytes:,} bytes (shape {list(dataset.shape)}): "
            f"the limit is {MAX_ROW_BYTES:,}"
        )
    values = math.prod(dataset.shape)
    if layout == h5py.h5d.CHUNKED:
        chunk = math.prod(dataset.chunks)
        if chunk * itemsize > MAX_CHUNK_BYTES:
            raise Hdf5Error(
                f"{dataset.name} has chunks of {chunk * itemsize:,} bytes: the limit is {MAX_CHUNK_BYTES:,}"
            )
        stored = dataset.id.get_num_chunks() * chunk
    else:
        stored = dataset.id.get_storage_size() // itemsize
    if stored < values:
        raise Hdf5Error(
            f"{dataset.name} has shape {list(dataset.shape)}, {values:,} values, of which at most {stored:,} were "
            "ever written: write all of them, or make the data set smaller"
        )
