"""The REST API over real connections: answers, errors, security, events, logs."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from backend.server.app import create_app
from backend.server.errors import ServerError
from backend.server.security import LARGEST_BODY, Guard, RefusedError
from backend.server.settings import Settings, load_settings
from backend.task.calls import TaskCalls
from backend.task.http_client import Delivery, HttpClient
from tests.test_server.conftest import TOKEN, LiveServer
from tests.test_server.server_process import content, wait_until

TASK: dict[str, Any] = {
    "taskId": "a",
    "taskName": "花",
    "teacherModel": "tiny",
    "studentModel": "resnet18",
    "datasetId": "花 two",
    "trainingConfig": {"optimizer": "sgd"},
}


def refused(answer: httpx.Response, status: int, message: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["code"], body["data"]) == (status, status, None)
    assert message in body["message"]
    assert "Traceback" not in answer.text


# -- answers ---------------------------------------------------------------------------------------------------


def test_a_platform_s_client(live: LiveServer) -> None:
    """What the original platform's front end and training process do, call by call."""
    http = live.http
    made = content(http.post("/tasks", json=TASK))
    assert {name: made[name] for name in TASK} == TASK
    assert (made["state"], made["numClasses"]) == ("CREATED", None)
    fields = {name: value for name, value in TASK.items() if name != "taskId"}
    assert content(http.put("/tasks/a", json=fields | {"totalEpochs": 2}))["plannedEpochs"] == 2
    assert content(http.get("/tasks", params={"state": ["CREATED", "QUEUED"], "text": "花"}))["total"] == 1
    assert content(http.get("/tasks/a/command")) == content(
        http.post("/command", json={**TASK, "totalEpochs": 2})
    )
    query = {"currentEpoch": 1, "accuracy": 50.0, "loss": 0.25}
    body = {
        "currentEpoch": 1,
        "totalEpochs": 2,
        "trainLoss": 0.25,
        "valLoss": None,
        "valAccuracy": 50.0,
        "status": "RUNNING",
        "newer": 1,
    }
    assert content(http.put("/tasks/a/progress", params=query, json=body)) is None
    assert content(http.put("/tasks/a/progress", params=query)) is None  # older training processes
    point = {
        "taskId": "a",
        "epoch": 1,
        "trainLoss": 0.25,
        "valAccuracy": 50.0,
        "gpuUsage": None,
        "epochTime": 1.5,
    }
    assert content(http.post("/tasks/a/history", json=point)) is None
    assert content(http.get("/tasks/a/history"))[0]["epochTime"] == 1.5
    assert (
        content(http.put("/tasks/a/model-path", params={"modelPath": "/x", "modelUrl": "file:///x"})) is None
    )
    evaluation = {
        "taskId": "a",
        "precision": 0.5,
        "map50": None,
        "evalSampleCount": 3,
        "detailedResults": "{}",
    }
    assert content(http.post("/tasks/a/evaluations", json=evaluation)) is None
    assert content(http.get("/tasks/a/evaluations"))[0]["f1Score"] is None
    assert content(http.post("/tasks/a/complete")) is None
    done = content(http.get("/tasks/a"))
    assert (done["state"], done["bestAccuracy"], done["modelUrl"]) == ("COMPLETED", 50.0, "file:///x")
    assert content(http.delete("/tasks/a")) is None
    refused(http.get("/tasks/a"), 404, "there is no task 'a'")


def test_every_call_of_the_training_process_is_accepted(live: LiveServer) -> None:
    """Built, sent and judged by the training process's own code."""
    live.http.post("/tasks", json=TASK)
    calls, client = TaskCalls("a"), HttpClient(live.settings.api_base_url)
    unknown = float("nan")
    sent = [
        calls.progress(epoch=0, total_epochs=3, message="extracting\n花\0"),
        calls.progress(epoch=3, total_epochs=3, train_loss=0.5, val_loss=unknown, val_accuracy=0.123456),
        calls.history(epoch=3, values={"trainLoss": 0.5, "valAccuracy": 12.3456, "gpuUsage": unknown}),
        calls.model_path(live.settings.output_root / "a" / "花 best_model.pt"),
        calls.evaluations(
            values={"precision": 0.5, "map95": None},
            dataset_id="花 two",
            dataset_name="花 two",
            samples=3,
            details={"student": "花", "name": "\ud800"},
        ),
        calls.error("bad\nimages " + "x" * 1000),
        calls.complete(),
    ]
    for call in sent:
        assert client.deliver(call, 10.0) == Delivery(True), call.kind
    done = content(live.http.get("/tasks/a"))
    assert (done["accuracy"], done["trainLoss"], done["valLoss"]) == (12.3456, 0.5, None)
    assert done["modelUrl"].endswith("/a/%E8%8A%B1%20best_model.pt")
    details = content(live.http.get("/tasks/a/evaluations"))[0]["detailedResults"]
    assert json.loads(details) == {"student": "花", "name": "\ud800"}


