"""Decoding beside the teacher: worker processes fill shared pixel buffers, batch after batch, in order.

No pixel travels through a pipe. The processes are spawned, never forked: a fork would copy CUDA's and zarr's threads
half-way. Each uses one core.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import current_process, get_context, shared_memory, util
from typing import Any, Self

import numpy as np
from PIL import Image

from console.output import get_logger
from extract.decode.sample import DecodedSample, Encoding, Pixels, decode_samples
from extract.sources.base import Sample
from processes.children import block_stop_signals, end_with_parent, hide_main_module
from store.errors import DistillError

log = get_logger("extract")

CHUNK = 8  # samples a task: small enough that the first batch is spread over all workers
AHEAD = 3  # batches in memory: one with the teacher, two being decoded


class SharedMemoryFull(DistillError):
    """There is not enough shared memory (`/dev/shm`) for one more pixel buffer."""


class PixelBuffer:
    """uint8 [B, P, 3, S, S]: the pixels of one batch, `P` planes (base image and views, or frames) a sample.

    A `shared` one is pickled by its name: another process gets the same memory.
    """

    def __init__(
        self, shape: tuple[int, ...], shared: bool, block: shared_memory.SharedMemory | None = None
    ) -> None:
        self.shape = shape
        self.block = allocate_block(math.prod(shape)) if shared and block is None else block
        self.pixels: Pixels = (
            np.zeros(shape, np.uint8)
            if self.block is None
            else np.ndarray(shape, np.uint8, buffer=self.block.buf)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.block is not None, "only a shared buffer is sent to another process"
        return open_buffer, (self.block.name, self.shape)

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


@cache
def open_buffer(name: str, shape: tuple[int, ...]) -> PixelBuffer:
    """In a decoding process: the buffer of another process. The mapping is kept, a run has only a few buffers."""
    return PixelBuffer(shape, True, shared_memory.SharedMemory(name=name))


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


class DecodingFailed(DistillError):
    """The decoding processes cannot be kept alive."""


@dataclass(eq=False)
class Chunk:
    """A few neighboring samples of one batch, decoded by one task."""

    samples: Sequence[Sample]
    start: int
    future: Future[list[DecodedSample]] | None = None


@dataclass(eq=False)
class DecodedBatch:
    """One batch of the plan, rows `first…` of a split: `pixels` uint8 [B, P, 3, S, S], and what decoding found out."""

    first: int
    samples: Sequence[Sample]
    buffer: PixelBuffer
    chunks: list[Chunk]
    results: list[DecodedSample] = field(default_factory=list)

    @property
    def pixels(self) -> Pixels:
        return self.buffer.pixels[: len(self.samples)]


class DecodePool:
    """Decodes batches ahead of the teacher, in `workers` processes (0: in one thread of this process)."""

    def __init__(self, encoding: Encoding, batch_size: int, workers: int) -> None:
        self.encoding, self.workers = encoding, workers
        # A daemonic process (a dask worker under its nanny) may not have children: threads decode there.
        self.processes = workers > 0 and not current_process().daemon
        shape = (batch_size, encoding.planes, 3, encoding.image_size, encoding.image_size)
        self.buffers: list[PixelBuffer] = []
        try:
            for _ in range(AHEAD):
                self.buffers.append(PixelBuffer(shape, self.processes))
        except SharedMemoryFull as error:
            for buffer in self.buffers:
                buffer.close()
            log.warning("%s; decoding in threads for now", error)
            self.processes = False
            self.buffers = [PixelBuffer(shape, shared=False) for _ in range(AHEAD)]
        self.free = list(self.buffers)
        self.executor = self.start()

    def start(self) -> Executor:
        if not self.processes:
            return ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="decode")
        return ProcessPoolExecutor(
            self.workers, mp_context=get_context("spawn"), initializer=begin_worker, initargs=(os.getpid(),)
        )

    def batches(self, cuts: Iterable[tuple[int, Sequence[Sample]]]) -> Iterator[DecodedBatch]:
        """Yield each cut (first row, samples) decoded, in order; a batch's pixels stay valid until `release(batch)`."""
        waiting: deque[DecodedBatch] = deque()
        source = iter(cuts)
        while True:
            while self.free:
                cut = next(source, None)
                if cut is None:
                    break
                first, samples = cut
                starts = range(0, len(samples), CHUNK)
                chunks = [Chunk(samples[start : start + CHUNK], start) for start in starts]
                batch = DecodedBatch(first, samples, self.free.pop(), chunks)
                for chunk in chunks:
                    self.submit_chunk(chunk, batch.buffer)
                waiting.append(batch)
            if not waiting:
                return
            batch = waiting.popleft()
            for chunk in batch.chunks:
                batch.results += self.finish_chunk(chunk, batch, waiting)
            yield batch

    def release(self, batch: DecodedBatch) -> None:
        """The teacher has read the pixels: the buffer can take another batch."""
        self.free.append(batch.buffer)

    def submit_chunk(self, chunk: Chunk, buffer: PixelBuffer) -> None:
        try:
            # A new process inherits the mask: Ctrl-C is for the parent alone.
            with block_stop_signals(), hide_main_module():
                chunk.future = self.executor.submit(
                    decode_chunk, self.encoding, chunk.samples, buffer, chunk.start
                )
        except BrokenProcessPool:
            chunk.future = None  # noticed, and done again, when the batch is collected

    def finish_chunk(
        self, chunk: Chunk, batch: DecodedBatch, waiting: Iterable[DecodedBatch]
    ) -> list[DecodedSample]:
        try:
            return self.result_of(chunk)
        except BrokenProcessPool:
            pass
        # The executor is broken as a whole and does not tell which chunk's process ended. This is the first chunk in order
        # without a result, so it is decoded image by image; everything else that was not finished is submitted again.
        log.warning("a decoding process ended unexpectedly: starting it again")
        self.restart()
        results = self.isolate(chunk, batch.buffer)
        for other in (batch, *waiting):
            for left in other.chunks:
                if left is not chunk and not is_done(left):
                    self.submit_chunk(left, other.buffer)
        return results

    def isolate(self, chunk: Chunk, buffer: PixelBuffer) -> list[DecodedSample]:
        """Decode one by one: a file that kills its decoder becomes a bad image, its neighbors do not."""
        results: list[DecodedSample] = []
        for offset, sample in enumerate(chunk.samples):
            single = Chunk([sample], chunk.start + offset)
            self.submit_chunk(single, buffer)
            try:
                results += self.result_of(single)
            except BrokenProcessPool:
                buffer.pixels[single.start] = 0
                results.append(DecodedSample(reason="its decoding ended the process"))
                self.restart()
        return results

    def result_of(self, chunk: Chunk) -> list[DecodedSample]:
        """Raises BrokenProcessPool when the chunk's decoding ended its process."""
        if chunk.future is None:
            raise BrokenProcessPool
        return chunk.future.result()

    def restart(self) -> None:
        """New decoding processes in the place of broken ones.

        Raises:
            DecodingFailed: when they end before any image: then no image is to blame.
        """
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.executor = self.start()
        try:
            with block_stop_signals(), hide_main_module():
                started = self.executor.submit(os.getpid)
            started.result()
        except BrokenProcessPool:
            raise DecodingFailed(
                "decoding processes end before they decode anything: use --workers 0 to decode in a thread"
            ) from None

    def close(self) -> None:
        """End the decoders at once (they hold nothing that is worth keeping) and give the buffers back."""
        # A copy: the executor forgets its processes when it is shut down.
        processes = list((getattr(self.executor, "_processes", None) or {}).values())
        self.executor.shutdown(wait=not processes, cancel_futures=True)
        for process in processes:
            process.kill()
        for buffer in self.buffers:
            buffer.close()

    def abandon(self) -> None:
        """Before the process is ended from outside: no decoder, buffer or semaphore stays behind."""
        for process in list((getattr(self.executor, "_processes", None) or {}).values()):
            process.kill()
        for buffer in self.buffers:
            buffer.unlink()
        # What multiprocessing would do at a normal exit: give its semaphores back.
        util._run_finalizers(0)  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def decode_chunk(
    encoding: Encoding, samples: Sequence[Sample], buffer: PixelBuffer, start: int
) -> list[DecodedSample]:
    """The task of a worker: decode `samples` into rows `start…` of the buffer."""
    return decode_samples(encoding, samples, buffer.pixels[start : start + len(samples)])


def is_done(chunk: Chunk) -> bool:
    future = chunk.future
    return future is not None and future.done() and not future.cancelled() and future.exception() is None


def begin_worker(parent: int) -> None:
    """Ignore the signals meant for the parent, end with it even when it was killed, and use one core."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, with the first resize
    # Pillow returns the memory of each image to the system; kept for the next one, decoding took a seventh less CPU time
    # on a GPU box. 16 blocks of at most 16 MB.
    Image.core.set_blocks_max(16)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    end_with_parent(parent, signal.SIGKILL)
