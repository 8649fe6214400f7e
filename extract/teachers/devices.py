"""Device and dtype by name, `auto` included."""

from __future__ import annotations

import torch

from extract.teachers.errors import TeacherError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device named; `auto` is CUDA where there is one.

    Raises:
        TeacherError: for a CUDA device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise TeacherError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise TeacherError(
            f"device {device} is not there: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return picked


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the computation; `auto` is bfloat16 on CUDA, float32 elsewhere.

    Raises:
        TeacherError: for float16, whose range ends at 65504 where some of Qwen's channels go on, and unknown names.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        reason = " (some activations exceed float16's range)" if name == "float16" else ""
        raise TeacherError(f"teacher dtype {name} is not possible{reason}: use {' or '.join(DTYPES)}")
    return DTYPES[name]
