"""torch.compile for a tower's blocks, and which attention kernels a GPU tries first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from console.log import get_logger
from extract.teachers.checkpoint import one_line

log = get_logger("extract")

#: Measured on an H100, milliseconds of one call over 65,536 tokens in windows of 64, 256 and 1,024 (16 heads of 80,
#: bfloat16): cuDNN 0.39, 0.33, 0.95; flash 0.46, 0.56, 1.54; memory-efficient 0.50, 0.90, 3.21.
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def preferred_attention(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU, the fastest attention kernel first; elsewhere PyTorch's own choice."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(PREFERRED, set_priority=True)


class CompiledBlocks:
    """The blocks of a tower, compiled one by one, in place.

    All blocks share their code, so it is compiled once per shape and kind of block (windows, whole image): seconds,
    where the whole tower as one graph takes minutes. Shapes are not made dynamic: an extraction has one.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.errors = compiler_errors()
        self.blocks = list(blocks)
        for block in self.blocks:
            block.compile(dynamic=False)

    def give_up(self, error: Exception) -> None:
        """Run the blocks as they are from now on."""
        for block in self.blocks:
            block._compiled_call_impl = None
        warn_of_compiler(error)


class CompiledModel:
    """A function from an image batch to features, compiled as a whole for each shape it meets."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.errors = compiler_errors()
        self.function = torch.compile(function, dynamic=False)

    def __call__(self, values: Tensor) -> Tensor:
        return self.function(values)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises when the compiler is missing or fails; being out of memory is none of them."""
    from torch._dynamo.exc import TorchDynamoException  # a second of imports

    return (TorchDynamoException,)


def warn_of_compiler(error: Exception) -> None:
    log.warning(
        "torch.compile failed (%s: %s): the teacher runs without it, more slowly; --no-compile leaves it out",
        type(error).__name__,
        one_line(error)[:160],
    )
