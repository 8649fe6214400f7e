"""The module that trains: the student with its alignment head, so that one wrapper (DDP) sees both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.data.transfer import to_device
from train.distill.projector import channels_last_rows, pooled_rows
from train.students.base import Student, StudentOutput


class DistilledOutput(NamedTuple):
    """One forward pass: task `logits`, and aligned features where they are asked for.

    `cells` [B, h, w, D] or [B, T, D], `pooled` [B, D], both in the teacher's space.
    """

    logits: Tensor | None
    cells: Tensor | None
    pooled: Tensor | None


class DistilledStudent(nn.Module):
    """Student → alignment head. `projector` None: the task alone (a control, or evaluation)."""

    def __init__(self, student: Student, projector: nn.Module | None, *, cells: bool, pooled: bool) -> None:
        super().__init__()
        self.student, self.projector = student, projector
        self.wants_cells, self.wants_pooled = cells, pooled
        # In a list, and so out of the module tree: compiling must not change the names in state dicts.
        self.compiled: list[Callable[..., StudentOutput]] = []
        self.compiled_batch = 0

    def compile_student(self, batch_size: int) -> None:
        """From now on run batches of `batch_size` through torch.compile.

        Others, the short last one of an epoch, run as they are: each size would be compiled again, and a graph of
        dynamic size is slower for all.
        """
        self.compiled, self.compiled_batch = [torch.compile(self.student, dynamic=False)], batch_size

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> DistilledOutput:
        """`images` float [B, 3, S, S], clips [B, T, 3, S, S] with `lengths` int64 [B]."""
        compiled = self.compiled and len(images) == self.compiled_batch
        run = self.compiled[0] if compiled else self.student
        logits, features = run(images) if lengths is None else run(images, lengths)
        if self.projector is None:
            return DistilledOutput(logits, None, None)
        mask = None if lengths is None or features.ndim != 3 else frame_mask(lengths, features)
        if not self.wants_cells:
            # Pooling first costs h·w times less, and commutes with a linear head.
            return DistilledOutput(logits, None, self.projector(pooled_rows(features, mask)))
        cells = self.projector(channels_last_rows(features))
        pooled = pool_cells(cells, mask) if self.wants_pooled else None
        return DistilledOutput(logits, cells, pooled)


def pool_cells(cells: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over h and w [B, h, w, D], or over the valid frames [B, T, D]; [B, D]."""
    return cells.mean((1, 2)) if cells.ndim == 4 else pooled_rows(cells, mask)


def frame_mask(lengths: Tensor, features: Tensor) -> Tensor:
    """Bool [B, T] on the device of `features`, true where a frame is real."""
    mask = torch.arange(features.shape[1], device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)
    return to_device(mask, features.device)
