"""Copy a store's rows, block by block, into a new store: from an HDF5 file, or in a smaller encoding.

Smaller encodings are zstd (lossless), int8 and PCA. What they cost is measured on standardized features, (value -
mean) / std per channel: plain cosine is dominated by a few huge channels and hides damage in the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from store.create import check_free, create_store, new_folder
from store.errors import StoreError
from store.finalize import commit_record, finalize_store
from store.format import (
    COMMITS_FOLDER,
    COMPONENTS,
    OWN_ARRAYS,
    REASONS,
    TOKEN_SCALE,
    VALID,
    ArraySpec,
    Manifest,
)
from store.keys import KeyTable, Plan
from store.metadata import (
    ZARR_JSON,
    is_url,
    parse_manifest,
    read_json,
    read_root,
    write_array_metadata,
    write_json,
    write_manifest,
)
from store.reader import Split, Statistics, Store, open_store
from store.shards import BLOCK_BYTES, ArrayWriter, Layout, blocks
from store.statistics import statistics_json
from store.writer import StoreWriter, channel_scale, to_stored

BLOCK_ROWS = 1024
COVARIANCE_BYTES = 16 * 1024 * 1024

Columns = dict[str, Any]  # array → stored values [b, ...], or a list of b entries for a ragged array


class RowSource(Protocol):
    """Where rows come from: a store, or an HDF5 file of one."""

    manifest: Manifest

    @property
    def scales(self) -> Mapping[str, np.ndarray]: ...
    def keys(self, split: str) -> KeyTable: ...
    def block(self, split: str, start: int, stop: int) -> Columns: ...
    def slice(self, split: str, name: str, start: int, stop: int) -> np.ndarray: ...


def row_ranges(source: RowSource, split: str) -> Iterator[tuple[int, int]]:
    """Row ranges of about 32 MB, ragged entries included: copying takes bounded memory."""
    specs, rows = source.manifest.arrays, source.manifest.splits[split]
    fixed = sum(spec.row_bytes for spec in specs if not spec.ragged)
    start = 0
    while start < rows:
        stop = min(rows, start + BLOCK_ROWS)
        ends = np.arange(stop - start + 1) * fixed
        for spec in specs:
            if spec.ragged:
                offsets = source.slice(split, spec.offsets_name, start, stop + 1)
                ends += (offsets - offsets[0]) * spec.row_bytes
        fit = int(np.searchsorted(ends, BLOCK_BYTES, side="right")) - 1
        yield start, start + max(1, fit)
        start += max(1, fit)


def copy_store(
    source: RowSource,
    target: Path,
    specs: Sequence[ArraySpec],
    *,
    convert: Callable[[Columns], Columns] | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
    centers: Mapping[str, np.ndarray] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write all rows of `source` as a new store of `specs`; it appears under its name when it is whole.

    convert: what to do with each block of stored values on the way.
    finish: what else to write into the store before it appears.
    """
    check_free(target)
    manifest = source.manifest
    plan = Plan(
        {split: source.keys(split) for split in manifest.splits},
        batch_rows=manifest.batch_rows,
        shard_rows=manifest.shard_rows,
    )
    mine = [spec for spec in specs if spec.name not in OWN_ARRAYS]
    with new_folder(target) as building:
        create_store(building, manifest, plan, mine, scales=scales or source.scales, centers=centers)
        for split in manifest.splits:
            copy_split(source, building, split, convert)
        finalize_store(building)
        made = parse_manifest(read_root(building), str(building))
        names = {spec.name for spec in made.arrays}
        # The digest is the original's: the data are the same, whichever version of this program made it.
        update = {
            "added": tuple(name for name in manifest.added if name in names),
            "software": manifest.software,
            "digest": manifest.digest or made.digest,
        }
        write_manifest(building, made.model_copy(update=update))
        if finish is not None:
            finish(building)


