"""What this process may compute on: devices by name (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, lists of them) and CPU cores.

No torch here: the caller counts GPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

KINDS = ("auto", "cpu", "cuda")
#: Set by a sweep for its trials: how many processes share this machine's cores.
SHARE_VARIABLE = "QWEN_DISTILL_CPU_SHARE"
CGROUP = Path("/sys/fs/cgroup")


def parse_devices(text: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """The devices of a list such as `cuda:0,cuda:1`; a bare number is that of a CUDA device: `0,1`.

    Raises:
        ValueError: when one is of none of the `kinds`.
    """
    names = [name.strip().lower() for name in text.split(",")]
    names = [f"cuda:{name}" if name.isascii() and name.isdigit() else name for name in names]
    for name in names:
        kind, _, index = name.partition(":")
        if kind not in kinds or (index and not (index.isascii() and index.isdigit())):
            raise ValueError("must be auto, cpu, cuda, or a list like cuda:0,cuda:1")
    return names


def device_index(name: str) -> int:
    """The number of a CUDA device; `cuda` is the first."""
    return int(name.partition(":")[2] or 0)


def find_device(name: str, gpus: int, error: type[Exception]) -> str:
    """The device of that name on a machine with so many CUDA devices; `auto` is the first GPU, else the CPU.

    Raises:
        error: the caller's own kind, for a name that is none, or a CUDA device that is not there.
    """
    if name == "auto":
        return "cuda" if gpus else "cpu"
    try:
        (device,) = parse_devices(name, (*KINDS, "mps"))
    except ValueError:
        raise error(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.startswith("cuda") and device_index(device) >= gpus:
        raise error(
            f"device {name} is not there: this machine shows {gpus} CUDA devices to PyTorch: use --device cpu, or check "
            "the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
    return device


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process is allowed to run on: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))


def core_share(environment: Mapping[str, str] = os.environ, cores: int | None = None) -> int:
    """This process's part of the cores, at least 1.

    Ranks of one host (torchrun's LOCAL_WORLD_SIZE) and trials of a sweep that run at once share them equally.
    """
    shares = 1
    for name in (SHARE_VARIABLE, "LOCAL_WORLD_SIZE"):
        value = environment.get(name, "")
        shares *= int(value) if value.isdigit() and int(value) > 0 else 1
    return max(1, (available_cores() if cores is None else cores) // shares)
