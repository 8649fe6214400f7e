"""Many tasks, many watching clients, several trainings: every client sees every last state, memory stays small."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.test_server.server_process import FINAL, ServerProcess, wait_until

TASKS, STREAMS, TRAININGS, REPORTING, EPOCHS = 200, 20, 4, 20, 10
MOST_MEMORY_MB = 400


class Watchers(threading.Thread):
    """Clients of the event stream, each with the last state that it saw of every task."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self.url = f"{server.http.base_url}events"
        self.states: list[dict[str, str]] = [{} for _ in range(STREAMS)]
        self.start()

    def run(self) -> None:
        asyncio.run(self.watch_all())

    async def watch_all(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits()) as client:
            await asyncio.gather(*(self.watch(client, states) for states in self.states))

    async def watch(self, client: httpx.AsyncClient, states: dict[str, str]) -> None:
        try:
            async with client.stream("GET", self.url) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        task: dict[str, Any] = json.loads(line.removeprefix("data: "))
                        states[task["taskId"]] = task["state"]
        except httpx.TransportError:  # the server has ended
            return


@pytest.mark.slow
def test_load(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--jobs", str(TRAININGS))
    assert server.process is not None
    process, memory = psutil.Process(server.process.pid), []
    for number in range(TASKS):
        server.create(taskId=f"t{number}")
    watchers = Watchers(server)
    wait_until(lambda: all(len(states) == TASKS for states in watchers.states), 60)
    trainings = [f"t{number}" for number in range(TRAININGS)]
    for task_id in trainings:
        server.post(f"/tasks/{task_id}/start")
    # Trainings elsewhere report to the same server meanwhile.
    reporting = [f"t{number}" for number in range(TRAININGS, TRAININGS + REPORTING)]
    with ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        list(pool.map(lambda task_id: report(server, task_id), reporting))
        rate = REPORTING * (2 * EPOCHS + 1) / (time.monotonic() - started)
        memory.append(process.memory_info().rss / 1e6)
    print(f"{rate:.0f} calls/s")
    for task_id in trainings:
        assert server.wait_final(task_id)["state"] == "COMPLETED", server.log_of(task_id)
        memory.append(process.memory_info().rss / 1e6)
    expected = {**dict.fromkeys(trainings + reporting, "COMPLETED")}
    wait_until(lambda: all(final(states) == expected for states in watchers.states), 10)
    assert max(memory) < MOST_MEMORY_MB
    print(f"{max(memory):.0f} MB")
    assert server.get("/tasks", state="COMPLETED", size=500)["total"] == len(expected)


def final(states: dict[str, str]) -> dict[str, str]:
    return {task_id: state for task_id, state in states.items() if state in FINAL}


def report(server: ServerProcess, task_id: str) -> None:
    """The calls of a training elsewhere."""
    for epoch in range(1, EPOCHS + 1):
        server.put(f"/tasks/{task_id}/progress", {"totalEpochs": EPOCHS}, currentEpoch=epoch, accuracy=epoch)
        server.post(f"/tasks/{task_id}/history", {"epoch": epoch, "trainLoss": 1 / epoch})
    server.post(f"/tasks/{task_id}/complete")
