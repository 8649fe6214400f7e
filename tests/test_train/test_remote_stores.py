"""Training and what belongs to it from stores in a bucket and behind a web server, with faults on the way."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from store import mirror, remote
from store.reader import open_store
from tests.fault_proxy import (
    INTERNAL_ERROR,
    SLOW_DOWN,
    Fault,
    Proxy,
    Request,
    Rule,
    cut,
    dropped,
    fault_proxy,
    lost,
    slow,
    wrong_bytes,
)
from tests.s3_servers import localbucket_server, upload, use_endpoint
from tests.test_train.runs import trained
from train.checkpoint import load_checkpoint

Serve = Callable[..., Proxy]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """serve(folder, rule) → the proxy before an S3 server with the folder's files in s3://bucket."""
    monkeypatch.setattr(remote, "PAUSES_S", (0.01,) * 4)
    monkeypatch.setattr(mirror, "FIRST_PAUSES_S", (0.01,))
    with ExitStack() as stack:

        def start(folder: Path, rule: Rule | None = None) -> Proxy:
            server = stack.enter_context(localbucket_server())
            upload(server, folder, "bucket")
            proxy = stack.enter_context(fault_proxy(server, rule))
            use_endpoint(monkeypatch, proxy.url)
            return proxy

        yield start


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("QWEN_DISTILL_CACHE", str(folder))


def result_of(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The losses and metrics of every epoch, and the weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {name: value for name, value in line.items() if "loss" in name or "top1" in name} for line in lines
    ]
    return kept, load_checkpoint(run / "last.pt")["model_state_dict"]


@pytest.mark.slow
def test_faults_that_pass_do_not_change_a_training(
    make_store: Any, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every object's first requests meet faults of all kinds; losses and weights are those of a quiet line."""
    faults: list[Fault] = [SLOW_DOWN, cut, INTERNAL_ERROR, wrong_bytes, dropped, lost, slow(0.2)]
    met: list[Fault] = []

    def rule(request: Request) -> Fault | None:
        if request.method != "GET" or request.count > 2 or "/c/" not in request.path:
            return None
        met.append(faults[len(met) % len(faults)])
        return met[-1]

    (tmp_path / "bucket").mkdir()
    make_store("bucket/a.zarr", train=150)
    proxy = serve(tmp_path / "bucket")
    runs = []
    for name, chosen in (("quiet", None), ("faults", rule)):
        proxy.rule = chosen
        use_cache(monkeypatch, tmp_path / f"cache-{name}")
        runs.append(result_of(trained("s3://bucket/a.zarr", tmp_path / name, epochs=2)))
    assert len(met) > 2 * len(faults)
    (quiet, weights), (disturbed, others) = runs
    assert quiet == disturbed
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_features_that_are_not_needed_are_not_fetched(
    make_store: Any, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe of classes needs pooled features alone, a training without the teacher none."""
    from extract.logits import probe_store

    (tmp_path / "bucket").mkdir()
    make_store("bucket/a.zarr", train=70)
    proxy = serve(tmp_path / "bucket")
    use_cache(monkeypatch, tmp_path / "cache")
    trained("s3://bucket/a.zarr", tmp_path / "run", control_only=True)
    assert not [path for _, path in proxy.requests if "/features/" in path]
    measured = probe_store("s3://bucket/a.zarr")
    assert measured["array"] is None
    assert measured["probe_top1"] > 0.5
    paths = [path for _, path in proxy.requests]
    assert any("features/pooled/c/" in path for path in paths)
    assert not [path for path in paths if "features/grid/" in path]
    assert not list((tmp_path / "cache").glob(".probe-*"))


# -- every command, as a user types it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The URLs of one folder in a bucket and behind a plain web server, and the folder itself."""
    folder = tmp_path_factory.mktemp("published")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with localbucket_server() as server, pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, server)
        yield {
            "s3": "s3://bucket",
            "http": f"http://127.0.0.1:{web.server_port}",
            "folder": str(folder),
            "server": server,
        }
    web.shutdown()
    web.server_close()


def run(*words: str | Path) -> str:
    """What a command prints. Raises what it raises."""
    from cli import app

    shown = io.StringIO()
    arguments = ["cli", *map(str, words)]
    with contextlib.redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)  # which decides what is imported
        code = app(arguments[1:], prog_name="cli", standalone_mode=False)
    assert code in (None, 0), shown.getvalue()
    return shown.getvalue()


SMALL = ("--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_every_command_takes_the_address(
    make_store: Any, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    use_cache(monkeypatch, tmp_path / "cache")
    publish(make_store(f"{kind}.zarr"), places)
    url = f"{places[kind]}/{kind}.zarr"
    assert json.loads(run("inspect", url, "--json"))["complete"]
    assert "3 pictures" in run("inspect", url, "--pictures", tmp_path / "pictures", "--samples", "2")
    assert "everything is as recorded" in run("verify", url)
    assert "nothing written (a store at a URL is not changed): cli copy it" in run(
        "probe", url, "--device", "cpu"
    )
    run("convert", url, tmp_path / "a.h5")
    run("convert", tmp_path / "a.h5", tmp_path / "back.zarr")
    assert open_store(tmp_path / "back.zarr").fingerprint == open_store(url).fingerprint
    run("convert", url, tmp_path / "small.zarr", "--int8")
    out = tmp_path / "run"
    run("train", url, "--student", "timm:test_resnet", "--image-size", "32", "--out", out, *SMALL)
    assert "top-1 accuracy" in run("evaluate", out, url)
    run("report", out, "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_detectors_and_unets_train_from_a_bucket(
    make_store: Any,
    yolo_store: Path,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_cache(monkeypatch, tmp_path / "cache")
    stores = {
        "yolov8/n": yolo_store,
        "unet/small": make_store("masks.zarr", labels=False, masks=True, train=16),
    }
    for student, store in stores.items():
        publish(store, places)
        out, side = tmp_path / student.replace("/", "-"), "64" if "yolo" in student else "32"
        url = f"{places['s3']}/{store.name}"
        run("train", url, "--student", student, "--image-size", side, "--out", out, *SMALL)
        assert run("evaluate", out, url)
    # The probe of cells: targets with offsets, and the stored grids.
    assert "nothing written" in run("probe", f"{places['s3']}/masks.zarr", "--device", "cpu")


def publish(store: Path, places: dict[str, str]) -> None:
    """Put a store into the folder that the web server shows, and into the bucket."""
    target = Path(places["folder"]) / store.name
    shutil.copytree(store, target)
    files = fsspec.filesystem("s3")
    if not files.exists("bucket"):
        files.mkdir("bucket")
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        files.pipe_file(f"bucket/{store.name}/{path.relative_to(target).as_posix()}", path.read_bytes())
