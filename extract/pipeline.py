"""Encode ranges of rows: decoding ahead, the teacher, a writer thread, one batch of the plan after the other."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from console.output import get_logger
from extract.decode.pool import DecodedBatch, DecodePool
from extract.decode.sample import Encoding
from extract.encode import Encoder, Pending
from extract.plan import ExtractTask
from extract.result import BadSample, EncodedRows
from extract.teachers import Teacher
from processes.stop import StopRequest
from store import format as names
from store.job import features_job
from store.writer import StoreWriter

log = get_logger("extract")

QUEUED = 2  # batches that may wait for the disk
OVERFLOW = "its features are not finite or too large for float16 at the store's scale"


class Pipeline:
    """A teacher and a decode pool that encode any number of row ranges of one store."""

    def __init__(self, task: ExtractTask, teacher: Teacher, batch_size: int, workers: int) -> None:
        job = features_job(task.path)
        assert job is not None, "a pipeline encodes rows of an unfinished job"
        scales = {spec.name: job.scale_of(spec.name) for spec in job.arrays if spec.scaled}
        known = {name: scale for name, scale in scales.items() if scale is not None}
        self.task = task
        self.encoder = Encoder(teacher, task.encoding, batch_size, known)
        self.pool = DecodePool(task.encoding, batch_size, workers)
        self.dropped_boxes = 0
        self.background: BackgroundWriter | None = None

    def encode(
        self,
        writer: StoreWriter,
        encoded: EncodedRows,
        stop: StopRequest | None = None,
        after_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Encode the writer's rows that are not committed yet, and count them in `encoded`.

        Ends early, with everything encoded committed, when `stop` is requested. `after_batch` is called with the
        number of rows of each batch and may raise to end the run.
        """
        self.encoder.parts.halved = encoded.halved
        with BackgroundWriter(writer) as self.background:
            for batch, pending in self.run_batches(writer, stop):
                arrays = {**pending.arrays(), **sample_arrays(batch, pending, self.task.encoding)}
                if names.FRAMES in arrays:
                    arrays[names.FRAMES] = list(arrays[names.FRAMES])  # ragged: one array a row
                # Where something is not finite, the writer looks for the rows, and names the channel.
                finite = frozenset(pending.tensors) if bool(pending.finite) else frozenset()
                append = partial(
                    writer.append,
                    {name: arrays[name] for name in writer.array_names},
                    stored=frozenset(pending.tensors),
                    finite=finite,
                )
                self.background.put(partial(write_batch, append, batch, writer.split, encoded))
                encoded.rows += len(batch.samples)
                self.dropped_boxes += sum(result.dropped_boxes for result in batch.results)
                if after_batch is not None:
                    after_batch(len(batch.samples))

    def run_batches(
        self, writer: StoreWriter, stop: StopRequest | None
    ) -> Iterator[tuple[DecodedBatch, Pending]]:
        """Encoded batches; on CUDA the device works on the next one while the last is being fetched."""
        samples = self.task.splits[writer.split]
        launched: deque[tuple[DecodedBatch, Pending]] = deque()
        cuts = ((first, samples.between(first, end)) for first, end in writer.batches())
        for batch in self.pool.batches(cuts):
            if stop is not None and stop.requested:
                break
            launched.append((batch, self.encoder.launch(batch)))
            self.pool.release(batch)
            if len(launched) > self.encoder.copies.depth:
                yield launched.popleft()
        yield from launched

    def give_up(self, timeout_s: float) -> None:
        """From another thread, before the process is ended: commit what was encoded, leave nothing behind."""
        if self.background is not None:
            self.background.finish(timeout_s)
        self.pool.abandon()

    def close(self) -> None:
        self.pool.close()
        if self.dropped_boxes:
            log.warning(
                "%s: %d boxes without area inside their image were dropped; their images keep the other boxes",
                self.task.path,
                self.dropped_boxes,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def sample_arrays(batch: DecodedBatch, pending: Pending, encoding: Encoding) -> dict[str, Any]:
    """Everything about a batch that is not the teacher's; the writer picks what its store has."""
    results = batch.results
    labels = [names.NO_LABEL if sample.label is None else sample.label for sample in batch.samples]
    boxes = [result.boxes for result in results]
    arrays: dict[str, Any] = {
        names.SIZES: np.array([result.size for result in results], np.int32).reshape(-1, 2),
        names.CONTENT: np.stack([np.frombuffer(result.content, np.uint8) for result in results]),
        names.LABEL: np.array(labels, np.int32),
        names.BOXES: [np.empty((0, 4), np.float32) if item is None else item.values for item in boxes],
        names.BOX_CLASSES: [np.empty(0, np.int32) if item is None else item.classes for item in boxes],
        names.MASK: [result.mask for result in results],
        names.IMAGES_ENCODED: [result.encoded for result in results],
        names.IMAGES_RAW: pending.raw,
    }
    no_frames = np.zeros((encoding.clip_frames, 2), np.int64)
    arrays[names.IMAGES_FRAMES] = np.stack(
        [no_frames if result.spans is None else result.spans for result in results]
    )
    missing = np.full((encoding.views, 2, 3), np.nan)
    arrays[names.VIEWS_GEOMETRY] = np.stack(
        [missing if result.geometry is None else result.geometry for result in results]
    )
    return arrays


# -- the writer's thread: the teacher does not wait for the disk -----------------------------------------


class BackgroundWriter:
    """Appends batches in order. Its end, for whatever cause, commits all batches it was given.

    Errors of the writer are raised by the next `put` or by the end of the `with` block.
    """

    def __init__(self, writer: StoreWriter) -> None:
        self.writer = writer
        self.error: BaseException | None = None
        self.batches: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED)
        self.thread = threading.Thread(target=self.run, name="store-writer", daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while (write := self.batches.get()) is not None:
                write()
            self.writer.close()
        except BaseException as error:  # carried to the thread that waits
            self.error = error
            self.writer.close(commit=False)

    def put(self, write: Callable[[], None]) -> None:
        """Hand over a batch; waits while the disk is behind. Raises what the writer raised."""
        while self.thread.is_alive():
            try:
                self.batches.put(write, timeout=0.5)
                return
            except queue.Full:
                continue
        self.raise_error()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Write and commit what is queued; False when that takes longer than the timeout."""
        while self.thread.is_alive():
            try:
                self.batches.put(None, timeout=0.1)
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


def write_batch(append: Callable[..., Any], batch: DecodedBatch, split: str, encoded: EncodedRows) -> None:
    """Append a batch to the store; the rows that are invalid there go to the ledger."""
    reasons = [result.reason or "" for result in batch.results]
    valid = append(valid=np.array([not reason for reason in reasons], np.bool_), reasons=reasons)
    for offset in np.flatnonzero(~valid).tolist():
        content = batch.results[offset].content
        encoded.bad.append(
            BadSample(
                split=split,
                row=batch.first + offset,
                key=batch.samples[offset].key,
                reason=reasons[offset] or OVERFLOW,
                content=content.hex() if any(content) else "",
            )
        )
