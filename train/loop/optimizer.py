"""The optimizer by name, and the exponential moving average of the weights that it produces."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from train.loop.saving import copy_all
from train.students.base import Student

SGD_MOMENTUM = 0.9


def build_optimizer(
    module: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw`, `adam` or `sgd` over the trainable parameters of `module`.

    `adam` adds the decay to the gradient; `adamw` takes it from the weight (Loshchilov and Hutter: "Decoupled Weight Decay
    Regularization", ICLR 2019).
    """
    groups = parameter_groups(module, weight_decay)
    # One fused kernel instead of a dozen passes over all parameters.
    fused = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"]
    )
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=SGD_MOMENTUM, fused=fused)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, lr=learning_rate, fused=fused)


@torch.no_grad()
def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give each state tensor the strides of its parameter, which fused kernels require.

    A checkpoint of a CPU run has contiguous states, convolutions on a GPU are channel-last.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with decay, and without.

    Excluded from decay: norms and biases, and the parameters that a model lists (timm's `no_weight_decay()`: position
    embeddings, class tokens).
    """
    listed: set[str] = set()
    for prefix, child in module.named_modules():
        names = getattr(child, "no_weight_decay", None)
        if callable(names):
            listed |= {f"{prefix}.{name}" if prefix else name for name in names()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            without = parameter.ndim < 2 or name.endswith(".bias") or name in listed
            (plain if without else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