def copy_split(
    source: RowSource, target: Path, split: str, convert: Callable[[Columns], Columns] | None
) -> None:
    with StoreWriter(target, split) as writer:
        for start, stop in row_ranges(source, split):
            block = source.block(split, start, stop)
            valid = np.asarray(block.pop(VALID))
            reasons = [bytes(np.asarray(text)).decode() for text in block.pop(REASONS)]
            if convert is not None:
                block = convert(block)
            lost = np.flatnonzero(valid & ~writer.append(block, valid=valid, reasons=reasons, stored=True))
            if len(lost):
                raise StoreError(
                    f"{target} {split}: row {start + lost[0]} has features that are not finite, or too large in "
                    "the new form; check the source with `cli verify`, or choose another form"
                )


# -- smaller encodings ---------------------------------------------------------------------------------------------

SAMPLE_ROWS = 512
INT8_MAX = 127


@dataclass(frozen=True)
class Cost:
    """What an encoding costs and saves for one array."""

    array: str
    cosine_mean: float | None  # None without any vector to measure it on
    cosine_p1: float | None  # 1st percentile
    bytes_before: int
    bytes_after: int

    @property
    def saved(self) -> float:
        """Fraction of the bytes."""
        return 1 - self.bytes_after / max(1, self.bytes_before)


def pack_store(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    zstd: bool = False,
    int8: bool = False,
    pca: int | None = None,
) -> list[Cost]:
    """Write a smaller copy of a complete store. Returns what that costs, for each feature array.

    zstd: compress every chunk; lossless, but reads go through zarr. int8: a scale a channel and a token.
    pca: keep this many principal components of every feature array; the projection is stored too.
    Raises StoreError for options that exclude each other, or a store that is packed already.
    """
    store = open_store(path)
    if int8 and pca is not None:
        raise StoreError("int8 and PCA exclude each other: choose one")
    if not (zstd or int8 or pca is not None):
        raise StoreError("nothing to do: choose zstd, int8 or a number of PCA components")
    store.require_plain("packing")
    coders = (
        {spec.name: make_coder(store, spec, int8, pca) for spec in features(store)} if int8 or pca else {}
    )
    specs = [
        new.model_copy(update={"codec": "zstd" if zstd else "none"}) if new.direct else new
        for spec in store.manifest.arrays
        for new in (coders[spec.name].specs(spec) if spec.name in coders else [spec])
    ]

    def convert(block: Columns) -> Columns:
        for name, coder in coders.items():
            block |= coder.encode(name, block[name])
        return block

    copy_store(
        StoreRows(store),
        Path(target),
        specs,
        convert=convert,
        scales={**StoreRows(store).scales, **{name: coder.scale for name, coder in coders.items()}},
        centers={name: coder.center for name, coder in coders.items()},
        finish=lambda folder: finish_packing(folder, store, coders),
    )
    return measure(store, open_store(target))


def features(store: Store) -> list[ArraySpec]:
    """The arrays that can be packed: fixed-width, scaled float16."""
    return [spec for spec in store.manifest.arrays if spec.scaled and spec.direct]


