"""Training steps to be timed: of our loop, and of the plainest loop one would write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[Any], None]


def build_parts(options: dict[str, Any]) -> Any:
    """The loop's parts for options of `cli train`, without starting it."""
    from processes.stop import StopRequest
    from store.reader import open_store
    from train.config import load_config
    from train.data.splits import resolve_data, resolve_task
    from train.loop.assemble import build_training
    from train.loop.machine import build_accelerator

    config = load_config(options)
    store: Any = open_store(config.store)
    data = resolve_data(config, store, resolve_task(config))
    return build_training(config, store, data, build_accelerator(config), StopRequest())


def endless(loader: Any) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def loop_step(built: Any, change: Change | None = None) -> Callable[[], None]:
    """One step of our loop, loading included; `change` may alter the batch before."""
    from train.loop.loop import Loop

    loop = Loop(built.parts)
    batches = endless(built.parts.train_loader)
    built.parts.wrapped.train()

    def step() -> None:
        batch = next(batches)
        if change is not None:
            change(batch)
        loop.step([batch])

    return step
