"""Devices by name: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, and lists of them. No torch here: the caller counts GPUs."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = ("auto", "cpu", "cuda")


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
