"""Training and what belongs to it from stores in a bucket and behind a web server, with faults on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from store import mirror, remote
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
