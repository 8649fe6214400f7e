"""The slow, general way to an array: zarr's own, for compressed and remote stores."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from store.errors import StoreError
from store.layout import Layout


class ZarrArray:
    """The same interface as MappedArray, over any URL that fsspec knows. Opened anew after a fork."""

    def __init__(self, location: str, layout: Layout) -> None:
        self.location, self.layout = location, layout
        self._opened: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.layout.rows

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out[i] = array[rows[i]]; every chunk is fetched once."""
        if not len(rows):
            return
        once, place = np.unique(rows, return_inverse=True)
        np.take(self.zarr.oindex[once], place, axis=0, out=out, mode="clip")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """array[start:stop] in memory."""
        return np.asarray(self.zarr[start : min(stop, len(self))])

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
