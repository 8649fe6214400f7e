"""Device, precision and determinism of a run."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from console.devices import find_device
from train.config import TrainConfig
from train.errors import TrainError
from train.ranks import leave_at_exit

MEMORY_ADVICE = (
    "out of memory: in this order, try half the --batch-size with twice the --grad-accum-steps (--auto-batch does "
    "that by itself), a smaller --image-size, a smaller student"
)


#: How messages of errors start that come from a device rather than from the program.
DEVICE_ERRORS = ("CUDA error", "NCCL error", "CUDA driver error", "cuDNN error")


class OutOfMemoryError(TrainError):
    """The device has too little memory for this configuration."""


def choose_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises TrainError when a GPU is asked for and absent."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device(find_device(name, gpus, TrainError))


def choose_precision(name: str, device: torch.device) -> str:
    """accelerate's name of the precision: auto is bf16 where the GPU has it, else fp16; fp32 on CPUs."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "no" if device.type != "cuda" else "bf16" if bf16 else "fp16"
    if name == "bf16" and not bf16:
        major, minor = torch.cuda.get_device_capability(device)
        raise TrainError(
            f"precision bf16: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, bfloat16 "
            "needs 8.0 or later: use fp16 or fp32"
        )
    if name == "fp16" and device.type != "cuda":
        raise TrainError(f"precision fp16 needs a CUDA GPU, the device is {device.type}: use bf16 or fp32")
    return "no" if name == "fp32" else name


def build_accelerator(config: TrainConfig) -> Accelerator:
    """An accelerator for this run alone; ranks come from torchrun's or accelerate's environment."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    name = config.devices[0]
    device = choose_device(name if ranks == 1 else name.partition(":")[0])
    # accelerate keeps one global state; a second run in this process may want another precision or device.
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda" and ranks == 1 and device.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if device.type == "cuda":
        # TF32 for float32 products: factors with 10 bits of mantissa, sums in float32, several times as fast.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    # On GPUs batch norm is synchronized: every rank has the same statistics already.
    buffers = DistributedDataParallelKwargs(broadcast_buffers=device.type != "cuda")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=choose_precision(config.precision, device),
        kwargs_handlers=[buffers],
    )
    if accelerator.device.type == "cuda" and accelerator.device.index is not None:
        # Streams and events that name no device belong to the current one.
        torch.cuda.set_device(accelerator.device)
    leave_at_exit()
    return accelerator


def set_determinism(enabled: bool) -> None:
    """Deterministic kernels only (an operation without one raises), or the fast ones."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The call imports torch's compiler, several seconds: it is made only where it changes something.
    if enabled != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(enabled)
    # Timing every kernel for every shape took 13 to 15 s at the start of each run (resnet18, 224 px, on an H100), more
    # than small data sets train for, and lets two runs of one seed differ. cuDNN's heuristics choose instead.
    torch.backends.cudnn.benchmark = False


def peak_memory() -> dict[str, Any]:
    """Peak resident memory of this process and of its GPU, MB; the GPU's is None without one."""
    gpu = round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None
    return {"peak_rss_mb": round(peak_resident_mb(), 1), "peak_gpu_mb": gpu}


def peak_resident_mb() -> float:
    """Peak resident memory of this process, MB."""
    # getrusage's peak includes that of the process that started this one; Linux's own record does not.
    status = Path("/proc/self/status")
    if status.exists() and (peak_kb := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak_kb[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def explain_device_error(error: BaseException) -> TrainError | None:
    """An error for the user where the device or one of its kernels is the cause; None for anything else."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "does not have a deterministic implementation" in first:
        name = first.split(" does not")[0]
        return TrainError(
            f"deterministic: {name} has no deterministic CUDA kernel: train without --deterministic, or choose another "
            "student"
        )
    kind = getattr(torch, "AcceleratorError", ())  # PyTorch 2.8 and later
    if not (isinstance(error, kind) or first.startswith(DEVICE_ERRORS)):
        return None
    return TrainError(
        f"the device failed ({first}): check it with nvidia-smi and dmesg, then continue from the last checkpoint with "
        "--resume"
    )


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    known = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
    return known or "out of memory" in text or "can't allocate memory" in text