class StoreRows:
    """The RowSource over a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest: Manifest = store.manifest

    @cached_property
    def scales(self) -> Mapping[str, np.ndarray]:
        return self.store[self.store.splits[0]].scale

    def keys(self, split: str) -> KeyTable:
        return self.store[split].keys

    def slice(self, split: str, name: str, start: int, stop: int) -> np.ndarray:
        return self.store[split].array(name).slice(start, stop)

    def block(self, split: str, start: int, stop: int) -> Columns:
        source, rows = self.store[split], np.arange(start, stop)
        return {
            spec.name: source.ragged(rows, spec.name)
            if spec.ragged
            else source.gather(rows, [spec.name])[spec.name]
            for spec in self.manifest.arrays
        }


class Int8Coder:
    """true = int8 × token scale × channel scale + center; scale and center are the channel's std and mean."""

    def __init__(self, stored_scale: np.ndarray, statistics: Statistics) -> None:
        self.stored_scale = stored_scale
        self.components: np.ndarray | None = None
        self.scale = np.where(statistics.std > 0, statistics.std, np.float32(1))
        self.center = statistics.mean

    def specs(self, spec: ArraySpec) -> list[ArraySpec]:
        token = ArraySpec(name=spec.name + TOKEN_SCALE, row_shape=spec.row_shape[:-1], dtype="float32")
        return [spec.model_copy(update={"dtype": "int8", "encoding": "int8"}), token]

    def encode(self, name: str, stored: np.ndarray) -> Columns:
        standardized = (stored.astype(np.float32) * self.stored_scale - self.center) / self.scale
        standardized = np.nan_to_num(standardized, nan=0.0)  # rows that are invalid
        token = np.abs(standardized).max(axis=-1) / INT8_MAX
        token = np.where(token > 0, token, np.float32(1))
        # Clamp before the cast: rounding may reach 128, which would wrap to -128.
        values = np.clip(np.rint(standardized / token[..., None]), -INT8_MAX, INT8_MAX)
        return {name: values.astype(np.int8), name + TOKEN_SCALE: token.astype(np.float32)}


class PcaCoder:
    """true = coefficients × scale @ components + center, with the components [k, D] in the store."""

    def __init__(self, split: Split, name: str, count: int) -> None:
        statistics, self.stored_scale = split.statistics[name], split.scale[name]
        self.std = np.where(statistics.std > 0, statistics.std, np.float32(1))
        self.center = statistics.mean
        self.basis = principal_components(split, name, self.std, count)  # [k, D], orthonormal
        self.components: np.ndarray | None = (self.basis * self.std).astype(np.float32)
        sample = np.linspace(0, len(split) - 1, min(len(split), SAMPLE_ROWS)).astype(np.int64)
        self.scale = channel_scale(self.project(split.gather(sample, [name])[name]))

    def project(self, stored: np.ndarray) -> np.ndarray:
        standardized = (stored.astype(np.float32) * self.stored_scale - self.center) / self.std
        projected: np.ndarray = standardized @ self.basis.T
        return projected

    def specs(self, spec: ArraySpec) -> list[ArraySpec]:
        shape = (*spec.row_shape[:-1], len(self.basis))
        return [spec.model_copy(update={"row_shape": shape, "encoding": "pca"})]

    def encode(self, name: str, stored: np.ndarray) -> Columns:
        return {name: to_stored(self.project(stored), self.scale, np.dtype(np.float16))}


Coder = (
    Int8Coder | PcaCoder
)  # turns stored float16 values [..., D] into another encoding of the same features


def make_coder(store: Store, spec: ArraySpec, int8: bool, pca: int | None) -> Coder:
    """Fitted on the largest split; its projection serves the others too."""
    split = max(store.values(), key=len)
    if not split.statistics.get(spec.name):
        raise StoreError(f"{split.where}: {spec.name} has no statistics; packing needs them")
    if int8 or pca is None:
        return Int8Coder(split.scale[spec.name], split.statistics[spec.name])
    width = spec.row_shape[-1]
    if not 1 <= pca <= width:
        raise StoreError(f"{store.location}: {pca} PCA components of {spec.name}, which is {width} wide")
    return PcaCoder(split, spec.name, pca)


def principal_components(split: Split, name: str, std: np.ndarray, count: int) -> np.ndarray:
    """The `count` first principal axes [k, D] float32 of standardized features, out of core with dask.

    The covariance is summed block by block; invalid rows (NaN) count as the mean.
    """
    import dask
    import dask.array as da

    array, width = split.array(name), len(std)
    scale, mean = split.scale[name], split.statistics[name].mean

    def block(start: int, stop: int) -> np.ndarray:
        vectors = array.slice(start, stop).reshape(-1, width).astype(np.float32)
        vectors = np.nan_to_num((vectors * scale - mean) / std, nan=0.0)
        product: np.ndarray = (vectors.T @ vectors).astype(np.float64)
        return product[None]

    ranges = blocks(0, len(array), array.layout.row_bytes, COVARIANCE_BYTES)
    parts = [da.from_delayed(dask.delayed(block)(*rows), (1, width, width), np.float64) for rows in ranges]
    with dask.config.set(scheduler="threads"):
        covariance = da.concatenate(parts).sum(axis=0, split_every=4).compute()
    _, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :count].T
    # An eigenvector's sign is arbitrary: make the largest entry positive, so that equal data give equal files.
    signs = np.sign(axes[np.arange(count), np.abs(axes).argmax(axis=1)])
    return np.ascontiguousarray(axes * signs[:, None], dtype=np.float32)


