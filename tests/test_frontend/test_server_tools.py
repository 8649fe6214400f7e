"""What the pages ask of stage one, stage two and stores: real commands in real processes, real stores and files."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from backend.server.catalog import list_data_sets, list_teachers
from backend.server.results import compare_with_control, list_downloads
from backend.server.stores import draw_pictures, list_stores, verify_store
from backend.server.tools import ToolError, run_command, run_module
from store.create import create_store
from store.finalize import finalize_store
from store.format import Manifest, Preprocessing, TeacherSpec
from store.keys import Plan
from tests.test_store.store_samples import small_arrays, write_rows

ROOT = Path(__file__).parents[2]


def make_store(path: Path, complete: bool = True) -> Path:
    teacher = TeacherSpec(name="test", fingerprint="0" * 32, layer="last", width=16, random_weights=True)
    keys = {"train": [f"{row}.jpg" for row in range(20)], "val": [f"v{row}.jpg" for row in range(4)]}
    manifest = Manifest(
        teacher=teacher,
        preprocessing=Preprocessing(image_size=28),
        class_names=tuple("0123456789"),
        data_root="mysql://reader:secret@host/set",
    )
    create_store(path, manifest, Plan(keys, batch_rows=8, shard_rows=64), small_arrays())
    if complete:
        for split in keys:
            write_rows(path, split)
        finalize_store(path)
    return path


def test_a_command_s_error_is_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        asyncio.run(run_command(["inspect", str(tmp_path / "missing.zarr")], 60))
    assert str(caught.value).startswith(str(tmp_path / "missing.zarr"))
    assert "\n" not in str(caught.value)


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = f"import time; time.sleep(99)  # {tmp_path.name}"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
    (tmp_path / "slow_tool.py").write_text(f"{script}; time.sleep(99)")
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ToolError, match="no result after 2 s"):
            asyncio.run(run_module("slow_tool", ["now"], 2))
    assert time.monotonic() - started < 60
    running = [item.info["cmdline"] or [] for item in psutil.process_iter(["cmdline"])]
    assert child not in [word for words in running for word in words]


def test_arguments_reach_no_shell(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(ToolError):
        asyncio.run(run_command(["inspect", f"$(touch {target}); touch {target}"], 60))
    assert not target.exists()


def test_stores_are_listed_with_what_is_known_of_them(tmp_path: Path) -> None:
    make_store(tmp_path / "feature_cache" / "a.zarr")
    make_store(tmp_path / "b.zarr", complete=False)
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("{")
    measured = tmp_path / "feature_cache" / "a.zarr" / ".extract" / "measured.json"
    measured.parent.mkdir(exist_ok=True)
    measured.write_text(json.dumps({"probe_top1": 0.75, "extraction_s": 0.5, "encoded": 20}))
    found = {store.name: store for store in list_stores(tmp_path)}
    assert set(found) == {"feature_cache/a.zarr", "b.zarr", "broken.zarr"}
    whole = found["feature_cache/a.zarr"]
    assert (whole.complete, whole.teacher, whole.random_weights, whole.grid) == (True, "test", True, None)
    assert (dict(whole.rows), whole.classes, whole.accuracies) == (
        {"train": 20, "val": 4},
        10,
        {"probe_top1": 0.75},
    )
    assert "secret" not in whole.data
    assert whole.bytes == sum(file.stat().st_size for file in whole.path.rglob("*") if file.is_file())
    assert not found["b.zarr"].complete
    assert found["broken.zarr"].problem


@pytest.mark.slow
def test_a_store_is_verified_and_drawn_by_the_commands(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a.zarr")
    files = asyncio.run(draw_pictures(path, tmp_path / "pictures"))
    assert files[-1].name == "overview.png"
    assert all(file.is_file() for file in files)
    assert asyncio.run(verify_store(path))["ok"] is True
    shard = next(file for file in path.rglob("c/*") if file.is_file())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert asyncio.run(verify_store(path))["findings"]


def test_teachers_and_data_sets_are_found_below_the_roots(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "qwen" / "model.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "encoder.pth").write_bytes(b"0" * 50)
    (tmp_path / "notes").mkdir()
    (tmp_path / "-odd").mkdir()
    found = [(item.name, item.kind, item.bytes, item.is_file) for item in list_teachers(tmp_path)]
    assert found == [("encoder.pth", "weights", 50, True), ("qwen", "qwen2_5_vl", 100, False)]
    assert list_data_sets(tmp_path) == ["notes", "qwen"]
    assert list_teachers(tmp_path / "missing") == []
    assert list_data_sets(tmp_path / "missing") == []


def test_a_control_is_compared_by_the_metric_that_counts() -> None:
    summary = {"metrics": {"cosine": 0.5, "top1": 0.75}, "control": {"metrics": {"top1": 0.5}}}
    compared = compare_with_control(summary)
    assert compared is not None
    assert (compared.metric, compared.difference) == ("top1", 0.25)
    assert compare_with_control({"metrics": {"top1": 0.75}}) is None
    assert compare_with_control({}) is None


def test_downloads_are_the_useful_files_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "last.pt", "best.pt", "resnet18.onnx", "task.log"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_downloads(tmp_path)] == ["best.pt", "resnet18.onnx", "metrics.jsonl"]


def test_the_command_line_starts_without_the_pages() -> None:
    check = "import sys, cli, commands.backend; assert not {'nicegui', 'fastapi', 'torch'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
