"""Where a row lies: chunks and shards of one array, its Zarr metadata, its shard index.

Uncompressed chunks lie one after the other in a shard file, so a row's place is a multiplication:

    data of all chunks (last one zero-padded) | index: (offset, length) uint64 a chunk | crc32c

Absent chunks have offset and length 2^64 - 1. zarr-python and tensorstore read this bit-exactly.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.errors import StoreError
from store.files import crc32c
from store.format import ArraySpec

ABSENT = 2**64 - 1
CRC_BYTES = 4
DIRECT_CHUNK_BYTES = 256 * 1024
DIRECT_SHARD_BYTES = 160 * 1024 * 1024
SMALL_CHUNK_BYTES = 32 * 1024
SMALL_SHARD_BYTES = 32 * 1024 * 1024
MIN_SHARD_ROWS, MAX_SHARD_ROWS = 1024, 65_536
MIN_SMALL_SHARD_ROWS = 4096  # keeps shards a multiple of the page size whatever the row's bytes
ZSTD_LEVEL = 3


def power_of_two_below(value: int) -> int:
    """The largest power of two that is at most `value`; 1 for anything smaller."""
    return 1 << (max(1, value).bit_length() - 1)


def choose_shard_rows(specs: list[ArraySpec]) -> int:
    """Rows a shard, one number for all direct arrays, so that a shard is a unit of work."""
    largest = max((spec.row_bytes for spec in specs if spec.direct), default=1)
    rows = power_of_two_below(DIRECT_SHARD_BYTES // max(1, largest))
    return min(MAX_SHARD_ROWS, max(MIN_SHARD_ROWS, rows))


@dataclass(frozen=True)
class Layout:
    """One array's geometry. `rows` is the length of the first axis (entries for ragged arrays)."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    shard_rows: int
    codec: str = "none"

    @classmethod
    def of(cls, spec: ArraySpec, rows: int, shard_rows: int) -> Layout:
        """The layout of a new array. `shard_rows` counts for direct arrays only."""
        row_bytes = max(1, spec.row_bytes)
        if spec.direct:
            chunk_rows = min(shard_rows, power_of_two_below(DIRECT_CHUNK_BYTES // row_bytes))
        else:
            chunk_rows = power_of_two_below(SMALL_CHUNK_BYTES // row_bytes)
            shard_rows = max(MIN_SMALL_SHARD_ROWS, power_of_two_below(SMALL_SHARD_BYTES // row_bytes))
        return cls(rows, spec.row_shape, np.dtype(spec.dtype), chunk_rows, shard_rows, spec.codec)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], name: str) -> Layout:
        """Read back what `metadata` made. Raises StoreError for an array that is not ours."""
        try:
            sharding = metadata["codecs"][0]
            inner = sharding["configuration"]
            codecs = [codec["name"] for codec in inner["codecs"]]
            grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            shape = metadata["shape"]
            layout = cls(
                rows=shape[0],
                row_shape=tuple(shape[1:]),
                dtype=np.dtype(metadata["data_type"]),
                chunk_rows=inner["chunk_shape"][0],
                shard_rows=grid[0],
                codec="zstd" if "zstd" in codecs else "none",
            )
        except (KeyError, IndexError, TypeError) as error:
            raise StoreError(f"{name}: array metadata is not of this format ({error!r})") from error
        return layout

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.row_shape)

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.row_shape, dtype=np.int64))

    @property
    def shard_bytes(self) -> int:
        """Bytes of a full shard's data, index excluded."""
        return self.shard_rows * self.row_bytes

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        return self.chunks_per_shard * 16 + CRC_BYTES

    def rows_in(self, shard: int) -> int:
        """Rows that shard number `shard` holds."""
        return min(self.rows, (shard + 1) * self.shard_rows) - shard * self.shard_rows

    def data_bytes(self, rows: int) -> int:
        """Bytes of the data region of a shard with `rows` rows: whole chunks."""
        return -(-rows // self.chunk_rows) * self.chunk_rows * self.row_bytes

    def shard_key(self, shard: int) -> str:
        """The shard's file, relative to the array's folder."""
        return "/".join(["c", str(shard), *["0"] * len(self.row_shape)])

    def metadata(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """The array's zarr.json (Zarr v3, sharding_indexed, little-endian bytes)."""
        little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        values = little if self.dtype.itemsize > 1 else {"name": "bytes"}
        zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.row_shape],
            "codecs": [values, zstd] if self.codec == "zstd" else [values],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        regular = {"chunk_shape": [self.shard_rows, *self.row_shape]}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": regular},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # Not 0: zarr drops chunks that are all fill value, and a hole should look like one.
            "fill_value": "NaN" if self.dtype.kind == "f" else (False if self.dtype.kind == "b" else 0),
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": attributes,
            "storage_transformers": [],
        }


def encode_index(lengths: list[int], chunks_per_shard: int) -> bytes:
    """The index of chunks that lie one after the other, with its crc32c."""
    index = np.full((chunks_per_shard, 2), ABSENT, dtype="<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if lengths else 0
    data = index.tobytes()
    return data + struct.pack("<I", crc32c(data))


def linear_index(layout: Layout, rows: int) -> bytes:
    """The index of an uncompressed shard with `rows` rows."""
    chunks = -(-rows // layout.chunk_rows)
    return encode_index([layout.chunk_rows * layout.row_bytes] * chunks, layout.chunks_per_shard)
