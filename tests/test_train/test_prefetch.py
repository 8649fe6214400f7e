"""Batches prepared in a thread: in order, errors where the loop asks, memory filled again only after its copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from train.data.batches import Batch, FeatureGatherer, default_workers
from train.data.prefetch import AHEAD, Prefetcher
from train.run import run_training


def batch_of(number: int, source: torch.Tensor | None = None) -> Batch:
    images = torch.full((2,), number) if source is None else source.fill_(number)
    return Batch(np.arange(2), images, np.zeros((2, 2, 3)), torch.ones(2), 2.0)


class SlowCopies:
    """A copy engine like that of a GPU: a copy reads its source only later, when somebody waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.handed: list[int] = []

    def start(self, batch: Batch) -> tuple[Batch, Any]:
        moved = batch.with_tensors({name: torch.empty_like(v) for name, v in batch.tensors().items()})
        return moved, [(batch, moved)]

    def wait(self, ticket: Any) -> None:
        with self.lock:
            for source, target in ticket:
                for name, value in source.tensors().items():
                    target.tensors()[name].copy_(value)
            ticket.clear()

    def hand_over(self, batch: Batch, ticket: Any) -> None:
        self.wait(ticket)
        self.handed.append(int(batch.images.flatten()[0]))


def test_batches_come_in_order_and_from_a_thread() -> None:
    threads = set()

    def host() -> Iterator[Batch]:
        for number in range(7):
            threads.add(threading.current_thread().name)
            yield batch_of(number)

    engine = SlowCopies()
    found = [int(batch.images[0]) for batch in Prefetcher(host(), engine, 3)]
    assert found == engine.handed == list(range(7))
    assert threads == {"prefetch"}


def test_memory_is_filled_again_only_after_its_copy() -> None:
    buffers = [torch.zeros(2, dtype=torch.int64) for _ in range(AHEAD + 2)]

    def host() -> Iterator[Batch]:
        for number in range(12):
            yield batch_of(number, buffers[number % len(buffers)])

    assert [int(b.images[0]) for b in Prefetcher(host(), SlowCopies(), len(buffers))] == list(range(12))


def test_an_error_is_raised_after_the_batches_before_it() -> None:
    def host() -> Iterator[Batch]:
        yield batch_of(0)
        raise ValueError("image x: broken")

    prefetcher = Prefetcher(host(), SlowCopies(), 2)
    assert int(next(prefetcher).images[0]) == 0
    with pytest.raises(ValueError, match="image x: broken"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_closing_in_the_middle_ends_the_thread_and_lets_go_of_batches() -> None:
    made = []

    def host() -> Iterator[Batch]:
        for number in range(1000):
            made.append(number)
            yield batch_of(number)

    prefetcher = Prefetcher(host(), SlowCopies(), 2)
    next(prefetcher)
    started = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - started < 5
    assert not prefetcher.thread.is_alive()
    assert prefetcher.ready.empty()
    assert len(made) <= AHEAD + 3
    with pytest.raises(StopIteration):
        next(prefetcher)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_through_the_thread_is_bit_identical(
    make_store: Any, make_config: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The same losses and weights as on the plain path, over two epochs with persistent workers."""
    from tests.test_train.runs import records
    from train.checkpoint import load_checkpoint
    from train.data import batches as data
    from train.data import prefetch

    store = make_store(logits=True, train=27)
    options = {"grad_accum_steps": 2, "workers": workers}
    plain = make_config(store, out=tmp_path / "plain", **options)
    run_training(plain)

    def epoch(self: Any, number: int, start: int = 0) -> Iterator[Batch]:
        self.stop_prefetching()
        self.batches.epoch, self.batches.start = number, start
        self.prefetcher = prefetch.Prefetcher(
            self.joined(iter(self.loader)), SlowCopies(), self.gatherer.depth
        )
        return iter(self.prefetcher)

    monkeypatch.setattr(data.BatchLoader, "epoch", epoch)
    threaded = make_config(store, out=tmp_path / "threaded", **options)
    run_training(threaded)
    drop = "epoch_time_s"
    left, right = ([{k: v for k, v in r.items() if k != drop} for r in records(c)] for c in (plain, threaded))
    assert left == right
    states = [load_checkpoint(c.out / "last.pt")["model_state_dict"] for c in (plain, threaded)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_only_the_recorded_view_that_is_shown_leaves_the_host(make_store: Any) -> None:
    split = open_store(make_store(views=2))["train"]
    names = ["views/grid", "views/pooled", "features/pooled"]
    gatherer = FeatureGatherer(split, names, depth=2, device=torch.device("cpu"))
    rows, shown = np.array([4, 1, 7]), np.array([1, 0, 1])
    for _ in range(3):
        found = gatherer.gather(rows, shown)
        stored = split.gather(rows, names)
        for name in names[:2]:
            assert np.array_equal(found[name].numpy(), stored[name][np.arange(3), shown])
        assert np.array_equal(found["features/pooled"].numpy(), stored["features/pooled"])


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from console import devices

    monkeypatch.setattr(devices, "available_cores", lambda: 32)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (default_workers(gpu), default_workers(cpu)) == (16, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (default_workers(gpu), default_workers(cpu)) == (6, 4)
    monkeypatch.setenv(devices.SHARE_VARIABLE, "2")
    assert (default_workers(gpu), default_workers(cpu)) == (2, 2)


def test_cores_of_a_container_are_its_quota(tmp_path: Any) -> None:
    from console.devices import available_cores

    most = available_cores(tmp_path)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert available_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path) == most
