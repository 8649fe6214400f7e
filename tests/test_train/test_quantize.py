"""int8 students: what quantizing rewrites, how good they are, on which data they may be calibrated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.test_train.runs import STUDENT, cli, trained
from train.deliver.int8 import (
    activation_ranges,
    calibrate,
    plain_upsampling,
    prepare_int8,
    quantized_training_graph,
    start_from,
)
from train.deliver.model import LogitsOnly
from train.errors import DeliveryError
from train.students.build import build_student


def test_upsampling_is_rewritten_without_changing_what_it_computes() -> None:
    torch.manual_seed(0)
    tiling, overlapping = (
        torch.nn.ConvTranspose2d(6, 4, 2, stride=2),
        torch.nn.ConvTranspose2d(4, 3, 3, stride=2),
    )
    network = torch.nn.Sequential(tiling, torch.nn.Sequential(overlapping))
    images = torch.randn(2, 6, 5, 7)
    expected = network(images)
    plain_upsampling(network)
    kinds = [type(layer) for layer in network.modules()]
    assert torch.nn.PixelShuffle in kinds
    assert kinds.count(torch.nn.ConvTranspose2d) == 1  # whose windows overlap
    torch.testing.assert_close(network(images), expected)


@pytest.mark.slow
def test_training_quantized_starts_where_calibration_ended() -> None:
    """Before its first step, the graph that is trained has the ranges that post-training quantization found."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    student = build_student(STUDENT, num_classes=3, image_size=32).eval()
    inputs = np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32)
    images = torch.from_numpy(inputs[:3])
    prepared = prepare_int8(LogitsOnly(copy.deepcopy(student)), images, training=False)
    calibrate(prepared, [inputs])
    ranges = activation_ranges(prepared)
    graph = quantized_training_graph(student, images)
    graph.eval()
    calibrate(graph, [inputs[:3]])
    start_from(ranges, graph)
    for name, (low, high) in ranges.items():
        observer = getattr(graph, name).activation_post_process
        assert (float(observer.min_val), float(observer.max_val)) == pytest.approx((low, high))
    with pytest.raises(DeliveryError, match="activations differ"):
        start_from({"activation_post_process_0": (0.0, 1.0)}, graph)


@pytest.mark.slow
def test_quantized_students_are_smaller_and_as_good(make_store: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    store = make_store(train=96, val=48)
    run = trained(store, tmp_path / "run", epochs=3, student="timm:resnet10t")
    done = cli("quantize", run, store, "--mode", "qat", "--epochs", "1", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    rows = {row["model"]: row for row in summary["models"]}
    assert set(rows) == {"float32", "int8-ptq", "int8-finetuned-ptq", "int8-qat"}
    assert json.loads((run / "int8-qat" / "summary.json").read_text())["models"] == summary["models"]
    for name, row in rows.items():
        kinds = {node.op_type for node in onnx.load(str(run / "int8-qat" / row["file"])).graph.node}
        assert ("QuantizeLinear" in kinds) == (name != "float32")
        assert row["latency_ms"] > 0
    assert rows["int8-ptq"]["size_ratio"] < 0.3
    assert rows["int8-qat"]["size_ratio"] < 0.3
    assert rows["float32"]["top1"] > 0.6
    assert rows["int8-ptq"]["top1"] >= rows["float32"]["top1"] - 0.1
    assert rows["int8-qat"]["top1"] >= rows["float32"]["top1"] - 0.1


def test_a_store_of_other_classes_or_another_teacher_is_refused(make_store: Any, run_folder: Path) -> None:
    from train.deliver.quantize import QuantizeOptions, quantize_student

    def quantize(store: Path) -> None:
        quantize_student(run_folder, str(store), run_folder / "int8", QuantizeOptions())

    with pytest.raises(DeliveryError, match=r"other classes than .* \(differing: background\)"):
        quantize(make_store("masks.zarr", masks=True))
    config = run_folder / "config.json"
    config.write_text(config.read_text().replace('"teacher_fingerprint": "0"', '"teacher_fingerprint": "f"'))
    with pytest.raises(DeliveryError, match=r"teacher synthetic \(0\), .* learnt from synthetic \(f\)"):
        quantize(make_store("same.zarr"))


@pytest.mark.slow
def test_other_data_is_fine_and_named(make_store: Any, run_folder: Path) -> None:
    pytest.importorskip("torchao")
    done = cli("quantize", run_folder, make_store("other.zarr", seed=1))
    assert done.returncode == 0, done.stderr
    assert "other data than the run was trained on" in done.stderr
    assert "other.zarr" in done.stderr
