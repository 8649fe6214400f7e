"""Device and dtype by name, `auto` included."""

from __future__ import annotations

import torch

from console.devices import find_device
from console.log import get_logger
from extract.teachers.errors import TeacherError

log = get_logger("extract")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device named; `auto` is CUDA where there is one.

    Raises:
        TeacherError: for a CUDA device that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device(find_device(str(device), gpus, TeacherError))


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
