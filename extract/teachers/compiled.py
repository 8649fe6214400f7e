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


MOST_VERSIONS = 32


class CompiledBlocks:
    """The blocks of a tower, compiled one by one, in place.

    All blocks share their code, so it is compiled once per shape and kind of block (windows, whole image): seconds,
    where the whole tower as one graph takes minutes. Shapes are not made dynamic: an extraction has one.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.errors = compiler_errors()
        self.blocks = list(blocks)
        allow_halving()
        for block in self.blocks:
            # fullgraph: beyond the limit of shapes an error, and so our warning, where blocks would run slowly unseen
            block.compile(dynamic=False, fullgraph=True)

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
    from torch._dynamo import exc  # a second of imports

    return (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)


def allow_halving() -> None:
    """Let all batch sizes that out-of-memory halving can reach be compiled: torch gives up after 8 versions of a function.

    A block has two versions for each size: with windows, and over the whole image.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_VERSIONS)


def warn_of_compiler(error: Exception) -> None:
    log.warning(
        "torch.compile failed (%s: %s): the teacher runs without it, more slowly; --no-compile leaves it out",
        type(error).__name__,
        one_line(error)[:160],
    )
