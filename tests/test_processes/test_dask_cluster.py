"""Local clusters of real worker processes."""

from __future__ import annotations

import contextlib
import os

import pytest

from processes.dask_cluster import WORKER_ENVIRONMENT, ClusterStartError, connect, local_cluster


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")  # 8787 in use
def test_local_workers_listen_on_this_machine_only_and_have_their_environment() -> None:
    workers = [{"env": {"MINE": str(index)}, "resources": {"trial": 1}} for index in range(2)]
    with local_cluster(workers, contextlib.nullcontext()) as client:
        client.wait_for_workers(2)
        addresses = client.scheduler_info(n_workers=-1)["workers"]
        assert {address.rpartition(":")[0] for address in addresses} == {"tcp://127.0.0.1"}
        assert client.scheduler.address.startswith("tcp://127.0.0.1:")
        assert sorted(client.run(os.getenv, "MINE").values()) == ["0", "1"]


def test_the_environment_of_workers_does_not_stay_in_this_process() -> None:
    """A `dask scheduler` that is started later would not print its address."""
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    with local_cluster([{}], contextlib.nullcontext()):
        assert os.environ["DASK_LOGGING__DISTRIBUTED"] == "error"
    assert {name: os.environ.get(name) for name in WORKER_ENVIRONMENT} == before


def test_a_scheduler_that_does_not_answer_is_one_line() -> None:
    with (
        pytest.raises(ClusterStartError, match=r"tcp://127\.0\.0\.1:1 after 0\.5 s") as raised,
        connect("tcp://127.0.0.1:1", timeout_s=0.5),
    ):
        pass
    assert "\n" not in str(raised.value)
