"""A real server process over a platform's folders, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
FINAL = ("COMPLETED", "FAILED", "STOPPED", "LOST")

# A training of seconds on a CPU.
SMALL: dict[str, Any] = {
    "taskName": "small",
    "teacherModel": "tiny",
    "studentModel": "resnet18",
    "datasetId": "flowers",
    "totalEpochs": 2,
    "batchSize": 8,
    "gpuDevices": "cpu",
    "trainingConfig": {"imageSize": 32, "distillationType": "feature", "workers": 0},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """`cli serve` as a process of its own; it may be killed and started again on the same port."""

    def __init__(self, root: Path, *options: str, port: int = 0, **environment: str) -> None:
        self.root, self.options, self.environment = root, options, environment
        self.port = port or free_port()
        self.log = root / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("datasets", "models", "output"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}/model-distillation", timeout=30, trust_env=False
        )

    def start(self) -> ServerProcess:
        roots = [
            word
            for name in ("datasets", "models", "output")
            for word in (f"--{name}-root", str(self.root / name))
        ]
        command = [sys.executable, "-m", "cli", "serve", "--port", str(self.port), *roots, *self.options]
        # The last calls of a training that cannot report are given up early.
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "QWEN_DISTILL_REPORT_SECONDS": "2",
            **self.environment,
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)
        wait_until(self.answers, START_S, lambda: self.log.read_text())
        return self

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.http.get("/tasks")
            return True
        except httpx.TransportError:
            return False

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)

    def close(self) -> None:
        """Stop the tasks that run, then the server."""
        if self.process is not None and self.process.poll() is None:
            page = self.get("/tasks", state=["QUEUED", "RUNNING", "STOPPING"], size=500)
            for task in page["items"]:
                self.http.post(f"/tasks/{task['taskId']}/stop")
            for task in page["items"]:
                self.wait_final(task["taskId"])
            self.end()
        self.http.close()

    # -- the API ------------------------------------------------------------------------------------------

    def get(self, path: str, **query: Any) -> Any:
        return content(self.http.get(path, params=query))

    def post(self, path: str, body: Any = None) -> Any:
        return content(self.http.post(path, json=body))

    def put(self, path: str, body: Any = None, **query: Any) -> Any:
        return content(self.http.put(path, json=body, params=query))

    def create(self, **changes: Any) -> str:
        return str(self.post("/tasks", SMALL | changes)["taskId"])

    def run(self, **changes: Any) -> str:
        """Create and start a task."""
        task_id = self.create(**changes)
        self.post(f"/tasks/{task_id}/start")
        return task_id

    def state(self, task_id: str) -> str:
        return str(self.get(f"/tasks/{task_id}")["state"])

    def log_of(self, task_id: str) -> str:
        return self.http.get(f"/tasks/{task_id}/log").text

    def wait_final(self, task_id: str, timeout_s: float = 150) -> Any:
        wait_until(lambda: self.state(task_id) in FINAL, timeout_s, lambda: self.log_of(task_id))
        return self.get(f"/tasks/{task_id}")

    def wait_log(self, task_id: str, part: str, timeout_s: float = 100) -> None:
        wait_until(lambda: part in self.log_of(task_id), timeout_s, lambda: self.log_of(task_id))


def content(answer: httpx.Response) -> Any:
    """The data of a successful answer."""
    body = answer.json()
    assert answer.status_code == 200, body
    assert (body["code"], body["message"]) == (200, "success"), body
    return body["data"]


def wait_until(holds: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)
