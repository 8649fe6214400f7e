"""Batches for the loop: which samples a step sees, decoded by workers, with the stored features of their rows.

`B` samples of this process, `S` the student's image size. A micro-batch is what one forward pass of all processes
together sees; a step sums one or more of them.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from console.devices import core_share
from imaging.geometry import flips_horizontally
from store.errors import DistillError
from store.format import view_array
from store.reader import Split
from train.data.prefetch import CopyStream, Prefetcher

Rows = NDArray[np.int64]


class Item(NamedTuple):
    """One sample for a worker. `weight` 0 marks padding, which makes the shares of all ranks equally large.

    `showing` is how often the row was shown before: it draws another view each time.
    """

    showing: int
    row: int
    weight: float


def micro_batches(count: int, batch_size: int) -> list[slice]:
    """Cut `count` samples into batches; the last one is smaller, but never a single sample (batch norm)."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def rank_share(rows: Rows, showings: Rows, rank: int, world: int) -> list[Item]:
    """This rank's items of a micro-batch: equally many on each rank, padded with weight 0."""
    size = -(-len(rows) // world)
    part = slice(rank * size, (rank + 1) * size)
    own = [Item(int(n), int(row), 1.0) for n, row in zip(showings[part], rows[part], strict=True)]
    return own + [Item(int(showings[0]), int(rows[0]), 0.0)] * (size - len(own))


def draw_rows(rows: Rows, seed: Sequence[int], start: int, count: int) -> tuple[Rows, Rows]:
    """`count` rows from position `start` of an endless row of permutations of `rows`, and which permutation each is from.

    So all rows are shown equally often over several epochs, and any epoch can be drawn on its own (resume).
    """
    numbers = np.arange(start, start + count)
    showings, places = np.divmod(numbers, len(rows))
    drawn = np.empty(count, np.int64)
    for showing in np.unique(showings):
        chosen = showings == showing
        drawn[chosen] = np.random.default_rng([*seed, int(showing)]).permutation(rows)[places[chosen]]
    return drawn, showings


@dataclass(frozen=True)
class Balance:
    """`share` of each batch is drawn from the `labeled` rows, the rest from the `unlabeled` ones."""

    labeled: Rows
    unlabeled: Rows
    share: float

    def count(self, size: int) -> int:
        """Labeled samples of a batch of `size`: at least one."""
        return min(size, max(1, round(self.share * size))) if len(self.unlabeled) else size


@dataclass
class EpochBatches:
    """The batch sampler of a loader; `start` is the first micro-batch that is wanted (resume).

    In the first epoch of a remote store, `shard_rows` above 0, shard after shard is shown, in random order and mixed
    within each: training starts with the first shard, while others are downloaded.
    An epoch has as many samples as there are `rows`. With a `balance` they are not each row once: labeled rows
    are repeated (or, where `share` is less than theirs, spread over several epochs), the others spread over several epochs.
    """

    rows: Rows
    batch_size: int
    seed: int | None
    rank: int = 0
    world: int = 1
    balance: Balance | None = None
    shard_rows: int = 0
    epoch: int = 0
    start: int = 0
    slices: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        self.slices = micro_batches(len(self.rows), self.batch_size)

    def __len__(self) -> int:
        return len(self.slices) - self.start

    def __iter__(self) -> Iterator[list[Item]]:
        order, showings = self.order()
        for part in self.slices[self.start :]:
            yield rank_share(order[part], showings[part], self.rank, self.world)

    def order(self) -> tuple[Rows, Rows]:
        """The epoch's rows in their order, the same in every process, and the number of each row's showing."""
        showings = np.full(len(self.rows), self.epoch)
        if self.seed is None:
            return self.rows, showings
        if self.balance is None:
            generator = np.random.default_rng([self.seed, self.epoch])
            mixed = generator.permutation(self.rows)
            if self.shard_rows and self.epoch == 0:
                shards = mixed // self.shard_rows
                places = generator.permutation(int(shards.max()) + 1)
                mixed = mixed[np.argsort(places[shards], kind="stable")]
            return mixed, showings
        balance, order = self.balance, np.empty(len(self.rows), np.int64)
        labeled = np.zeros(len(order), bool)
        for index, part in enumerate(self.slices):
            size = part.stop - part.start
            # Mixed within the batch: its parts go to different ranks.
            mixed = np.random.default_rng([self.seed, self.epoch, index]).permutation(size)
            labeled[part] = mixed < balance.count(size)
        for number, (rows, chosen) in enumerate(((balance.labeled, labeled), (balance.unlabeled, ~labeled))):
            if count := int(chosen.sum()):
                order[chosen], showings[chosen] = draw_rows(
                    rows, (self.seed, number), self.epoch * count, count
                )
        return order, showings


@dataclass
class Batch:
    """One micro-batch's share of one process.

    `rows` int64 [B]; `images` uint8 [B, S, S, 3] (clips [B, T, S, S, 3] with `lengths` int64 [B]);
    `views` float64 [B, 2, 3] into the source image; `recorded` int64 [B], the recorded view shown, else None;
    `flipped` bool [B], the samples whose features are those of the mirror image, None where the store has none of it;
    `weight` float32 [B], 0 for padding; `labels` int64 [B]; `masks` uint8 [B, S, S], 255 ignored;
    `features`: stored values by array name, of recorded views the one shown; `transport`: how stored grids are
    carried to the student's cells, by name (see `train.distill.transport.TransportWeights`); `samples`: Σ weight, known on the
    host, so that nothing has to read it from a device. `rows`, `views`, `recorded`, `flipped` and `lengths` stay on the host.
    """

    rows: NDArray[np.int64]
    images: Tensor
    views: NDArray[np.float64]
    weight: Tensor
    samples: float
    labels: Tensor | None = None
    masks: Tensor | None = None
    lengths: Tensor | None = None
    recorded: NDArray[np.int64] | None = None
    flipped: NDArray[np.bool_] | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    transport: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """What belongs on the device, by (field, name in it)."""
        plain = {(name, ""): getattr(self, name) for name in ("images", "weight", "labels", "masks")}
        named = {
            (name, key): value
            for name in ("features", "transport")
            for key, value in getattr(self, name).items()
        }
        return {name: value for name, value in (plain | named).items() if value is not None}

    def with_tensors(self, tensors: Mapping[tuple[str, str], Tensor]) -> Batch:
        """A batch with these in the place of its `tensors()`."""
        changed: dict[str, Any] = {"features": {}, "transport": {}}
        for (name, key), value in tensors.items():
            if key:
                changed[name][key] = value
            else:
                changed[name] = value
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return self.with_tensors(
            {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        )


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


#: What the names of arrays that hold K recorded views a sample begin with.
VIEWS = "views/"


class FeatureGatherer:
    """Gathers stored arrays by row into buffers that are used in turn.

    `depth` is how many batches are in use at once: the micro-batches of one step, or those that are being copied to
    a GPU, for which the buffers are pinned. `exact_flip`: the store has the features of the mirror images too, which
    flipped samples get.
    """

    def __init__(
        self,
        split: Split,
        names: Sequence[str],
        depth: int,
        device: torch.device,
        *,
        exact_flip: bool = False,
    ) -> None:
        self.split, self.names, self.device, self.depth = split, list(names), device, depth
        self.exact_flip = exact_flip
        self.buffers: deque[dict[str, Tensor]] = deque({} for _ in range(depth))

    def gather(
        self,
        rows: NDArray[np.int64],
        recorded: NDArray[np.int64] | None = None,
        flipped: NDArray[np.bool_] | None = None,
    ) -> dict[str, Tensor]:
        """Stored values of `rows` [B] by array name (true ones of packed arrays); valid until `depth` more gathers.

        `recorded` int64 [B]: of arrays that hold K recorded views a sample, the one to take. It is chosen here, on
        the host: all K would be copied to the device for one that is used. `flipped` bool [B]: where true, the values
        are those of the mirror image, in the same units.
        """
        if not self.names:
            return {}
        buffers = self.buffers[0]
        self.buffers.rotate(-1)
        if buffers and len(buffers[self.names[0]]) < len(rows):
            buffers.clear()
        # A tensor's numpy() shares its memory, but does not know that it is pinned: give out the tensor itself.
        values = {name: buffer[: len(rows)] for name, buffer in buffers.items()}
        out = {name: value.numpy() for name, value in values.items()} or None
        mirrored = np.flatnonzero(flipped) if flipped is not None else rows[:0]
        # Rows that are replaced below are not read: the first row takes their place.
        read = rows if flipped is None else np.where(flipped, rows[0], rows)
        gathered = self.split.gather_features(read, self.names, out=out)
        for name in self.names if len(mirrored) else ():
            if (view := view_array(name)) != name:  # class logits and maps have no mirror image of their own
                gathered[name][mirrored] = self.mirror_values(rows[mirrored], name, view)
        if not buffers:  # the first gather shows shapes and dtypes
            values = {name: torch.from_numpy(gathered[name]) for name in self.names}
            pinned = self.device.type == "cuda"
            buffers |= {name: torch.empty_like(value, pin_memory=pinned) for name, value in values.items()}
        if recorded is None:
            return values
        chosen = (torch.arange(len(rows)), torch.from_numpy(recorded))
        return {name: value[chosen] if name.startswith(VIEWS) else value for name, value in values.items()}

    def mirror_values(self, rows: NDArray[np.int64], name: str, view: str) -> NDArray[Any]:
        """The values [b, ...] of array `view`, of the rows' mirror images, at the scale of array `name`."""
        values: NDArray[Any] = self.split.gather_features(rows, [view])[view][:, 0]
        scale = self.split.scale
        if name not in scale or np.array_equal(scale[name], scale[view]):
            return values
        # Each array's powers of two were chosen on its own values. Nearly all products are exact.
        largest = np.finfo(values.dtype).max
        rescaled = values.astype(np.float32) * (scale[view] / scale[name])
        return rescaled.clip(-largest, largest).astype(values.dtype)


class SeveralGatherers:
    """Gathers the features of several teachers, each under names with its own prefix."""

    def __init__(self, gatherers: Mapping[str, FeatureGatherer]) -> None:
        self.gatherers = dict(gatherers)
        first = next(iter(self.gatherers.values()))
        self.device, self.depth, self.exact_flip = first.device, first.depth, first.exact_flip

    def gather(
        self,
        rows: NDArray[np.int64],
        recorded: NDArray[np.int64] | None = None,
        flipped: NDArray[np.bool_] | None = None,
    ) -> dict[str, Tensor]:
        """As `FeatureGatherer.gather`."""
        return {
            f"{prefix}{name}": values
            for prefix, gatherer in self.gatherers.items()
            for name, values in gatherer.gather(rows, recorded, flipped).items()
        }


class BatchLoader:
    """Iterates over an epoch's micro-batches, from any position."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: EpochBatches,
        gatherer: FeatureGatherer | SeveralGatherers,
        labels: NDArray[np.int32] | None,
        workers: int,
        collate: Any = collate_views,
        gather_more: Callable[[NDArray[np.int64], Tensor], dict[str, Tensor]] | None = None,
        carry: Callable[[Batch], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.batches, self.gatherer, self.labels = batches, gatherer, labels
        self.gather_more, self.carry = gather_more, carry
        self.prefetcher: Prefetcher | None = None
        self.engine: CopyStream | None = None
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
        """The micro-batches of `epoch` from number `start` on, on the loader's device.

        One epoch at a time: an earlier one that is not finished ends here.
        """
        self.stop_prefetching()
        self.batches.epoch, self.batches.start = epoch, start
        # Workers start here, in the main thread: a process must not fork from one that copies to a GPU.
        host, device = self.joined(iter(self.loader)), self.gatherer.device
        if device.type == "cpu":
            return host
        if device.type != "cuda":
            return (batch.to(device) for batch in host)
        if self.engine is None:
            self.engine = CopyStream(device, self.gatherer.depth)
        self.prefetcher = Prefetcher(host, self.engine, self.gatherer.depth)
        return iter(self.prefetcher)

    def joined(self, decoded: Iterator[dict[str, Tensor] | DistillError]) -> Iterator[Batch]:
        """Decoded images with the labels and stored features of their rows, on the host. Raises workers' errors."""
        for sample in decoded:
            if isinstance(sample, DistillError):
                raise sample
            rows, recorded = sample["rows"].numpy(), sample["recorded"].numpy()
            shown = recorded if (recorded >= 0).all() else None
            views = sample["views"].numpy()
            flipped = flips_horizontally(views) if self.gatherer.exact_flip else None
            features = self.gatherer.gather(rows, shown, flipped)
            if self.gather_more is not None:
                features |= self.gather_more(rows, sample["lengths"])
            batch = Batch(
                rows=rows,
                images=sample["images"],
                views=views,
                weight=sample["weight"],
                samples=float(sample["weight"].sum()),
                labels=None if self.labels is None else torch.from_numpy(self.labels[rows].astype(np.int64)),
                masks=sample.get("masks"),
                lengths=sample.get("lengths"),
                recorded=shown,
                flipped=flipped,
                features=features,
            )
            if self.carry is not None:
                batch.transport = self.carry(batch)
            yield batch

    def stop_prefetching(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
            self.prefetcher = None

    def close(self) -> None:
        """End the prefetch thread and the worker processes."""
        self.stop_prefetching()
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None


def start_worker(worker: int) -> None:
    """Signals reach the whole process group: workers ignore them, and the training process ends its workers.

    After SIGTERM a worker continues for five seconds, in which the training process saves and ends; then it ends
    without being asked, so that nothing has to wait for it.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(5))


def default_workers(device: torch.device) -> int:
    """Worker processes of this process's share of the cores.

    With a GPU nearly all of them decode: two are left for the loop and its prefetch thread. On a CPU half of them are
    left for the student.
    """
    cores = core_share()
    return max(1, min(16, cores - 2)) if device.type == "cuda" else min(4, cores // 2)