def test_errors_name_what_is_wrong(live: LiveServer) -> None:
    http = live.http
    http.post("/tasks", json=TASK)
    refused(http.put("/tasks/a/progress"), 400, "currentEpoch: Field required")
    refused(http.put("/tasks/a/progress", params={"currentEpoch": 1, "accuracy": 101}), 400, "accuracy: ")
    refused(http.put("/tasks/a/progress", params={"currentEpoch": "nan"}), 400, "currentEpoch: ")
    refused(http.put("/tasks/a/progress", params={"currentEpoch": 1, "loss": "nan"}), 400, "loss: ")
    refused(http.put("/tasks/a/error", params={"errorMessage": ""}), 400, "errorMessage: ")
    refused(http.post("/tasks", json=TASK), 409, "there is a task 'a' already")
    refused(http.post("/tasks", json=TASK | {"taskId": "b", "batchsize": 3}), 400, "batchsize: Extra inputs")
    refused(http.post("/tasks", json=TASK | {"taskId": "../b"}), 400, "taskId: ")
    refused(http.post("/tasks", json=TASK | {"taskId": "b", "taskName": "a\0b"}), 400, "control characters")
    refused(http.post("/tasks", json=TASK | {"taskId": "b", "learningRate": "fast"}), 400, "learningRate: ")
    refused(http.post("/tasks", content=b"{", headers={"Content-Type": "application/json"}), 400, "JSON")
    deep = b'{"trainingConfig": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001
    refused(http.post("/tasks", content=deep, headers={"Content-Type": "application/json"}), 400, "")
    refused(http.post("/tasks/a/stop"), 409, "there is nothing to stop")
    refused(http.get("/tasks/a%2F..%2Fb"), 404, "")
    refused(http.get("/tasks/none/history"), 404, "no task 'none'")
    refused(http.get("/tasks", params={"state": "ODD"}), 400, "state")
    refused(http.delete("/tasks"), 405, "Method Not Allowed")
    refused(http.get("/nothing"), 404, "Not Found")


