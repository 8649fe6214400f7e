"""An exponential moving average of the student's weights, evaluated and kept in its place."""

from __future__ import annotations

import copy

import torch

from train.loop.buffers import copy_all
from train.students.base import Student


class WeightAverage:
    """A second student whose weights follow the trained one. Buffers (batch-norm statistics) are copied.

    The decay grows with the steps, `min(decay, (1 + n) / (10 + n))`, so that short runs are averaged as well.
    """

    def __init__(self, student: Student, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.student: Student = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: Student) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [p.detach() for p in self.student.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in student.parameters()], 1 - decay)
        copy_all(self.student.buffers(), student.buffers())
