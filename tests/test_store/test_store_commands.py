"""cli inspect, verify, convert: text for people, one JSON object for machines, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import typer
from store_samples import small_manifest, write_rows
from typer.testing import CliRunner

from commands import store as commands
from store.create import create_store
from store.errors import StoreError
from store.finalize import finalize_store
from store.format import feature_arrays
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter


def run(*arguments: Any) -> Any:
    app = typer.Typer()
    for command in (commands.inspect, commands.verify, commands.convert):
        app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect(make_store: Any) -> None:
    path = make_store(train=100, val=10)
    text = run("inspect", path).stdout
    assert "format version 1, complete" in text
    assert "train: 100 rows, 0 bad" in text
    assert "features/grid" in text
    assert "100 × 2 × 2 × 16" in text
    assert f"weights {'0' * 32}" in text
    assert "software       numpy" in text
    assert f"digest {open_store(path).manifest.digest}" in text
    described = json.loads(run("inspect", path, "--json").stdout)
    assert described["complete"] is True
    assert described["manifest"]["teacher"]["width"] == 16
    grid = described["splits"]["train"]["arrays"]["features/grid"]
    assert grid["shape"] == [100, 2, 2, 16]
    assert grid["bytes_per_sample"] == 128
    files = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    assert described["bytes_on_disk"] == sum(files)
    assert described["bytes"] == sum(split["bytes"] for split in described["splits"].values())


def test_inspect_shows_what_compression_saves(tmp_path: Path) -> None:
    """A grid of zeros: its bytes are those of its files, not of its rows."""
    path = tmp_path / "s.zarr"
    (spec,) = (spec for spec in feature_arrays(64, grid=8) if spec.name == "features/grid")
    spec = spec.model_copy(update={"codec": "zstd"})
    create_store(path, small_manifest(), Plan({"train": map(str, range(64))}), [spec])
    with StoreWriter(path, "train") as writer:
        writer.append({"features/grid": np.zeros((64, 8, 8, 64), np.float16)})
    finalize_store(path)
    grid = json.loads(run("inspect", path, "--json").stdout)["splits"]["train"]["arrays"]["features/grid"]
    assert grid["codec"] == "zstd"
    assert 0 < grid["bytes"] < 64 * 8 * 8 * 64 * 2 / 10


def test_inspect_of_an_incomplete_store(make_store: Any) -> None:
    path = make_store(complete=False, train=100, val=10)
    write_rows(path, "train", row_range=(0, 64))
    assert "being written  features: train 64 of 100, val 0 of 10 rows" in run("inspect", path).stdout
    described = json.loads(run("inspect", path, "--json").stdout)
    assert described["complete"] is False
    assert described["pending"] == {"features": {"train": [64, 100], "val": [0, 10]}}


def test_verify_exit_codes(make_store: Any) -> None:
    path = make_store(train=100)
    good = run("verify", path, "--json")
    assert (good.exit_code, json.loads(good.stdout)["ok"]) == (0, True)
    (path / "train/valid/c/0").unlink()
    (path / "train/valid/c/0.partial").write_bytes(b"")
    bad = run("verify", path)
    assert bad.exit_code == 1
    assert len(bad.stdout.splitlines()) == 3  # one line a finding, and their number
    repaired = run("verify", path, "--repair", "--json")
    assert repaired.exit_code == 1
    answer = json.loads(repaired.stdout)
    assert [Path(name).name for name in answer["repaired"]] == ["0.partial"]
    assert [finding["problem"] for finding in answer["findings"]] == ["shard is missing"]


def test_convert(make_store: Any, tmp_path: Path) -> None:
    path = make_store(train=100)
    assert run("convert", path, tmp_path / "s.h5").exit_code == 0
    assert run("convert", tmp_path / "s.h5", tmp_path / "back.zarr").exit_code == 0
    answer = json.loads(run("convert", path, tmp_path / "small.zarr", "--int8", "--json").stdout)
    assert {cost["array"] for cost in answer["costs"]} == {"features/pooled", "features/grid"}
    assert all(cost["cosine_p1"] > 0.999 for cost in answer["costs"])
    assert "cosine (1st percentile)" in run("convert", path, tmp_path / "pca.zarr", "--pca", "8").stdout
    for arguments, problem in (
        ((path, tmp_path / "x.zarr"), "one of the two must end in .h5"),
        ((path, tmp_path / "x.h5", "--zstd"), "not from or to HDF5"),
        ((path, "https://example.org/x.zarr", "--zstd"), "a web server cannot be written to"),
        (("memory://x.h5", tmp_path / "x.zarr"), "memory://x.h5: no such file: check the address"),
        (("memory://none.zarr", tmp_path / "x.h5"), "memory://none.zarr: no such store"),
    ):
        error = run("convert", *arguments).exception
        assert isinstance(error, StoreError)
        assert problem in str(error)


def test_convert_from_a_remote_store(make_store: Any, tmp_path: Path) -> None:
    url = f"file://{make_store(train=100)}"
    assert run("convert", url, tmp_path / "s.h5").exit_code == 0
    costs = json.loads(run("convert", url, tmp_path / "small.zarr", "--zstd", "--json").stdout)["costs"]
    assert all(0 < cost["bytes_after"] < cost["bytes_before"] for cost in costs)
    assert run("verify", url).exit_code == 0


def test_convert_to_a_url(make_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as in a folder; what is there is not replaced, and a copy that was interrupted continues."""
    monkeypatch.setenv("QWEN_DISTILL_CACHE", str(tmp_path / "cache"))
    path, files = make_store(train=100), fsspec.filesystem("memory")

    def there(address: str) -> dict[str, bytes]:
        files.invalidate_cache()
        return {name.partition(address)[2].lstrip("/"): files.cat_file(name) for name in files.find(address)}

    for address, *words in (["/b/small.zarr", "--zstd"], ["/b/s.h5"]):
        local = tmp_path / address.rpartition("/")[2]
        assert run("convert", path, local, *words).exit_code == 0
        assert run("convert", path, f"memory://{address}", *words).exit_code == 0
        assert not [name for name in files.find("/b") if "-check-" in name]
        assert "exists" in str(run("convert", path, f"memory://{address}", *words).exception)
    paths = [file for file in (tmp_path / "small.zarr").rglob("*") if file.is_file()]
    expected = {file.relative_to(tmp_path / "small.zarr").as_posix(): file.read_bytes() for file in paths}
    assert there("/b/small.zarr") == expected
    files.rm_file("/b/small.zarr/zarr.json")
    content = blake2b(expected["zarr.json"], digest_size=16).hexdigest()
    files.pipe_file("/b/small.zarr/.copying", json.dumps({"store": content}).encode())
    assert run("convert", path, "memory:///b/small.zarr", "--zstd").exit_code == 0
    assert there("/b/small.zarr") == expected
    (tmp_path / "s.h5").write_bytes(there("/b/s.h5")[""])
    assert run("convert", tmp_path / "s.h5", "memory:///b/back.zarr").exit_code == 0
    assert run("convert", "memory:///b/s.h5", tmp_path / "again.zarr").exit_code == 0
    for made in ("memory:///b/back.zarr", tmp_path / "again.zarr"):
        assert open_store(made).fingerprint == open_store(path).fingerprint
    assert not list((tmp_path / "cache").glob(".convert*"))
    files.store.clear()


def test_errors_are_one_line_on_stderr(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "cli.py", "verify", str(tmp_path / "none.zarr"), "--json"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["inspect", "verify", "convert"])
def test_help_has_an_example(name: str) -> None:
    assert f"cli {name} flowers.zarr" in run(name, "--help").stdout
