"""A sender for tests that look at the calls themselves."""

from __future__ import annotations

from backend.task.calls import Call


class Told:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def send(self, call: Call) -> None:
        self.calls.append(call)

    def epochs(self) -> list[int]:
        return [call.body["epoch"] for call in self.calls if call.body and call.kind == "history"]

    def paths(self) -> list[str]:
        return [call.query["modelPath"] for call in self.calls if call.kind == "model-path"]
