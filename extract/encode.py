"""From decoded pixels to feature arrays: device copies, forward passes, out-of-memory halving.

Shapes: `B` samples, `P` planes a sample (base image and K views, or T frames), `h w` the teacher's grid,
`g` the stored grid, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from console.output import get_logger
from extract.decode.pool import DecodedBatch, PixelBuffer
from extract.decode.sample import DecodedSample, Encoding, decode_samples
from extract.sources.base import Sample
from extract.teachers import Teacher
from extract.teachers.devices import device_error, memory_advice
from extract.teachers.pixels import cells_inside
from imaging.geometry import resize_view
from store import format as names
from store.errors import DistillError

log = get_logger("extract")

FINITE = "finite"
Part = TypeVar("Part")


class OutOfMemory(DistillError):
    """One image alone does not fit on the device."""


@dataclass
class Pending:
    """A batch that the device may still be working on.

    tensors: the features on the host, or on their way there. finite: bool scalar, whether all of them are finite.
    raw: uint8 [B, S, S, 3], the images as the teacher sees them, when they are to be stored.
    """

    tensors: dict[str, Tensor]
    finite: Tensor
    device: torch.device
    ready: torch.cuda.Event | None
    raw: npt.NDArray[np.uint8] | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Wait for the device; arrays by name, rows in the batch's order."""
        with explained_errors(self.device):
            if self.ready is not None:
                self.ready.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class DeviceCopies:
    """Copies between the host and a device that neither the host nor the device's computation waits for.

    On CUDA they go through pinned memory (torch keeps and reuses pinned blocks), on a stream for each direction. On a
    CPU tensors stay where they are. depth: batches to launch before the first one's results are waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.depth = 1 if self.cuda else 0
        if self.cuda:
            self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; on CUDA the host's may be overwritten when this returns."""
        if not self.cuda:
            return tensor
        pinned = torch.empty_like(tensor, pin_memory=True)
        # NumPy copies in this thread. torch would wake a thread for each core, which then spin beside the decoders:
        # 0.54 of 0.72 CPU seconds for 1,000 images of 224 px, on 16 cores.
        np.copyto(pinned.numpy(), tensor.numpy())
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.up):
            there = pinned.to(self.device, non_blocking=True)
        compute.wait_stream(self.up)
        # Allocated on another stream: its memory stays until the computation is done.
        there.record_stream(compute)
        return there

    def to_host(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The tensors in host memory, and the event after which they are there (None: now)."""
        if not self.cuda:
            return {name: tensor.to("cpu") for name, tensor in tensors.items()}, None
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
            # Blocking: the thread that waits sleeps. By default it polls, and takes a core from the decoders.
            ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            ready.record(self.down)
        for tensor in tensors.values():
            tensor.record_stream(self.down)
        return host, ready


class AdaptiveBatch:
    """Does work on a batch in parts of at most `limit` images, half as many whenever memory runs out.

    halved: the limits that memory forced, in order.
    """

    def __init__(self, limit: int, device: torch.device, image_size: int) -> None:
        self.limit, self.device, self.image_size = limit, device, image_size
        self.halved: list[int] = []

    def run(self, count: int, work: Callable[[slice], Part]) -> list[Part]:
        """What `work` gives for each part of a batch of `count` images.

        Raises:
            OutOfMemory: when one image alone does not fit.
        """
        while True:
            try:
                return [work(slice(start, start + self.limit)) for start in range(0, count, self.limit)]
            except torch.OutOfMemoryError:
                pass  # halved outside, where the traceback no longer keeps the failed pass's tensors
            self.halve(count)

    def halve(self, count: int) -> None:
        size = min(self.limit, count)
        if size <= 1:
            raise OutOfMemory(memory_advice(self.device, self.image_size))
        self.limit = size // 2
        self.halved.append(self.limit)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory on %s: going on with batches of %d", self.device, self.limit)


class Encoder:
    """Runs the teacher over decoded batches.

    scales: powers of two [D] by array name, as the store has them; with them, features come as they are stored
    (float16, divided by their scale), without them as float32.
    """

    def __init__(
        self,
        teacher: Teacher,
        encoding: Encoding,
        batch_size: int,
        scales: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        self.teacher, self.encoding = teacher, encoding
        self.parts = AdaptiveBatch(batch_size, teacher.device, encoding.image_size)
        self.cuda = teacher.device.type == "cuda"
        # Each new shape is compiled, or planned by cuDNN: short batches are filled up instead.
        self.fill = self.cuda
        self.copies = DeviceCopies(teacher.device)
        self.factors = (
            None
            if scales is None
            else {name: torch.from_numpy(1 / scale).to(teacher.device) for name, scale in scales.items()}
        )

    def launch(self, batch: DecodedBatch) -> Pending:
        """Start the forward passes. The batch's pixels are not needed any more when this returns."""
        with explained_errors(self.teacher.device), torch.inference_mode():
            pixels = self.copies.to_device(torch.from_numpy(batch.pixels))
            inside = self.coverage(batch)
            tensors, finite = self.encode(pixels, inside)
            host, ready = self.copies.to_host({**tensors, FINITE: finite})
        finite = host.pop(FINITE)
        raw = batch.pixels[:, 0].transpose(0, 2, 3, 1).copy() if self.encoding.images == "raw" else None
        return Pending(host, finite, self.teacher.device, ready, raw)

    def encode(self, pixels: Tensor, inside: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Features by name of uint8 [B, P, 3, S, S], and whether all are finite (bool scalar); all on the device."""
        encode = self.encode_clips if self.encoding.frames else self.encode_images
        tensors = encode(pixels, inside)
        if self.factors is not None:
            # As `to_stored` of the store does it on the host; what does not fit becomes infinite.
            scaled = {
                name: tensor * self.factors[name] for name, tensor in tensors.items() if name in self.factors
            }
            tensors = {name: tensor.to(torch.float16) for name, tensor in {**tensors, **scaled}.items()}
        return tensors, torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).all()

    def coverage(self, batch: DecodedBatch) -> Tensor | None:
        """float32 [B, h, w] on the device: how much of each cell shows the image; None where no policy pads."""
        if self.encoding.resize != "letterbox":
            return None
        side = self.encoding.image_size
        h, w = self.teacher.grid_size(side, side)
        cells = [
            cells_inside(resize_view("letterbox", result.size, side), h, w)
            if min(result.size) > 0
            else np.ones((h, w), np.float32)  # a bad image
            for result in batch.results
        ]
        return self.copies.to_device(torch.from_numpy(np.stack(cells)))

    def encode_images(self, pixels: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
        """pixels: uint8 [B, 1 + K, 3, S, S]; [B, 1, 3, S, S] where the one view is the mirror image."""
        images = pixels[:, 0]
        tensors = self.forward(images, inside)
        if self.encoding.flip:
            views = [self.forward(images.flip(-1), None if inside is None else inside.flip(-1))]
        else:
            views = [self.forward(pixels[:, 1 + view], None) for view in range(self.encoding.views)]
        stacked = {name: torch.stack([view[name] for view in views], dim=1) for name in tensors if views}
        return tensors | {names.view_array(name): values for name, values in stacked.items()}

    def encode_clips(self, pixels: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
        """pixels: uint8 [B, T, 3, S, S]; one row of frames for each temporal patch of the teacher."""
        step = self.encoding.pair
        frames = pixels.shape[1]
        parts = []
        for first in range(0, frames, step):
            part = pixels[:, first : first + step]
            parts.append(self.forward(part[:, 0] if step == 1 else part, inside))
        tensors = {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}
        rows = torch.stack([part[names.POOLED] for part in parts], dim=1)
        return {**tensors, names.POOLED: rows.mean(dim=1), names.FRAMES: rows}

    def forward(self, images: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
        """Features by name of uint8 [B, (frames,) 3, S, S]: pooled float32 [B, D] and the grids to store [B, g, g, D]."""

        def encode(some: slice) -> dict[str, Tensor]:
            part, weights = images[some], None if inside is None else inside[some]
            count = len(part)
            if self.fill and count < self.parts.limit:
                part = fill_up(part, self.parts.limit, 0)
                weights = None if weights is None else fill_up(weights, self.parts.limit, 1)
            out = self.teacher.encode(part, inside=weights)
            tensors = {names.POOLED: out.pooled[:count].float()}
            if side := self.encoding.grid:
                tensors[names.GRID] = resample_grid(out.grid[:count].float(), side, area=self.encoding.area)
            for number, side in self.encoding.layers:
                tensors[names.layer_grid(number)] = resample_grid(out.layers[number][:count].float(), side)
            return tensors

        parts = self.parts.run(len(images), encode)
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def decode_here(encoding: Encoding, samples: Sequence[Sample]) -> DecodedBatch:
    """A few samples as one batch, decoded in this thread into a buffer of its own."""
    size = encoding.image_size
    buffer = PixelBuffer((len(samples), encoding.planes, 3, size, size), shared=False)
    return DecodedBatch(0, samples, buffer, [], decode_samples(encoding, samples, buffer.pixels))


def encode_samples(
    teacher: Teacher, encoding: Encoding, samples: Sequence[Sample], batch_size: int = 1
) -> tuple[list[DecodedSample], dict[str, npt.NDArray[Any]]]:
    """Decode a few samples in this thread and encode those that are not bad, in one forward pass.

    Returns what decoding found out about each sample, and the good ones' features by name in true units, in order;
    no arrays when all are bad. batch_size: that of later batches, so that a GPU compiles for one shape only.
    """
    batch = decode_here(encoding, samples)
    results = batch.results
    good = [index for index, result in enumerate(results) if result.reason is None]
    if not good:
        return results, {}
    batch.buffer.pixels = batch.buffer.pixels[good]
    chosen = DecodedBatch(
        0, [samples[index] for index in good], batch.buffer, [], [results[index] for index in good]
    )
    encoder = Encoder(teacher, encoding, max(batch_size, len(good)))
    return results, encoder.launch(chosen).arrays()


@contextmanager
def explained_errors(device: torch.device) -> Iterator[None]:
    """Turn what CUDA raises for a GPU that failed into one line. Raises TeacherError."""
    try:
        yield
    except RuntimeError as error:
        explained = device_error(error, device)
        if explained is None:
            raise
        raise explained from error


def fill_up(tensor: Tensor, count: int, value: float) -> Tensor:
    """The tensor [b, ...] with rows of `value` added, [count, ...]."""
    return torch.cat([tensor, tensor.new_full((count - len(tensor), *tensor.shape[1:]), value)])


def resample_grid(grid: Tensor, side: int, *, area: bool = True) -> Tensor:
    """A grid [B, h, w, D] as [B, g, g, D]: cells averaged by area when shrinking, bilinear when growing.

    area: see `Encoding`.
    """
    batch, h, w, width = grid.shape
    if (h, w) == (side, side):
        return grid
    if area and averages_unevenly(side, h, w):
        rows = area_weights(side, h, grid.device)
        columns = rows if h == w else area_weights(side, w, grid.device)
        shrunk = (rows @ grid.reshape(batch, h, w * width)).view(batch * side, w, width)
        return (columns @ shrunk).view(batch, side, side, width)
    maps = grid.permute(0, 3, 1, 2)
    if side <= min(h, w):
        maps = F.adaptive_avg_pool2d(maps, side)
    else:
        maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).contiguous()


def averages_unevenly(side: int, h: int, w: int) -> bool:
    """Whether a grid of `side` is smaller than h × w and its cells' edges cut through the teacher's cells."""
    return 0 < side <= min(h, w) and (h % side > 0 or w % side > 0)


@lru_cache(maxsize=16)
def area_weights(side: int, cells: int, device: torch.device) -> Tensor:
    """float32 [g, n]: the share of each of `g` equal parts of an axis that each of its `n` equal cells covers.

    Rows sum to 1. Parts do not overlap, so that a stored cell stands for its own part of the image alone, as stage two
    assumes. Kept on the device: a copy for each batch would wait for it.
    """
    parts = torch.arange(side, dtype=torch.float64)[:, None] / side
    starts = torch.arange(cells, dtype=torch.float64)[None] / cells
    ends = torch.minimum(parts + 1 / side, starts + 1 / cells)
    overlap = (ends - torch.maximum(parts, starts)).clamp_min(0) * side
    return overlap.to(torch.float32).to(device)
