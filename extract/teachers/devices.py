"""How a teacher runs on its device: device and dtype by name, memory, torch.compile, attention kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from console.devices import find_device
from console.output import get_logger
from extract.teachers.base import TeacherError
from extract.teachers.checkpoint import one_line

log = get_logger("extract")

MOST_VERSIONS = 32  # compiled versions of one function
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device named; `auto` is CUDA where there is one.

    Raises:
        TeacherError: for a CUDA device that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device(find_device(str(device), gpus, TeacherError))


def memory_advice(device: object, image_size: int) -> str:
    """The error text for a device that has too little memory for one image."""
    return (
        f"out of memory on {device} with one image of {image_size} pixels: use a smaller --image-size, "
        "--dtype bfloat16 or a device with more memory"
    )


def device_error(error: RuntimeError, device: torch.device) -> TeacherError | None:
    """The message for an error that CUDA itself raised (a GPU that fell off the bus, a driver that failed); else None.

    Out of memory is none of them: it is handled by smaller batches.
    """
    text = " ".join(str(error).split())
    accelerator_error: type[RuntimeError] | None = getattr(torch, "AcceleratorError", None)  # torch 2.8
    raised_by_cuda = "CUDA error" in text or (
        accelerator_error is not None and isinstance(error, accelerator_error)
    )
    if device.type != "cuda" or isinstance(error, torch.OutOfMemoryError) or not raised_by_cuda:
        return None
    return TeacherError(
        f"{device} failed ({text[:160]}): check it with nvidia-smi, or use another --device; committed rows are kept, "
        "run the same command again"
    )


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the computation; `auto` is bfloat16 on CUDA devices that compute in it, float32 elsewhere.

    Raises:
        TeacherError: for float16, whose range ends at 65504 where some of Qwen's channels go on, for unknown names,
            and for bfloat16 on a GPU without it.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
        if device.type == "cuda" and name == "float32":
            log.warning("%s: computing in float32, which is several times slower", without_bfloat16(device))
    elif name == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
        raise TeacherError(
            f"--dtype bfloat16: {without_bfloat16(device)}; use --dtype float32 or another GPU"
        )
    if name not in DTYPES:
        reason = " (some activations exceed float16's range)" if name == "float16" else ""
        raise TeacherError(f"teacher dtype {name} is not possible{reason}: use {' or '.join(DTYPES)}")
    return DTYPES[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the GPU itself computes in bfloat16: compute capability 8.0 (Ampere) or newer."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def without_bfloat16(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor}) has no bfloat16"
    )


def check_memory(device: torch.device, needed_bytes: int, what: str) -> None:
    """Raises TeacherError when a GPU has not the memory that `what` needs, before anything is copied to it."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < needed_bytes:
        raise TeacherError(
            f"{device}: {what} needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} of {total / 1e9:.2f} GB are free: end "
            "other programs on this GPU (nvidia-smi lists them), or use another --device"
        )


# -- torch.compile for a tower's blocks, and which attention kernels a GPU tries first -------------------

#: Measured on an H100, milliseconds of one call over 65,536 tokens in windows of 64, 256 and 1,024 (16 heads of 80,
#: bfloat16): cuDNN 0.39, 0.33, 0.95; flash 0.46, 0.56, 1.54; memory-efficient 0.50, 0.90, 3.21.
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class CompiledBlocks:
    """The blocks of a tower, compiled one by one, in place.

    All blocks share their code, so it is compiled once per shape and kind of block (windows, whole image): seconds,
    where the whole tower as one graph takes minutes. Shapes are not made dynamic: an extraction has one.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        from torch._dynamo import config as dynamo

        self.errors = compiler_errors()
        self.blocks = list(blocks)
        # torch gives up after 8 versions of a function. A block has two for each batch size that out-of-memory halving
        # can reach: with windows, and over the whole image.
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VERSIONS)
        for block in self.blocks:
            # fullgraph: beyond the limit of shapes an error, and so our warning, where blocks would run slowly unseen
            block.compile(dynamic=False, fullgraph=True)

    def give_up(self, error: Exception) -> None:
        """Run the blocks as they are from now on."""
        for block in self.blocks:
            block._compiled_call_impl = None
        warn_of_compiler(error)


class CompiledModel:
    """A function from an image batch to the features of its layers, compiled as a whole for each shape it meets."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, list[Tensor]]]) -> None:
        self.errors = compiler_errors()
        self.function = torch.compile(function, dynamic=False)

    def __call__(self, values: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.function(values)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises when the compiler is missing or fails; being out of memory is none of them."""
    from torch._dynamo import exc  # a second of imports

    return (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)


def warn_of_compiler(error: Exception) -> None:
    log.warning(
        "torch.compile failed (%s: %s): the teacher runs without it, more slowly; --no-compile leaves it out",
        type(error).__name__,
        one_line(error)[:160],
    )
