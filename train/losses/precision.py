"""Losses compute in float32 even when the model runs in mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context that switches autocast off for the tensor's device; cast the operands with `.float()` inside.

    Without it, autocast would run matrix products (pairwise similarities) in bfloat16 or float16 again.
    """
    return torch.autocast(device_type=tensor.device.type, enabled=False)
