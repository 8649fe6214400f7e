"""Communication between ranks; with one process, every function is the identity."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, without gradient."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def add_counts(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Counts of one step by name: the sum over its micro-batches and over all ranks, in one exchange."""
    names = sorted(parts[0])
    if not names:
        return {}
    local = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).sum(0)
    return dict(zip(names, sum_over_ranks(local).unbind(), strict=True))


def leave_at_exit() -> None:
    """Leave the group of ranks when this process ends: NCCL warns about a process that just disappears."""
    atexit.unregister(leave)  # several trainings in one process: once is enough
    atexit.register(leave)


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


class GatherRows(torch.autograd.Function):
    """[B, …] of each rank → [world · B, …] everywhere; the gradient of a row is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        ctx.own = slice(rank() * len(rows), (rank() + 1) * len(rows))
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks (equally many on each), with gradients flowing back to their owners."""
    return GatherRows.apply(rows) if world_size() > 1 else rows  # type: ignore[no-any-return,no-untyped-call]


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks, with gradient: each rank's input has contributed to every rank's output."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


def differentiable_sum(values: Tensor) -> Tensor:
    """Like `sum_over_ranks`, for statistics that a loss is computed from (Dice)."""
    return SumOverRanks.apply(values) if world_size() > 1 else values  # type: ignore[no-any-return,no-untyped-call]
