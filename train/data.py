"""Batches for the loop: workers decode and augment images, the training process gathers stored features by row.

`B` samples of this process, `S` the student's image size.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imaging.geometry import View
from store.errors import DistillError
from store.format import LABEL, VIEWS_GEOMETRY
from train.images import ImageReader
from train.plan import EpochBatches, Item
from train.views import (
    Augmentation,
    base_view,
    draw_colour,
    draw_view,
    render_image,
    render_mask,
    sample_generator,
)


@dataclass
class Batch:
    """One micro-batch's share of one process.

    `rows` int64 [B]; `images` uint8 [B, S, S, 3] (clips [B, T, S, S, 3] with `lengths` int64 [B]);
    `views` float64 [B, 2, 3] into the source image; `recorded` int64 [B], the recorded view shown, else None;
    `weight` float32 [B], 0 for padding; `labels` int64 [B]; `masks` int64 [B, S, S];
    `features`: stored values by array name.
    """

    rows: NDArray[np.int64]
    images: Tensor
    views: NDArray[np.float64]
    weight: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    lengths: Tensor | None = None
    recorded: NDArray[np.int64] | None = None
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        for name in ("images", "weight", "labels", "masks"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=True))
        self.features = {name: value.to(device, non_blocking=True) for name, value in self.features.items()}
        return self


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How a data set shows its images: side in pixels, resize policy, augmentation, seed."""

    image_size: int
    policy: str
    augmentation: Augmentation
    seed: int
    masks: bool = False
    recorded_views: int = 0


class Views(Dataset[Any], ABC):
    """Items of a plan → decoded, augmented samples. A function of (seed, epoch, key) only.

    An error for the user comes back as a sample: a worker process would bury its text in a traceback.
    """

    def __getitem__(self, item: Item) -> dict[str, Any] | DistillError:
        try:
            return self.show(item)
        except DistillError as error:
            return error

    @abstractmethod
    def show(self, item: Item) -> dict[str, Any]:
        """The sample of an item. Raises DataError naming its key."""


class ImageViews(Views):
    """Images of one split."""

    def __init__(self, reader: ImageReader, settings: ViewSettings) -> None:
        self.reader, self.settings = reader, settings

    def show(self, item: Item) -> dict[str, Any]:
        settings, reader = self.settings, self.reader
        shown = reader.read(item.row, decode_size(settings))
        generator = sample_generator(settings.seed, item.epoch, reader.key(item.row))
        base = base_view(settings.policy, shown.size, settings.image_size)
        recorded = -1
        if settings.recorded_views:
            recorded = int(generator.integers(settings.recorded_views))
            view = self.recorded_view(item.row, recorded)
        else:
            view = draw_view(settings.augmentation, generator, base)
        colour = draw_colour(settings.augmentation, generator)
        pixels = render_image(shown.image, shown.into_image(view), settings.image_size, colour)
        sample = {
            "row": item.row,
            "weight": item.weight,
            "image": pixels,
            "view": view.matrix,
            "recorded": recorded,
        }
        if settings.masks:
            sample["mask"] = render_mask(reader.read_mask(item.row), view, settings.image_size)
        return sample

    def recorded_view(self, row: int, index: int) -> View:
        return View(self.reader.split.gather(np.array([row]), [VIEWS_GEOMETRY])[VIEWS_GEOMETRY][0][index])


def decode_size(settings: ViewSettings) -> int:
    """Pixels a side that a decoded JPEG keeps at least, so that the smallest crop is not magnified."""
    scale = settings.augmentation.crop_scale[0] if not settings.recorded_views else 0.35
    return int(np.ceil(settings.image_size / np.sqrt(scale)))


@dataclass(frozen=True)
class Collate:
    """Joins samples by `join`, unless one of them is an error: then the error is the batch."""

    join: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]

    def __call__(self, samples: Sequence[dict[str, Any] | DistillError]) -> dict[str, Tensor] | DistillError:
        good = [sample for sample in samples if isinstance(sample, dict)]
        if len(good) == len(samples):
            return self.join(good)
        return next(sample for sample in samples if isinstance(sample, DistillError))


