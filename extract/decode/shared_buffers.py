"""Pixel buffers that decoding processes fill and the teacher reads: no pixel travels through a pipe."""

from __future__ import annotations

import contextlib
import math
import os
from multiprocessing import shared_memory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.errors import DistillError

Pixels = npt.NDArray[np.uint8]


class SharedMemoryFull(DistillError):
    """There is not enough shared memory (`/dev/shm`) for one more pixel buffer."""


class BufferAddress(NamedTuple):
    """How another process finds a buffer: the shared block's name and the array's shape."""

    name: str
    shape: tuple[int, ...]


class PixelBuffer:
    """uint8 [B, P, 3, S, S]: the pixels of one batch, `P` planes (base image and views, or frames) a sample.

    `shared` buffers can be opened by other processes through `address`.
    """

    def __init__(self, shape: tuple[int, ...], shared: bool) -> None:
        self.shape = shape
        self.block = allocate_block(math.prod(shape)) if shared else None
        self.pixels: Pixels = (
            np.zeros(shape, np.uint8)
            if self.block is None
            else np.ndarray(shape, np.uint8, buffer=self.block.buf)
        )

    @property
    def address(self) -> BufferAddress | None:
        return None if self.block is None else BufferAddress(self.block.name, self.shape)

    def close(self) -> None:
        """Give the memory back; `pixels` must not be used afterwards."""
        self.pixels = np.empty((0,), np.uint8)
        if self.block is not None:
            with contextlib.suppress(BufferError):  # a caller still holds a view: the mapping goes with it
                self.block.close()
        self.unlink()

    def unlink(self) -> None:
        """Free the block's name; may be called twice."""
        block, self.block = self.block, None
        if block is not None:
            block.unlink()


def allocate_block(size: int) -> shared_memory.SharedMemory:
    """A shared block whose pages exist: a full `/dev/shm` is an error here, not a bus error later.

    Raises:
        SharedMemoryFull: containers often have 64 MB of shared memory only.
    """
    block = shared_memory.SharedMemory(create=True, size=size)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(block._fd, 0, size)  # type: ignore[attr-defined]
    except OSError as error:
        block.close()
        block.unlink()
        raise SharedMemoryFull(
            f"shared memory: no room for {size / 1e6:.0f} MB of pixels ({error.strerror}): "
            "start the container with a larger --shm-size, or use a smaller --batch-size, or --workers 0"
        ) from None
    return block


OPEN_BLOCKS: dict[str, shared_memory.SharedMemory] = {}


def open_buffer(address: BufferAddress) -> Pixels:
    """In a decoding process: the buffer's array. The mapping is kept, a run has only a few buffers."""
    if address.name not in OPEN_BLOCKS:
        OPEN_BLOCKS[address.name] = shared_memory.SharedMemory(name=address.name)
    return np.ndarray(address.shape, np.uint8, buffer=OPEN_BLOCKS[address.name].buf)
