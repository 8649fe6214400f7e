"""Tasks on a real dask cluster: scheduler and worker are processes of their own, and outlive the server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from processes.dask_cluster import ALLOCATOR_VARIABLE, dask_defaults
from tests.test_server.server_process import ServerProcess, wait_until
from tests.test_train.test_sweep_run import find_line, running, start_worker


@pytest.fixture
def scheduler() -> Iterator[str]:
    """The address of a scheduler on loopback; its workers come later."""
    arguments = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    with running("distributed.cli.dask_scheduler", *arguments) as process:
        yield find_line(process, r"(tcp://\S+)")


@pytest.mark.slow
def test_tasks_on_a_cluster(
    serve: Callable[..., ServerProcess], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOCATOR_VARIABLE, dask_defaults()[ALLOCATOR_VARIABLE])  # as dask's nannies do
    with pytest.raises(AssertionError, match=r"has no workers: start some with `dask worker"):
        serve("--scheduler", scheduler)
    with contextlib.ExitStack() as stack:
        start_worker(stack, scheduler, "--resources", "trial=1", "--no-nanny")
        server = serve("--scheduler", scheduler)
        long, second = server.run(totalEpochs=400), server.run()
        server.wait_log(long, "epoch")
        training = [
            child.environ()
            for child in psutil.process_iter(["cmdline"])
            if long in " ".join(child.info["cmdline"] or [])
        ]
        assert training
        assert all(ALLOCATOR_VARIABLE not in environment for environment in training)
        assert server.get(f"/tasks/{second}")["state"] == "QUEUED"  # the worker offers one slot
        server.end(signal.SIGKILL)
        server.start()
        epochs = len(server.get(f"/tasks/{long}/history"))
        wait_until(lambda: len(server.get(f"/tasks/{long}/history")) > epochs, 60)
        server.post(f"/tasks/{long}/stop")
        assert server.wait_final(long, 20)["state"] == "STOPPED"
        done = server.wait_final(second)
        assert (done["state"], done["exitCode"]) == ("COMPLETED", 0), server.log_of(second)
        assert [point["epoch"] for point in server.get(f"/tasks/{second}/history")] == [1, 2]
        server.close()
