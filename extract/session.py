"""Encode ranges of rows: decoding ahead, the teacher, a writer thread, one batch of the plan after the other."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from console.log import get_logger
from console.stop import StopRequest
from extract.decode.pool import DecodedBatch, DecodePool
from extract.decode.sample import Encoding
from extract.encode import Encoder, Pending
from extract.plan import ExtractTask
from extract.result import BadSample
from extract.resume import job_of
from extract.teachers import Teacher
from store import format as names
from store.writer import StoreWriter

log = get_logger("extract")

QUEUED = 2  # batches that may wait for the disk


# -- the writer's thread: the teacher does not wait for the disk -----------------------------------------


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


# -- the session -----------------------------------------------------------------------------------------


OVERFLOW = "its features are not finite or too large for float16 at the store's scale"


@dataclass
class Report:
    """What a session did so far: rows encoded, the bad ones, boxes dropped, batch sizes that memory forced."""

    rows: int = 0
    dropped_boxes: int = 0
    bad: list[BadSample] = field(default_factory=list)
    halved: list[int] = field(default_factory=list)


class Session:
    """A teacher and a decode pool that encode any number of row ranges of one store."""

    def __init__(self, task: ExtractTask, teacher: Teacher, batch_size: int, workers: int) -> None:
        self.task = task
        self.encoder = Encoder(teacher, task.encoding, batch_size, stored_scales(task))
        self.pool = DecodePool(task.encoding, batch_size, workers)
        self.report = Report(halved=self.encoder.parts.halved)
        self.background: BackgroundWriter | None = None

    def encode(
        self,
        writer: StoreWriter,
        stop: StopRequest | None = None,
        after_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Encode the writer's rows that are not committed yet.

        Ends early, with everything encoded committed, when `stop` is requested. `after_batch` is called with the
        number of rows of each batch and may raise to end the run.
        """
        with BackgroundWriter(writer) as self.background:
            for batch, pending in self.run_batches(writer, stop):
                self.keep(self.background, writer, batch, pending)
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

    def keep(
        self, background: BackgroundWriter, writer: StoreWriter, batch: DecodedBatch, pending: Pending
    ) -> None:
        """Hand a batch to the writer thread, which notes what was bad."""
        arrays = {**feature_arrays(pending), **sample_arrays(batch, pending, self.task.encoding)}
        reasons = [result.reason or "" for result in batch.results]
        chosen = {name: arrays[name] for name in writer.array_names}
        features = frozenset(pending.tensors)
        # Where something is not finite, the writer looks for the rows, and names the channel.
        finite = features if bool(pending.finite) else frozenset()
        stored = partial(self.note_bad, writer.split, batch, reasons)
        background.put(Block(chosen, reasons, stored, features, finite))
        self.report.rows += len(reasons)
        self.report.dropped_boxes += sum(result.dropped_boxes for result in batch.results)

    def note_bad(
        self, split: str, batch: DecodedBatch, reasons: list[str], valid: npt.NDArray[np.bool_]
    ) -> None:
        for offset in np.flatnonzero(~valid).tolist():
            content = batch.results[offset].content
            self.report.bad.append(
                BadSample(
                    split=split,
                    row=batch.first + offset,
                    key=batch.samples[offset].key,
                    reason=reasons[offset] or OVERFLOW,
                    content=content.hex() if any(content) else "",
                )
            )

    def give_up(self, timeout_s: float) -> None:
        """From another thread, before the process is ended: commit what was encoded, leave nothing behind."""
        if self.background is not None:
            self.background.finish(timeout_s)
        self.pool.abandon()

    def close(self) -> None:
        self.pool.close()
        if self.report.dropped_boxes:
            log.warning(
                "%s: %d boxes without area inside their image were dropped; their images keep the other boxes",
                self.task.path,
                self.report.dropped_boxes,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def stored_scales(task: ExtractTask) -> dict[str, npt.NDArray[np.float32]]:
    """Scale [D] of every scaled array of the store, by name."""
    job = job_of(task.path)
    assert job is not None, "a session encodes rows of an unfinished job"
    scales = {spec.name: job.scale_of(spec.name) for spec in job.arrays if spec.scaled}
    return {name: scale for name, scale in scales.items() if scale is not None}


def feature_arrays(pending: Pending) -> dict[str, Any]:
    """The teacher's arrays as the writer takes them: frames as one array a row."""
    arrays: dict[str, Any] = dict(pending.arrays())
    if names.FRAMES in arrays:
        arrays[names.FRAMES] = list(arrays[names.FRAMES])
    return arrays


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
