"""The slow, general way to an array: zarr's own, for compressed and remote stores.

zarr takes a shard that is missing for one full of fill values, so each is looked for before its first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from store.errors import StoreError
from store.layout import Layout


class ZarrArray:
    """The same interface as MappedArray, over a folder or any URL that fsspec knows. Opened anew after a fork."""

    def __init__(self, location: str, layout: Layout) -> None:
        self.location, self.layout = location, layout
        self._opened: tuple[int, Any] | None = None
        self._found: set[int] = set()  # shards that are there

    def __len__(self) -> int:
        return self.layout.rows

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out[i] = array[rows[i]]; every chunk is fetched once."""
        if not len(rows):
            return
        once, place = np.unique(rows, return_inverse=True)
        values = self._read(np.unique(once // self.layout.shard_rows), lambda: self.zarr.oindex[once])
        np.take(values, place, axis=0, out=out, mode="clip")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """array[start:stop] in memory."""
        stop = min(stop, len(self))
        if start >= stop:
            return np.empty((0, *self.layout.row_shape), self.layout.dtype)
        shards = np.arange(start // self.layout.shard_rows, (stop - 1) // self.layout.shard_rows + 1)
        return np.asarray(self._read(shards, lambda: self.zarr[start:stop]))

    def prefetch(self, rows: np.ndarray) -> None:
        """Nothing to do: there is no page cache between us and a remote store."""

    @property
    def zarr(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            import zarr

            try:
                self._opened = os.getpid(), zarr.open_array(self.location, mode="r")
            except (FileNotFoundError, ValueError) as error:
                raise StoreError(f"{self.location}: cannot open the array: {error}") from error
        return self._opened[1]

    def _read(self, shards: np.ndarray, read: Callable[[], np.ndarray]) -> np.ndarray:
        """What `read` returns. Raises StoreError naming a shard that is missing or cannot be read."""
        for shard in shards.tolist():
            if shard not in self._found:
                if not self._exists(self.layout.shard_key(shard)):
                    raise StoreError(
                        f"{self._where(shard)}: shard is missing; restore it, or extract anew with --overwrite"
                    )
                self._found.add(shard)
        try:
            return read()
        except Exception as error:  # zarr, codecs and file systems each raise what they like
            for shard in shards.tolist():
                try:
                    self.zarr[shard * self.layout.shard_rows : (shard + 1) * self.layout.shard_rows]
                except Exception as cause:
                    raise StoreError(
                        f"{self._where(shard)}: cannot be read ({cause}); the shard is truncated or damaged: "
                        "restore it, or extract anew with --overwrite"
                    ) from cause
            raise StoreError(f"{self.location}: cannot be read: {error}") from error

    def _where(self, shard: int) -> str:
        first = shard * self.layout.shard_rows
        rows = f"rows {first}:{first + self.layout.rows_in(shard)}"
        return f"{self.location}/{self.layout.shard_key(shard)} ({rows})"

    def _exists(self, key: str) -> bool:
        if "://" not in self.location:
            return os.path.exists(f"{self.location}/{key}")
        import fsspec

        files, path = fsspec.core.url_to_fs(f"{self.location}/{key}")
        return bool(files.exists(path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