def test_a_defect_gives_no_traceback(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(live.tasks, "search", fail)
    answer = live.http.get("/tasks")
    refused(answer, 500, "an error of the server")
    assert "secret" not in answer.text


def test_the_description_and_its_page_need_no_network(live: LiveServer) -> None:
    base = f"http://127.0.0.1:{live.settings.port}"

    def get(path: str) -> httpx.Response:
        return httpx.get(f"{base}{path}", trust_env=False, timeout=60)  # describing all types takes a while

    page = get("/docs").text
    assert "http://" not in page.replace(base, "")
    assert "https://" not in page
    assert "SwaggerUIBundle" in get("/docs-files/swagger-ui-bundle.js").text
    description = get("/openapi.json").json()
    assert "/model-distillation/tasks/{taskId}/progress" in description["paths"]
    answers = description["paths"]["/model-distillation/tasks"]["post"]["responses"]
    assert {"200", "400", "409"} <= set(answers)
    assert "422" not in answers


# -- security --------------------------------------------------------------------------------------------------


def test_names_of_other_hosts_are_refused(live: LiveServer) -> None:
    port = live.settings.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}"):
        assert live.http.get("/tasks", headers={"Host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[", "10.0.0.1"):
        refused(live.http.get("/tasks", headers={"Host": host}), 403, "is not a name of this server")


def test_pages_of_other_sites_change_nothing(live: LiveServer) -> None:
    here = f"http://127.0.0.1:{live.settings.port}"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": here, "Sec-Fetch-Site": "same-site"},
    ):
        refused(live.http.post("/tasks", json=TASK, headers=headers), 403, "other sites")
    allowed = {"Origin": here, "Sec-Fetch-Site": "same-origin"}
    assert live.http.post("/tasks", json=TASK, headers=allowed).status_code == 200
    # Links from elsewhere may be followed: they change nothing, and the other page sees no answer.
    assert live.http.get("/tasks", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_sockets_are_checked_too(settings: Settings) -> None:
    """They see everything and take commands, and browsers let any page open them."""
    guard, sent = Guard(no_app, settings), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    host = (b"host", b"127.0.0.1")
    for headers in ([host, (b"origin", b"http://evil.example")], [(b"host", b"evil.example")]):
        asyncio.run(guard({"type": "websocket", "path": "/x", "headers": headers}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}] * 2


def test_no_other_site_shows_the_pages_in_a_frame(live: LiveServer) -> None:
    for path in ("/tasks", "/none"):
        headers = live.http.get(path).headers
        assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("SAMEORIGIN", "nosniff")


def test_large_requests_are_refused(live: LiveServer) -> None:
    body = {**TASK, "taskName": "x" * LARGEST_BODY}
    refused(live.http.post("/tasks", json=body), 413, "larger than")

    def chunks() -> Iterator[bytes]:  # not announced
        for _ in range(LARGEST_BODY // 65_536 + 2):
            yield b" " * 65_536

    refused(live.http.post("/tasks", content=chunks()), 413, "larger than")


def test_the_token_opens_everything_but_the_login_page(guarded: LiveServer) -> None:
    base = f"http://127.0.0.1:{guarded.settings.port}"
    for path in ("/model-distillation/tasks", "/docs", "/openapi.json", "/model-distillation/events", "/"):
        refused(httpx.get(base + path, trust_env=False, timeout=60), 401, "a token is needed")
    for wrong in ("", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"):
        refused(guarded.http.get("/tasks", headers={"Authorization": wrong}), 401, "a token is needed")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.http.get("/tasks", headers=headers).status_code == 200
    refused(guarded.http.get("/tasks", headers=headers | {"Host": "evil.example"}), 403, "Host")


def test_browsers_sign_in(guarded: LiveServer) -> None:
    base = f"http://127.0.0.1:{guarded.settings.port}"
    with httpx.Client(base_url=base, trust_env=False, headers={"Accept": "text/html"}) as browser:
        assert browser.get("/docs").headers["location"] == "/login"
        assert "<form" in browser.get("/login").text
        assert browser.post("/login", data={"token": "wrong"}).status_code == 401
        elsewhere = {"Origin": "http://evil.example"}
        assert browser.post("/login", data={"token": TOKEN}, headers=elsewhere).status_code == 403
        signed = browser.post("/login", data={"token": TOKEN})
        assert signed.status_code == 303
        cookie = signed.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        assert browser.get("/docs").status_code == 200


@pytest.mark.parametrize("host", ["10.0.0.7", "[fe80::1]:8080", socket.gethostname(), "proxy.example:443"])
def test_a_server_for_other_machines_has_their_names_for_it(
    settings: Settings, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_DISTILL_TOKEN", TOKEN)
    monkeypatch.setenv("QWEN_DISTILL_HOSTS", "Proxy.example, other.example")
    guard = Guard(no_app, load(settings, host="0.0.0.0"))
    guard.check_host({"host": host})
    with pytest.raises(RefusedError):
        guard.check_host({"host": "evil.example"})


async def no_app(*_: Any) -> None:
    raise AssertionError("not reached")


def load(settings: Settings, **changes: Any) -> Settings:
    values = {
        "datasets_root": settings.datasets_root,
        "models_root": settings.models_root,
        "output_root": settings.output_root,
        "host": "127.0.0.1",
        "port": 8080,
    }
    return load_settings(**(values | changes))


def test_settings_that_are_wrong_are_all_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_DISTILL_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ServerError, match="set QWEN_DISTILL_TOKEN to a secret"):
            load(settings, host=host)
    assert load(settings, host="::1").api_base_url == "http://[::1]:8080"
    with pytest.raises(ServerError, match=r"--datasets-root: .*; .*--jobs: expected at least 1, got 0"):
        load(settings, datasets_root=settings.output_root / "none", jobs=0)
    with pytest.raises(ServerError, match=r"its workers cannot report to 127\.0\.0\.1"):
        load(settings, scheduler="tcp://10.0.0.9:8786")
    monkeypatch.setenv("QWEN_DISTILL_TOKEN", "short")
    with pytest.raises(ServerError, match="at least 16"):
        load(settings)
    monkeypatch.setenv("QWEN_DISTILL_TOKEN", TOKEN)
    assert load(settings, host="0.0.0.0").api_base_url == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "expected dialect://"),
        ("oracle://x/y", "expected sqlite, mysql, mariadb or postgresql|no driver"),
        ("sqlite://", "SQLite needs a file"),
        ("sqlite:////nowhere/x.sqlite", "unable to open database file"),
        ("postgresql://me:s3cret@127.0.0.1:1/db", "refused"),
    ],
)
def test_a_database_that_does_not_work(settings: Settings, url: str, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ServerError, match=message) as caught:
        create_app(replace(settings, database_url=url))
    assert "s3cret" not in str(caught.value)


# -- events and logs -------------------------------------------------------------------------------------------


