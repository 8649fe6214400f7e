"""A hub name instead of a folder: only the tower's files are fetched, and a second run needs no network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from extract.teachers import CheckpointError, load_teacher

NAME = "someone/tiny-vl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The few requests of the hub that a download makes, answered from a folder. `served` lists what was read."""

    def __init__(self, folder: Path) -> None:
        self.served: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                name = self.path.rpartition("/")[2]
                file = folder / name
                if f"/{NAME}/resolve/" not in self.path or not file.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = file.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    hub.served.append(name)
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    folder = tmp_path / "on the hub"
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (folder / file).write_bytes((micro_checkpoint / file).read_bytes())
    tensors = load_file(micro_checkpoint / "model.safetensors")
    parts = {
        "model-1.safetensors": {k: v for k, v in tensors.items() if k.startswith("visual.")},
        "model-2.safetensors": {k: v for k, v in tensors.items() if not k.startswith("visual.")},
    }
    for name, part in parts.items():
        save_file(part, folder / name)
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    server = Hub(folder)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.close()


def test_only_the_towers_files_are_fetched_once(hub: Hub, micro_checkpoint: Path) -> None:
    first = load_teacher("qwen2.5-vl", NAME, device="cpu")
    local = load_teacher("qwen2.5-vl", str(micro_checkpoint), device="cpu")
    assert first.spec.fingerprint == local.spec.fingerprint
    assert sorted(hub.served) == [
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
    ]
    hub.close()
    again = load_teacher("qwen2.5-vl", NAME, device="cpu")  # from the cache, without a network
    assert again.spec == first.spec
    assert len(hub.served) == 4


def test_a_name_the_hub_does_not_know(hub: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"someone/else: no such folder, and http.* gave no such checkpoint"
    ):
        load_teacher("qwen2.5-vl", "someone/else", device="cpu")
