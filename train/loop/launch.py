"""Several devices on this machine: one process each, started and stopped together.

`torchrun` and `accelerate launch` work as well; this is what `--device cuda:0,cuda:1` does by itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from console.cores import core_share
from console.stop import StopRequest

POLL_S = 0.05
#: After one rank failed, the others are waiting for it and get this long to notice.
FAILURE_GRACE_S = 5.0


def launch_ranks(arguments: Sequence[str], devices: Sequence[str]) -> int:
    """Run `python ARGUMENTS` once per device with torch.distributed's environment; returns the exit code.

    The first stop signal is passed on to every rank, which save and end by themselves. When one rank fails, the
    rest is ended; its exit code is the result.
    """
    first_failure = 0
    with StopRequest() as stop:
        ranks = start_ranks(arguments, devices)
        forwarded = False
        while any(rank.poll() is None for rank in ranks):
            if forwarded:
                time.sleep(POLL_S)
            elif stop.wait(POLL_S):
                forwarded = True
                signal_ranks(ranks, stop.signal_number)
            first_failure = first_failure or next((rank.returncode for rank in ranks if rank.poll()), 0)
            if first_failure:
                end_ranks(ranks)
    code = first_failure or next((rank.returncode for rank in ranks if rank.returncode), 0)
    # A rank that a signal ended reports it as a negative number; shells count 128 + signal.
    return 128 - code if code < 0 else code


def start_ranks(arguments: Sequence[str], devices: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    shared = {
        "WORLD_SIZE": str(len(devices)),
        "LOCAL_WORLD_SIZE": str(len(devices)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or rank_threads(shared)
    if devices[0].startswith("cuda"):
        shared["CUDA_VISIBLE_DEVICES"] = visible_devices(devices)
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(len(devices))
    ]


def rank_threads(shared: Mapping[str, str]) -> str:
    """Each rank's part of the cores, so that N ranks do not start N times as many threads as there are cores."""
    return str(core_share({**os.environ, **shared}))


def visible_devices(devices: Sequence[str]) -> str:
    """The physical devices in the order asked for: numbers count within what is visible already."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    known = [name for name in outer.split(",") if name]
    numbers = [int(device.partition(":")[2] or 0) for device in devices]
    return ",".join(known[number] if number < len(known) else str(number) for number in numbers)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def signal_ranks(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def end_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait a little for the others, then end them: they cannot go on alone."""
    deadline = time.monotonic() + FAILURE_GRACE_S
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_S)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
