"""Which samples each step sees: a function of seed and epoch alone, so that any step can be found again.

A micro-batch is what one forward pass of all processes together sees; a step sums one or more of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Item(NamedTuple):
    """One sample for a worker. `weight` 0 marks padding, which makes the shares of all ranks equally large."""

    epoch: int
    row: int
    weight: float


def epoch_order(rows: Rows, seed: int, epoch: int) -> Rows:
    """`rows` in the random order of an epoch, the same in every process."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def micro_batches(count: int, batch_size: int) -> list[slice]:
    """Cut `count` samples into batches; the last one is smaller, but never a single sample (batch norm)."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def group_sizes(batches: int, grad_accum_steps: int) -> list[int]:
    """How many micro-batches each optimizer step of an epoch sums; the last step takes what is left."""
    full, rest = divmod(batches, grad_accum_steps)
    return [grad_accum_steps] * full + ([rest] if rest else [])


def rank_share(rows: Sequence[int] | Rows, rank: int, world: int) -> list[tuple[int, float]]:
    """This rank's (row, weight) of a micro-batch: equally many on each rank, padded with weight 0."""
    size = -(-len(rows) // world)
    own = [(int(row), 1.0) for row in rows[rank * size : (rank + 1) * size]]
    return own + [(int(rows[0]), 0.0)] * (size - len(own))


@dataclass
class EpochBatches:
    """The batch sampler of a loader; `start` is the first micro-batch that is wanted (resume)."""

    rows: Rows
    batch_size: int
    seed: int | None
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0
    slices: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        self.slices = micro_batches(len(self.rows), self.batch_size)

    def __len__(self) -> int:
        return len(self.slices) - self.start

    def __iter__(self) -> Iterator[list[Item]]:
        order = self.rows if self.seed is None else epoch_order(self.rows, self.seed, self.epoch)
        for part in self.slices[self.start :]:
            yield [
                Item(self.epoch, row, weight)
                for row, weight in rank_share(order[part], self.rank, self.world)
            ]
