"""Losses compute in float32 even when the model runs in mixed precision."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context that switches autocast off for the tensor's device; cast the operands with `.float()` inside.

    Without it, autocast would run matrix products (pairwise similarities) in bfloat16 or float16 again.
    """
    kind = tensor.device.type
    # The meta device, which the tests use to find host syncs, has no autocast.
    return (
        torch.autocast(kind, enabled=False)
        if torch.amp.is_autocast_available(kind)
        else contextlib.nullcontext()
    )
