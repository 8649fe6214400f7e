"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

#: Set by a sweep for its trials: how many processes share this machine's cores.
SHARE_VARIABLE = "QWEN_DISTILL_CPU_SHARE"
CGROUP = Path("/sys/fs/cgroup")


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
