"""Batches on the GPU before the loop asks for them: a thread gathers and copies while the GPU computes.

The order of the steps keeps the thread, the copies and the loop's kernels from overwriting each other's memory:

- The thread takes a host batch, puts what is not pinned into a pinned buffer, and queues the copies on a CUDA stream of
  their own, so that they overlap with the kernels of the loop's stream. An event recorded behind them is the ticket.
- The loop makes its stream wait for that event (`hand_over`). Neither the CPU nor the loop's earlier kernels wait.
- A pinned buffer may be filled again only when its copy is done: the thread waits for the ticket of the batch that used
  the buffer before (`slots` batches earlier).
- The copies' memory on the GPU was allocated on the copy stream. `record_stream` tells the allocator that the loop's
  stream uses it too, or it would give the memory to the next copy while kernels still read it.

On a CPU nothing of this is used.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from train.data.batches import Batch


#: Batches that wait on the device for the loop; the thread holds one more.
AHEAD = 1
#: Seconds that closing waits for a batch that is being decoded.
CLOSE_S = 10.0


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without making the host wait: a copy from pageable memory to a GPU would."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class CopyEngine(Protocol):
    """Copies batches to a device in the background."""

    def start(self, batch: Batch) -> tuple[Batch, Any]:
        """Called in the thread: queue the copies; the batch on the device, and a ticket to wait for them."""

    def wait(self, ticket: Any) -> None:
        """Called in the thread: wait until the copies are done, so that their source may be filled again."""

    def hand_over(self, batch: Batch, ticket: Any) -> None:
        """Called by the loop: kernels that it queues from now on see the complete batch."""


class CopyStream:
    """The copy engine of a CUDA device: a second stream, and buffers of pinned memory that are used in turn."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self.device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        self.stream = torch.cuda.Stream(self.device)
        self.slots: deque[dict[tuple[str, str], Tensor]] = deque({} for _ in range(slots))

    def start(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        buffers = self.slots[0]
        self.slots.rotate(-1)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            moved = {
                name: pinned(value, name, buffers).to(self.device, non_blocking=True)
                for name, value in batch.tensors().items()
            }
            event = torch.cuda.Event(blocking=True)
            event.record(self.stream)
        return batch.with_tensors(moved), event

    def wait(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()

    def hand_over(self, batch: Batch, ticket: torch.cuda.Event) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ticket)
        for value in batch.tensors().values():
            value.record_stream(stream)


def pinned(value: Tensor, name: tuple[str, str], buffers: dict[tuple[str, str], Tensor]) -> Tensor:
    """`value` in pinned memory: itself where it is pinned already, else copied into the buffer of that name."""
    if value.is_pinned():
        return value
    known = buffers.get(name)
    if known is None or known.dtype != value.dtype or known.numel() < value.numel():
        known = buffers[name] = torch.empty(value.numel(), dtype=value.dtype, pin_memory=True)
    room = known[: value.numel()].view(value.shape)
    # NumPy copies in this thread; torch would wake a thread for each core, which then spin beside the decoding workers.
    np.copyto(room.numpy(), value.numpy())
    return room


class Failure(NamedTuple):
    """An error of the thread, raised where the loop asks for the next batch."""

    error: BaseException


class Prefetcher:
    """Runs an iterator of host batches in a thread and hands out its batches on the device, in order.

    `slots`: how many batches the iterator can give before it fills the memory of the first one again.
    """

    def __init__(self, batches: Iterator[Batch], engine: CopyEngine, slots: int) -> None:
        self.host, self.engine, self.slots = batches, engine, slots
        self.ready: queue.Queue[tuple[Batch, Any] | Failure | None] = queue.Queue(AHEAD)
        self.closed = threading.Event()
        self.finished = False
        self.thread = threading.Thread(target=self.work, name="prefetch", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.finished:
            raise StopIteration
        item = self.ready.get()
        if isinstance(item, tuple) and not isinstance(item, Failure):
            self.engine.hand_over(*item)
            return item[0]
        self.finished = True
        if item is None:
            raise StopIteration
        raise item.error

    def work(self) -> None:
        """The thread: gather, copy, queue, until the batches end, one fails, or `close` is called."""
        copies: deque[Any] = deque()
        try:
            while not self.closed.is_set():
                if len(copies) == self.slots:
                    # The next host batch is gathered into the memory that this one was copied from.
                    self.engine.wait(copies.popleft())
                batch = next(self.host, None)
                if batch is None:
                    break
                moved, ticket = self.engine.start(batch)
                copies.append(ticket)
                del batch
                self.put((moved, ticket))
            # The next epoch fills the same memory.
            for ticket in copies:
                self.engine.wait(ticket)
            self.put(None)
        except BaseException as error:
            self.put(Failure(error))

    def put(self, item: tuple[Batch, Any] | Failure | None) -> None:
        """Wait for a free place, but not after `close`."""
        while not self.closed.is_set():
            try:
                return self.ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def close(self) -> None:
        """End the thread and drop the batches that were not asked for."""
        self.closed.set()
        self.finished = True
        self.thread.join(CLOSE_S)
        while not self.ready.empty():
            self.ready.get_nowait()
