"""A writer in a thread of its own: the teacher does not wait for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from store.writer import StoreWriter

QUEUED = 2  # batches that may wait for the disk


class Block(NamedTuple):
    """Rows for `StoreWriter.append`, and the callback that receives which of them were stored as valid.

    in_stored_form, finite: names of arrays, see `StoreWriter.append`.
    """

    arrays: Mapping[str, Any]
    reasons: Sequence[str]
    stored: Callable[[npt.NDArray[np.bool_]], None]
    in_stored_form: frozenset[str] = frozenset()
    finite: frozenset[str] = frozenset()


class BackgroundWriter:
    """Appends blocks in order. Its end, for whatever cause, commits all blocks it was given.

    Errors of the writer come out of the next `put` or of the end of the `with` block.
    """

    def __init__(self, writer: StoreWriter) -> None:
        self.writer = writer
        self.error: BaseException | None = None
        self.blocks: queue.Queue[Block | None] = queue.Queue(QUEUED)
        self.thread = threading.Thread(target=self.run, name="store-writer", daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while (block := self.blocks.get()) is not None:
                valid = np.array([not reason for reason in block.reasons], dtype=np.bool_)
                rows = self.writer.append(
                    block.arrays,
                    valid=valid,
                    reasons=block.reasons,
                    stored=block.in_stored_form,
                    finite=block.finite,
                )
                block.stored(rows)
            self.writer.close()
        except BaseException as error:  # carried to the thread that waits
            self.error = error
            self.writer.close(commit=False)

    def put(self, block: Block) -> None:
        """Hand over a block; waits while the disk is behind. Raises what the writer raised."""
        while self.thread.is_alive():
            try:
                self.blocks.put(block, timeout=0.5)
                return
            except queue.Full:
                continue
        self.raise_error()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Write and commit what is queued; False when that takes longer than the timeout."""
        while self.thread.is_alive():
            try:
                self.blocks.put(None, timeout=0.1)
                break
            except queue.Full:
                if timeout_s is not None and (timeout_s := timeout_s - 0.1) <= 0:
                    return False
        self.thread.join(timeout_s)
        return not self.thread.is_alive()

    def raise_error(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        if kind is None:
            self.raise_error()
