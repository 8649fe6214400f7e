"""Several devices on this machine: one process (a rank of torch.distributed) for each, started and stopped together.

`torchrun` and `accelerate launch` work as well; this is what `--device cuda:0,cuda:1` does by itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from console.devices import core_share, device_index
from processes.stop import StopRequest

POLL_S = 0.05
#: A rank that is alone because another one failed waits for it forever: it gets this many seconds to notice.
FAILURE_GRACE_S = 5.0


@dataclass(frozen=True)
class RankExits:
    """Exit codes in the order of the ranks, as subprocess gives them; `first_failure` is 0 when none failed by itself."""

    codes: list[int]
    first_failure: int

    @property
    def exit_code(self) -> int:
        """One exit code for the whole: a signal counts 128 + its number, as in a shell."""
        code = self.first_failure or next((code for code in self.codes if code), 0)
        return 128 - code if code < 0 else code


def run_ranks(
    arguments: Sequence[str],
    devices: Sequence[str],
    stop: StopRequest,
    *,
    stdin: bytes | None = None,
    of_rank_zero: Mapping[str, str] | None = None,
    descriptors_of_rank_zero: Sequence[int] = (),
) -> RankExits:
    """Run `python ARGUMENTS` once per device with torch.distributed's environment, until all have ended.

    The first stop signal is passed on to every rank; they save and end by themselves. When one rank fails, the
    others are ended. `stdin` is what every rank reads; `of_rank_zero` are variables that rank 0 alone gets, together
    with the open file descriptors.
    """
    shared = shared_environment(devices)
    ranks = []
    try:
        for rank in range(len(devices)):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **((of_rank_zero or {}) if rank == 0 else {})}
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **shared, **own},
                stdin=None if stdin is None else subprocess.PIPE,
                pass_fds=descriptors_of_rank_zero if rank == 0 else (),
            )
            ranks.append(process)
            if stdin is not None and process.stdin is not None:
                process.stdin.write(stdin)
                process.stdin.close()
        first_failure = wait_for(ranks, stop)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return RankExits([process.returncode for process in ranks], first_failure)


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> int:
    """Wait until all have ended, or one has failed and the others had time to notice; the first failure's exit code."""
    forwarded = False
    first_failure, failed_at = 0, 0.0
    while None in [process.poll() for process in ranks]:  # a list, so that every one is polled
        if stop.requested and not forwarded:
            forwarded = True
            for process in ranks:
                process.send_signal(stop.signal_number)
        if not first_failure:
            first_failure = next((process.returncode for process in ranks if process.returncode), 0)
            failed_at = time.monotonic()
        elif time.monotonic() - failed_at > FAILURE_GRACE_S:
            break
        if forwarded:
            time.sleep(POLL_S)
        else:
            stop.wait(POLL_S)
    return first_failure or next((process.returncode for process in ranks if process.returncode), 0)


def shared_environment(devices: Sequence[str]) -> dict[str, str]:
    """What all ranks have in common: where they meet, which GPUs they see, and their share of the cores."""
    count = str(len(devices))
    threads = core_share({**os.environ, "LOCAL_WORLD_SIZE": count})
    return {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # So that N ranks do not start N times as many threads as there are cores.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        **({"CUDA_VISIBLE_DEVICES": visible_devices(devices)} if devices[0].startswith("cuda") else {}),
    }


def visible_devices(devices: Sequence[str]) -> str:
    """The physical devices in the order asked for: numbers count within what is visible already."""
    known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    numbers = [device_index(device) for device in devices]
    return ",".join(known[number] if number < len(known) else str(number) for number in numbers)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
