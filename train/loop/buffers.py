"""Copies of many tensors in a few kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source into its target; one kernel for each kind of tensors instead of one for each tensor.

    `_foreach_copy_` does so only for lists of one device and dtype; batch norm's counters are integers.
    """
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault((target.dtype, target.device), ([], []))
        group[0].append(target)
        group[1].append(source.detach())
    for target_list, source_list in groups.values():
        torch._foreach_copy_(target_list, source_list)
