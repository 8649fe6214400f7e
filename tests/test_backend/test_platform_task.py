"""Parts of a task that its runs from start to end do not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backend.calls import Call
from backend.request import read_request
from backend.task import Task, is_complete
from console.stop import Stopped, StopRequest
from extract.run import run_extraction


class Deaf:
    """A sender to nobody."""

    def send(self, call: Call) -> None:
        pass


class StopAtOnce:
    """An observer of an extraction that stops it as soon as it has begun."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def progress(self, done: int, total: int, message: str) -> None:
        self.stop.set()


@pytest.mark.slow
def test_an_unfinished_store_of_another_precision_does_not_block_the_cache(
    words: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a task on a GPU (bfloat16) was stopped and the next one runs on the CPU."""
    task = Task(read_request(words()), Deaf(), StopRequest())
    store, stop = tmp_path / "features.zarr", StopRequest()
    other = task.mapping.extract_config(store).model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(Stopped):
        run_extraction(other, [StopAtOnce(stop)], stop)
    assert store.exists()
    assert not is_complete(store)
    caplog.set_level("WARNING", "qwen_distill")
    task.extract(store)
    assert is_complete(store)
    assert "starting anew what was never finished" in caplog.text
    assert "bfloat16" in caplog.text
