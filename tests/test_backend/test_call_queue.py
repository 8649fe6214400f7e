"""The queue against a real HTTP server: strict, and hostile in every way the contract names."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.task.call_queue import CallQueue, Patience
from backend.task.calls import TaskCalls
from backend.task.errors import OptionError
from backend.task.http_client import HttpClient, read_token
from tests.test_backend.platform_server import PlatformServer

QUICK = Patience(call_s=0.5, first_pause_s=0.02, longest_pause_s=0.1, closing_pause_s=0.05)
CALLS = TaskCalls("7")


def queue(url: str, folder: Path, patience: Patience = QUICK, token: str | None = None) -> CallQueue:
    return CallQueue(HttpClient(url, token), folder / "undelivered.jsonl", patience)


def undelivered(folder: Path) -> list[dict[str, Any]]:
    path = folder / "undelivered.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def send_epochs(target: CallQueue, epochs: range) -> None:
    for epoch in epochs:
        target.send(
            CALLS.progress(epoch=epoch, total_epochs=9, train_loss=0.5, val_loss=0.4, val_accuracy=0.875)
        )
        target.send(CALLS.history(epoch=epoch, values={"trainLoss": 0.5, "epochTime": 1.5}))


def send_end(target: CallQueue) -> None:
    values = {"precision": 0.8, "recall": 0.7, "f1Score": 0.75, "map50": None, "map95": float("nan")}
    target.send(
        CALLS.evaluations(values=values, dataset_id="3", dataset_name="花", samples=12, details={"top1": 0.8})
    )
    target.send(CALLS.complete())


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port where nobody listens, kept from others while the test runs."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def test_every_call_as_the_contract_says(platform: PlatformServer, tmp_path: Path) -> None:
    target = queue(platform.url, tmp_path)
    target.send(CALLS.progress(epoch=0, total_epochs=9, message="extracting: 3 of 9"))
    platform.wait_for(lambda: platform.kinds() == ["progress"])
    send_epochs(target, range(1, 2))
    target.send(CALLS.model_path(tmp_path / "best model.pt"))
    send_end(target)
    assert target.close(10)
    assert platform.kinds() == ["progress", "progress", "history", "model-path", "evaluations", "complete"]
    started, progress = platform.of("progress")
    assert started.query == {"currentEpoch": "0"}
    assert started.body["message"] == "extracting: 3 of 9"
    assert progress.query == {"currentEpoch": "1", "accuracy": "87.5", "loss": "0.5"}
    assert progress.body == {
        "currentEpoch": 1,
        "totalEpochs": 9,
        "trainLoss": 0.5,
        "valLoss": 0.4,
        "valAccuracy": 87.5,
        "status": "RUNNING",
    }
    assert platform.of("history")[0].body["epochTime"] == 1.5
    assert platform.of("history")[0].body["gpuUsage"] is None
    assert platform.of("model-path")[0].query["modelPath"] == str(tmp_path / "best model.pt")
    evaluation = platform.of("evaluations")[0].body
    assert (evaluation["precision"], evaluation["map95"], evaluation["evalDatasetName"]) == (0.8, None, "花")
    assert json.loads(evaluation["detailedResults"]) == {"top1": 0.8}
    assert undelivered(tmp_path) == []


def test_the_error_call_is_one_short_line(platform: PlatformServer, tmp_path: Path) -> None:
    target = queue(platform.url, tmp_path)
    target.send(CALLS.error("显存不足\r\nX-Injected: 1\n" + "长" * 600))
    assert target.close(10)
    message = platform.of("error")[0].query["errorMessage"]
    assert message.startswith("显存不足 X-Injected: 1 长")
    assert len(message) == 500


def test_a_task_id_is_encoded(tmp_path: Path) -> None:
    server = PlatformServer(task_id="任务 7")
    target = CallQueue(HttpClient(server.url), tmp_path / "u.jsonl", QUICK)
    target.send(TaskCalls("任务 7").complete())
    assert target.close(10)
    server.stop()
    assert (server.kinds(), server.violations) == (["complete"], [])


def test_the_server_is_as_strict_as_the_real_one(platform: PlatformServer, tmp_path: Path) -> None:
    """A progress call without the `currentEpoch` parameter is a 400: given up at once and kept."""
    call = CALLS.progress(epoch=1, total_epochs=2)
    broken = type(call)(kind="progress", method="PUT", path=call.path, body=call.body)
    target = queue(platform.url, tmp_path)
    target.send(broken)
    assert not target.close(10)
    assert platform.attempts == 1
    assert "currentEpoch" in platform.violations.pop()
    assert undelivered(tmp_path)[0]["reason"].startswith("HTTP 400")


def test_down_at_start_and_up_later(tmp_path: Path, dead_port: int) -> None:
    target = queue(f"http://127.0.0.1:{dead_port}/api", tmp_path)
    send_epochs(target, range(1, 6))
    while target.failures < 3:
        time.sleep(0.01)
    # The port is held by a bound socket that does not listen; SO_REUSEADDR lets the server take it.
    server = PlatformServer(port=dead_port)
    send_epochs(target, range(6, 8))
    send_end(target)
    assert target.close(20)
    server.stop()
    assert [call.body["epoch"] for call in server.of("history")] == list(range(1, 8))
    assert server.of("progress")[-1].query["currentEpoch"] == "7"
    assert server.kinds()[-1] == "complete"
    assert undelivered(tmp_path) == []


@pytest.mark.parametrize(
    "bad", ["500", "code-500", "html", "garbage", "half-closed", "redirect-away", "stall"]
)
def test_bad_in_the_middle(platform: PlatformServer, tmp_path: Path, bad: str) -> None:
    target = queue(platform.url, tmp_path)
    send_epochs(target, range(1, 3))
    assert platform.wait_for(lambda: len(platform.of("history")) == 2)
    platform.behaviour = bad
    before = platform.attempts
    send_epochs(target, range(3, 6))
    assert platform.wait_for(lambda: platform.attempts >= before + 2)
    platform.behaviour = "ok"
    send_end(target)
    assert target.close(20)
    epochs = sorted(call.body["epoch"] for call in platform.of("history"))
    assert epochs == [1, 2, 3, 4, 5]
    assert platform.of("progress")[-1].query["currentEpoch"] == "5"
    assert platform.kinds()[-1] == "complete"
    assert platform.kinds().count("complete") == 1


@pytest.mark.parametrize(
    "bad", ["500", "html", "garbage", "half-closed", "redirect-away", "stall", "trickle", "endless"]
)
def test_bad_to_the_end(platform: PlatformServer, tmp_path: Path, bad: str) -> None:
    """Sending never waits, closing keeps its deadline, and everything is in undelivered.jsonl."""
    platform.behaviour = bad
    target = queue(platform.url, tmp_path)
    started = time.monotonic()
    send_epochs(target, range(1, 4))
    send_end(target)
    assert time.monotonic() - started < 2  # ten calls to a server that holds each for half a second
    closing = time.monotonic()
    assert not target.close(0.8)
    assert time.monotonic() - closing < 10  # it would hold them for a minute
    kinds = sorted(record["kind"] for record in undelivered(tmp_path))
    assert kinds == ["complete", "evaluations", "history", "history", "history", "progress"]
    assert platform.calls == []


def test_closing_does_not_cut_off_what_a_good_server_is_answering(
    platform: PlatformServer, tmp_path: Path
) -> None:
    platform.behaviour = "held"
    target = queue(platform.url, tmp_path, Patience(call_s=60))
    target.send(CALLS.history(epoch=1, values={}))
    assert platform.wait_for(lambda: platform.attempts == 1)
    closing = threading.Thread(target=target.close, args=(20.0,))
    closing.start()
    while not target.closing:
        time.sleep(0.001)
    platform.release.set()
    closing.join()
    assert (platform.attempts, platform.kinds()) == (1, ["history"])
    assert undelivered(tmp_path) == []


def test_the_end_is_tried_hardest(platform: PlatformServer, tmp_path: Path) -> None:
    """Where time runs out, the end-of-task call goes before what is waiting."""
    platform.behaviour = "stall"
    patience = Patience(call_s=0.4, first_pause_s=0.02, longest_pause_s=0.05, closing_pause_s=0.02)
    target = queue(platform.url, tmp_path, patience)
    send_epochs(target, range(1, 30))
    send_end(target)
    closing = threading.Thread(target=target.close, args=(6.0,))
    closing.start()
    assert platform.wait_for(lambda: "complete" in platform.attempted)
    platform.behaviour = "ok"
    closing.join()
    assert "complete" in platform.kinds()
    assert "progress" not in platform.kinds()[platform.kinds().index("complete") :]


def test_superseded_progress_is_dropped(platform: PlatformServer, tmp_path: Path) -> None:
    platform.behaviour = "500"
    target = queue(platform.url, tmp_path, Patience(first_pause_s=30))
    for epoch in range(1, 50):
        target.send(CALLS.progress(epoch=epoch, total_epochs=50))
    platform.behaviour = "ok"
    assert target.close(10)
    assert [call.query["currentEpoch"] for call in platform.of("progress")][-1] == "49"
    assert len(platform.calls) <= 2


def test_the_queue_is_bounded(tmp_path: Path, dead_port: int) -> None:
    target = queue(f"http://127.0.0.1:{dead_port}", tmp_path, Patience(queue_length=20, first_pause_s=30))
    for epoch in range(1, 101):
        target.send(CALLS.history(epoch=epoch, values={}))
    assert len(target.queue) <= 20
    assert not target.close(0.2)
    assert [record["body"]["epoch"] for record in undelivered(tmp_path)] == list(range(1, 101))


def test_redirects_on_the_same_host_keep_the_method(platform: PlatformServer, tmp_path: Path) -> None:
    platform.behaviour = "redirect-here"
    target = queue(platform.url, tmp_path)
    send_epochs(target, range(1, 2))
    assert target.close(10)
    assert platform.kinds() == ["progress", "history"]


def test_the_token_goes_out_and_stays_secret(
    platform: PlatformServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "qwen_distill")
    target = queue(platform.url, tmp_path, token="s3cr3t-token")
    target.send(CALLS.history(epoch=1, values={}))
    assert platform.wait_for(lambda: len(platform.calls) == 1)
    assert platform.calls[0].headers["Authorization"] == "Bearer s3cr3t-token"
    platform.behaviour = "echo"
    target.send(CALLS.history(epoch=2, values={}))
    assert not target.close(5)
    assert undelivered(tmp_path)[0]["reason"] == "HTTP 401 refused Bearer ***"
    assert "s3cr3t" not in caplog.text + (tmp_path / "undelivered.jsonl").read_text()


def test_no_token_no_header(
    platform: PlatformServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN_DISTILL_API_TOKEN", raising=False)
    assert read_token() is None
    target = queue(platform.url, tmp_path)
    target.send(CALLS.complete())
    assert target.close(5)
    assert "Authorization" not in platform.calls[0].headers


@pytest.mark.parametrize("token", ["a\r\nX: 1", "a b", "密"])
def test_a_token_that_no_header_carries(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("QWEN_DISTILL_API_TOKEN", token)
    with pytest.raises(OptionError) as caught:
        read_token()
    assert token not in str(caught.value)


def test_a_name_that_leads_to_a_link_local_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is on the connected address: whatever the name, the request is never written."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr("backend.task.http_client.is_link_local", lambda host: host == "127.0.0.1")
        client = HttpClient(f"http://localhost:{listener.getsockname()[1]}")
        outcome = client.deliver(CALLS.complete(), 2)
        assert (outcome.delivered, outcome.retry) == (False, False)
        assert "link-local" in outcome.reason
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b""


def test_an_unwritable_folder_does_not_matter(platform: PlatformServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    platform.behaviour = "500"
    target = CallQueue(HttpClient(platform.url), tmp_path / "file" / "undelivered.jsonl", QUICK)
    target.send(CALLS.complete())
    assert not target.close(0.3)