def finish_packing(folder: Path, original: Store, coders: Mapping[str, Coder]) -> None:
    """Statistics of the true features, and the projections, into the new store."""
    for name, split in original.items():
        for array, coder in coders.items():
            path, known = folder / name / array / ZARR_JSON, split.statistics[array]
            metadata = read_json(path)
            metadata["attributes"]["statistics"] = statistics_json(known.mean, known.std, known.count)
            write_json(path, metadata)
            if coder.components is not None:
                write_components(folder, name, array + COMPONENTS, coder.components)
    write_manifest(folder, parse_manifest(read_root(folder), str(folder)))


def write_components(folder: Path, split: str, name: str, components: np.ndarray) -> None:
    """A projection [k, D] float32 as an array of its own, checksum recorded."""
    spec = ArraySpec(name="projection", row_shape=components.shape[1:], dtype="float32")
    layout = Layout.of(spec, len(components), 0)
    writer = ArrayWriter(folder / split / name, layout)
    writer.append(components.tobytes())
    record = commit_record(folder, split) | {name: writer.close()}
    write_array_metadata(folder / split, name, layout, {})
    write_json(folder / COMMITS_FOLDER / f"{split}.json", dict(sorted(record.items())))


def measure(original: Store, packed: Store) -> list[Cost]:
    """Cosine of standardized features before and after, on up to 512 rows of the largest split."""
    split = max(original.values(), key=len)
    twin = packed[split.name]
    costs = []
    for spec in features(original):
        name, statistics = spec.name, split.statistics[spec.name]
        good = np.flatnonzero(split.valid_for(name))
        places = np.linspace(0, len(good) - 1, min(len(good), SAMPLE_ROWS)).astype(np.int64)
        rows = good[places] if len(good) else good
        std = np.where(statistics.std > 0, statistics.std, np.float32(1))
        width = spec.row_shape[-1]
        before = ((split.true_values(rows, name) - statistics.mean) / std).reshape(-1, width)
        after = ((twin.true_values(rows, name) - statistics.mean) / std).reshape(-1, width)
        cosine = cosines(before, after)
        sizes = [array_bytes(store, name) for store in (original, packed)]
        mean, p1 = (float(cosine.mean()), float(np.percentile(cosine, 1))) if len(cosine) else (None, None)
        costs.append(Cost(name, mean, p1, *sizes))
    return costs


def cosines(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[n] of the vectors that have a direction before; 0 for one that lost it."""
    norms, norms_after = (np.linalg.norm(vectors, axis=1) for vectors in (before, after))
    has = norms > 0
    product = (before * after).sum(axis=1)[has]
    cosine: np.ndarray = product / np.maximum(norms * norms_after, np.finfo(np.float32).tiny)[has]
    return cosine


def array_bytes(store: Store, name: str) -> int:
    """Bytes of the files of an array and of what belongs to it, over all splits."""
    return sum(
        files_bytes(f"{store.location}/{split}/{name}{suffix}")
        for split in store.splits
        for suffix in ("", TOKEN_SCALE, COMPONENTS)
        if name + suffix in store[split].names
    )


def files_bytes(location: str) -> int:
    if is_url(location):
        import fsspec

        files, path = fsspec.core.url_to_fs(location)
        return int(files.du(path))
    return sum(path.stat().st_size for path in Path(location).rglob("*") if path.is_file())