def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack samples into tensors; features join later, in the training process."""
    batch = {
        "rows": torch.tensor([sample["row"] for sample in samples], dtype=torch.int64),
        "weight": torch.tensor([sample["weight"] for sample in samples], dtype=torch.float32),
        "recorded": torch.tensor([sample["recorded"] for sample in samples], dtype=torch.int64),
        "views": torch.from_numpy(np.stack([sample["view"] for sample in samples])),
        "images": torch.from_numpy(np.stack([sample["image"] for sample in samples])),
    }
    if "mask" in samples[0]:
        batch["masks"] = torch.from_numpy(np.stack([sample["mask"] for sample in samples]))
    return batch


class FeatureGatherer:
    """Gathers stored arrays by row into buffers that are used again and again.

    `depth` is how many batches are in use at once (the micro-batches of one step). For a GPU the buffers are pinned
    and the copy starts at once; the loop runs ahead of the GPU, so a buffer is filled again only after its copy.
    """

    def __init__(self, split: Any, names: Sequence[str], depth: int, device: torch.device) -> None:
        self.split, self.names, self.device = split, list(names), device
        self.buffers: list[dict[str, Tensor]] = [{} for _ in range(depth)]
        self.copied: list[torch.cuda.Event | None] = [None] * depth
        self.turn = 0

    def gather(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Stored values of `rows` [B] by array name (true ones of packed arrays); valid until `depth` more gathers."""
        if not self.names:
            return {}
        turn, self.turn = self.turn, (self.turn + 1) % len(self.buffers)
        buffers, copied = self.buffers[turn], self.copied[turn]
        if copied is not None:
            copied.synchronize()
        self.make_room(buffers, len(rows))
        out = {name: buffer[: len(rows)].numpy() for name, buffer in buffers.items()}
        gathered = self.split.gather_features(rows, self.names, out=out if out else None)
        if not buffers:
            self.adopt(buffers, gathered)
        values = {name: torch.from_numpy(gathered[name]) for name in self.names}
        return self.copy_to_gpu(values, turn) if self.device.type == "cuda" else values

    def copy_to_gpu(self, values: dict[str, Tensor], turn: int) -> dict[str, Tensor]:
        """Start the copies, and note when they are done."""
        moved = {name: value.to(self.device, non_blocking=True) for name, value in values.items()}
        self.copied[turn] = event = torch.cuda.Event()
        event.record()
        return moved

    def make_room(self, buffers: dict[str, Tensor], count: int) -> None:
        """A larger batch than before gets new buffers."""
        if buffers and len(next(iter(buffers.values()))) < count:
            buffers.clear()

    def adopt(self, buffers: dict[str, Tensor], gathered: dict[str, NDArray[Any]]) -> None:
        """The first gather tells shapes and dtypes."""
        for name in self.names:
            value = torch.from_numpy(gathered[name])
            buffers[name] = torch.empty_like(value, pin_memory=self.device.type == "cuda")


class BatchLoader:
    """Iterates over an epoch's micro-batches, from any position."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: EpochBatches,
        gatherer: FeatureGatherer,
        labels: NDArray[np.int32] | None,
        workers: int,
        collate: Any = collate_views,
        gather_more: Callable[[NDArray[np.int64], Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self.batches, self.gatherer, self.labels = batches, gatherer, labels
        self.gather_more = gather_more
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=Collate(collate),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=start_worker,
            # Its own generator: the loader must not draw from the one that drives dropout.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of `epoch` from number `start` on."""
        self.batches.epoch, self.batches.start = epoch, start
        for decoded in self.loader:
            if isinstance(decoded, DistillError):
                raise decoded
            yield self.join(decoded)

    def close(self) -> None:
        """End the worker processes."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def join(self, decoded: dict[str, Tensor]) -> Batch:
        """Add labels and stored features to decoded images, by row."""
        rows = decoded["rows"].numpy()
        recorded = decoded["recorded"].numpy()
        features = self.gatherer.gather(rows)
        if self.gather_more is not None:
            features |= self.gather_more(rows, decoded["lengths"])
        return Batch(
            rows=rows,
            images=decoded["images"],
            views=decoded["views"].numpy(),
            weight=decoded["weight"],
            labels=None if self.labels is None else torch.from_numpy(self.labels[rows].astype(np.int64)),
            masks=decoded["masks"].long() if "masks" in decoded else None,
            lengths=decoded.get("lengths"),
            recorded=recorded if (recorded >= 0).all() else None,
            features=features,
        )


def start_worker(worker: int) -> None:
    """Signals reach the whole process group: workers leave them to the training process, which ends them.

    After SIGTERM a worker goes on for five seconds, in which the training process saves and ends; by itself it
    then ends too, so that nothing has to wait for it.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(5))


def default_workers(device: torch.device) -> int:
    """Worker processes: a GPU wants all cores for decoding, on the CPU half of them must be left to the student."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores) if device.type == "cuda" else min(4, cores // 2)


def labels_of(split: Any) -> NDArray[np.int32] | None:
    """Labels int32 [N] (-1: none), or None when the split has none at all."""
    if LABEL not in split.names:
        return None
    labels: NDArray[np.int32] = split.read(LABEL)
    return labels if (labels >= 0).any() else None