class Events(threading.Thread):
    """Reads a stream of server-sent events until it ends or is closed."""

    def __init__(self, live: LiveServer, path: str) -> None:
        super().__init__(daemon=True)
        self.client = httpx.Client(trust_env=False, timeout=20)
        self.url = f"{live.http.base_url}{path.lstrip('/')}"
        self.found: list[tuple[str, str]] = []
        self.leaving = False
        self.start()

    def run(self) -> None:
        try:
            with self.client.stream("GET", self.url) as answer:
                kind = ""
                for line in answer.iter_lines():
                    if self.leaving:
                        return
                    if line.startswith("event: "):
                        kind = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        self.found.append((kind, line.removeprefix("data: ")))
        except httpx.TransportError:
            return

    def states(self, task_id: str) -> list[str]:
        tasks = [json.loads(data) for kind, data in list(self.found) if kind == "task"]
        return [task["state"] for task in tasks if task["taskId"] == task_id]


def test_events_begin_with_what_is_and_miss_no_last_state(live: LiveServer) -> None:
    live.http.post("/tasks", json=TASK)
    live.http.post("/tasks", json=TASK | {"taskId": "b"})
    everything, one = Events(live, "/events"), Events(live, "/tasks/b/events")
    wait_until(lambda: everything.states("b") == ["CREATED"] and one.states("b") == ["CREATED"], 10)
    for epoch in range(1, 200):
        live.tasks.report_progress("b", epoch, 1.0, 1.0, None)
    live.http.put("/tasks/b/error", params={"errorMessage": "bad\nimages"})
    wait_until(lambda: everything.states("b")[-1] == "FAILED" == one.states("b")[-1], 10)
    assert one.states("a") == []
    live.http.delete("/tasks/b")
    wait_until(lambda: ("deleted", '{"taskId": "b"}') in everything.found, 10)
    one.join(10)
    assert not one.is_alive()  # nothing more can happen to its task
    assert len(live.tasks.broadcast.subscriptions) == 1
    everything.leaving = True

    def all_left() -> bool:
        live.tasks.report_progress("a", 1, None, None, None)  # what is sent to a client that is gone shows it
        return not live.tasks.broadcast.subscriptions

    wait_until(all_left, 20)
    refused(live.http.get("/tasks/none/events"), 404, "no task")


def test_logs_and_files(live: LiveServer) -> None:
    live.http.post("/tasks", json=TASK)
    refused(live.http.get("/tasks/a/log"), 404, "no file")
    assert live.http.get("/tasks/a/log", params={"tail": 10}).text == ""
    assert content(live.http.get("/tasks/a/files")) == []
    folder = live.settings.output_root / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "sub" / "花.txt").write_text("x")
    live.tasks.report_progress("a", 0, None, None, None)
    with (folder / "task.log").open("ab", buffering=0) as log:
        log.write("first\n花 sec".encode())
        followed = Events(live, "/tasks/a/log/events")
        wait_until(lambda: followed.found == [("log", "first")], 10)
        log.write(b"ond\r\nthird")
        wait_until(lambda: followed.found[-1] == ("log", "花 second"), 10)
        live.http.post("/tasks/a/complete")
        wait_until(lambda: not followed.is_alive(), 10)
    assert followed.found[-2:] == [("log", "third"), ("end", "")]
    assert live.http.get("/tasks/a/log", params={"tail": 14}).text == "third"
    saved = live.http.get("/tasks/a/log", params={"download": True})
    assert saved.headers["content-disposition"] == "attachment; filename*=UTF-8''a.log"
    assert saved.content.endswith(b"third")
    assert [file["name"] for file in content(live.http.get("/tasks/a/files"))] == ["task.log", "sub/花.txt"]
    assert live.http.get("/tasks/a/files/sub/花.txt").text == "x"
    for name in ("link", "none", "sub", "..%2Fa%2Ftask.log", "%2Fetc%2Fpasswd", "sub%2F..%2Ftask.log"):
        refused(live.http.get(f"/tasks/a/files/{name}"), 404, "")


def test_the_server_ends_while_streams_are_open(live: LiveServer) -> None:
    stream = Events(live, "/events")
    wait_until(lambda: bool(live.tasks.broadcast.subscriptions), 10)
    started = time.monotonic()
    live.close()
    assert time.monotonic() - started < 5
    stream.join(5)
    assert not stream.is_alive()


def test_requests_that_are_no_http_harm_nothing(live: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", live.settings.port)) as connection:
        connection.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        connection.settimeout(5)
        assert b"Traceback" not in connection.recv(10_000)
    assert live.http.get("/tasks").status_code == 200
