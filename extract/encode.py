"""From decoded pixels to feature arrays: device copies, forward passes, out-of-memory halving.

Shapes: `B` samples, `P` planes a sample (base image and K views, or T frames), `h w` the teacher's grid,
`g` the stored grid, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from console.log import get_logger
from extract.decoding import DecodeJob
from extract.teachers import Teacher
from extract.teachers.pixels import cells_inside
from extract.workers import DecodedBatch
from imaging.geometry import resize_view
from store import format as names
from store.errors import DistillError

log = get_logger("extract")

FloatArray = npt.NDArray[np.float32]
Part = TypeVar("Part")


class OutOfMemory(DistillError):
    """One image alone does not fit on the device."""


@dataclass(frozen=True)
class Encoding:
    """What is stored of each sample's features, besides pooled: grid side (0: none), views, frames."""

    grid: int
    views: int = 0
    clips: bool = False


@dataclass
class Pending:
    """A batch that the device may still be working on.

    raw: uint8 [B, S, S, 3], the images as the teacher sees them, when they are to be stored.
    """

    tensors: dict[str, Tensor]
    ready: torch.cuda.Event | None
    raw: npt.NDArray[np.uint8] | None = None
    views: int = 0

    def arrays(self) -> dict[str, FloatArray]:
        """Wait for the device; float32 arrays by name, rows in the batch's order."""
        if self.ready is not None:
            self.ready.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


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
            raise OutOfMemory(
                f"out of memory on {self.device} with one image of {self.image_size} pixels: "
                "use a smaller --image-size, --dtype bfloat16 or a device with more memory"
            )
        self.limit = size // 2
        self.halved.append(self.limit)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory on %s: going on with batches of %d", self.device, self.limit)


class Encoder:
    """Runs the teacher over decoded batches."""

    def __init__(self, teacher: Teacher, job: DecodeJob, encoding: Encoding, batch_size: int) -> None:
        self.teacher, self.job, self.encoding = teacher, job, encoding
        self.parts = AdaptiveBatch(batch_size, teacher.device, job.image_size)
        self.cuda = teacher.device.type == "cuda"
        self.depth = 1 if self.cuda else 0  # batches launched before the first result is asked for

    def launch(self, batch: DecodedBatch) -> Pending:
        """Start the forward passes. The batch's pixels are not needed any more when this returns."""
        pixels = self.to_device(batch.pixels)
        inside = self.coverage(batch)
        with torch.inference_mode():
            tensors = (
                self.encode_clips(pixels, inside)
                if self.encoding.clips
                else self.encode_images(pixels, inside)
            )
            host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        ready = None
        if self.cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        raw = batch.pixels[:, 0].transpose(0, 2, 3, 1).copy() if self.job.images == "raw" else None
        return Pending(host, ready, raw, self.job.views)

    def to_device(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """The batch on the teacher's device: through pinned memory and without waiting on CUDA."""
        tensor = torch.from_numpy(pixels)
        if not self.cuda:
            return tensor
        pinned = torch.empty_like(tensor, pin_memory=True)  # torch keeps and reuses pinned blocks
        pinned.copy_(tensor)
        return pinned.to(self.teacher.device, non_blocking=True)

    def coverage(self, batch: DecodedBatch) -> Tensor | None:
        """float32 [B, h, w]: how much of each cell shows the image; None where no policy pads."""
        if self.job.resize != "letterbox":
            return None
        h, w = self.teacher.grid_size(self.job.image_size, self.job.image_size)
        cells = [letterbox_coverage(result.size, self.job.image_size, h, w) for result in batch.results]
        return torch.from_numpy(np.stack(cells))  # the teacher moves it, without waiting for the device

    def encode_images(self, pixels: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
        """pixels: uint8 [B, 1 + K, 3, S, S]."""
        pooled, grid = self.forward(pixels[:, 0], inside)
        tensors = {names.POOLED: pooled}
        if self.encoding.grid:
            tensors[names.GRID] = grid
        if self.encoding.views:
            views = [self.forward(pixels[:, 1 + view], None) for view in range(self.encoding.views)]
            tensors[names.VIEWS_POOLED] = torch.stack([pooled for pooled, _ in views], dim=1)
            if self.encoding.grid:
                tensors[names.VIEWS_GRID] = torch.stack([grid for _, grid in views], dim=1)
        return tensors

    def encode_clips(self, pixels: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
        """pixels: uint8 [B, T, 3, S, S]; one row of frames for each temporal patch of the teacher."""
        step = self.job.pair
        frames = pixels.shape[1]
        parts = []
        for first in range(0, frames, step):
            part = pixels[:, first : first + step]
            parts.append(self.forward(part[:, 0] if step == 1 else part, inside))
        rows = torch.stack([pooled for pooled, _ in parts], dim=1)
        tensors = {names.POOLED: rows.mean(dim=1), names.FRAMES: rows}
        if self.encoding.grid:
            tensors[names.GRID] = torch.stack([grid for _, grid in parts]).mean(dim=0)
        return tensors

    def forward(self, images: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """pooled float32 [B, D] and grid float32 [B, g, g, D] of uint8 [B, (frames,) 3, S, S]."""

        def encode(some: slice) -> tuple[Tensor, Tensor]:
            out = self.teacher.encode(images[some], inside=None if inside is None else inside[some])
            return out.pooled.float(), resample_grid(out.grid.float(), self.encoding.grid)

        parts = self.parts.run(len(images), encode)
        if len(parts) == 1:
            return parts[0]
        return torch.cat([pooled for pooled, _ in parts]), torch.cat([grid for _, grid in parts])


def resample_grid(grid: Tensor, side: int) -> Tensor:
    """A grid [B, h, w, D] as [B, g, g, D]: cells averaged by area when shrinking, bilinear when growing.

    side 0 means the grid is not stored: an empty tensor [B, 0, 0, D] keeps the device from copying it.
    """
    batch, h, w, width = grid.shape
    if side == 0:
        return grid.new_empty(batch, 0, 0, width)
    if (h, w) == (side, side):
        return grid
    maps = grid.permute(0, 3, 1, 2)
    if side <= min(h, w):
        maps = F.adaptive_avg_pool2d(maps, side)
    else:
        maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).contiguous()


def letterbox_coverage(size: tuple[int, int], image_size: int, h: int, w: int) -> FloatArray:
    """float32 [h, w]: the share of each cell that shows an image of `size` (width, height), not padding."""
    if min(size) < 1:
        return np.ones((h, w), np.float32)
    return cells_inside(resize_view("letterbox", size, image_size), h, w)
