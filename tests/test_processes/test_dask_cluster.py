"""Local clusters of real worker processes."""

from __future__ import annotations

import contextlib
import os

import pytest

from processes.dask_cluster import (
    ALLOCATOR_VARIABLE,
    WORKER_ENVIRONMENT,
    ClusterStartError,
    connect,
    dask_defaults,
    local_cluster,
    unset_allocator_variable,
)


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


@pytest.mark.parametrize("chosen", [None, "1000000"])
def test_workers_keep_freed_memory_unless_the_user_chose_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """With dask's own value, each freed tensor's memory goes back to the kernel."""
    monkeypatch.delenv(ALLOCATOR_VARIABLE, raising=False)
    if chosen:
        monkeypatch.setenv(ALLOCATOR_VARIABLE, chosen)
    with local_cluster([{}], contextlib.nullcontext()) as client:
        client.wait_for_workers(1)
        assert list(client.run(os.getenv, ALLOCATOR_VARIABLE).values()) == [chosen]
        assert list(client.run(os.getenv, "OPENBLAS_NUM_THREADS").values()) == ["1"]


@pytest.mark.parametrize(("value", "left"), [(None, None), ("dask's", None), ("1000000", "1000000")])
def test_what_dask_sets_for_its_own_memory_is_not_handed_on(
    monkeypatch: pytest.MonkeyPatch, value: str | None, left: str | None
) -> None:
    monkeypatch.delenv(ALLOCATOR_VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(
            ALLOCATOR_VARIABLE, dask_defaults()[ALLOCATOR_VARIABLE] if value == "dask's" else value
        )
    unset_allocator_variable()
    assert os.environ.get(ALLOCATOR_VARIABLE) == left


def test_a_scheduler_that_does_not_answer_is_one_line() -> None:
    with (
        pytest.raises(ClusterStartError, match=r"tcp://127\.0\.0\.1:1 after 0\.5 s") as raised,
        connect("tcp://127.0.0.1:1", timeout_s=0.5),
    ):
        pass
    assert "\n" not in str(raised.value)
