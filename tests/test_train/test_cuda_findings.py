"""Mistakes that only a GPU shows, found here without one: devices mixed, clocks too early, kernels in other precisions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_train.runs import records
from train.data import Batch
from train.distillation import Targets
from train.engine import loop
from train.engine.evaluate import LossSums, cosine
from train.engine.model import DistilledOutput
from train.losses.segmentation import pixel_entropy_sum
from train.run import run_training
from train.students import build_student
from train.tasks import build_task


def test_validation_without_features_keeps_its_sums_on_the_device() -> None:
    """Controls, `cli evaluate`, and distillation types none and logit have no cosine."""
    device = torch.device("meta")
    weight = torch.ones(4, device=device)
    batch = Batch(np.arange(4), torch.zeros(4, 8, 8, 3, device=device), np.zeros((4, 2, 3)), weight)
    sums = LossSums(device)
    output = DistilledOutput(torch.zeros(4, 3, device=device), None, None)
    sums.add({"loss": torch.zeros((), device=device)}, batch, cosine(output, Targets()))
    assert sums.sums.device == device


def test_images_per_second_counts_the_time_that_the_device_takes(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU steps only queue work; the wait comes when losses are read."""
    plain_read, plain_epoch = loop.StepLosses.read, loop.Loop.train_epoch

    def read(self: Any) -> Any:
        time.sleep(0.2)
        return plain_read(self)

    def train_epoch(self: Any) -> None:
        self.read_every = 10
        plain_epoch(self)

    monkeypatch.setattr(loop.StepLosses, "read", read)
    monkeypatch.setattr(loop.Loop, "train_epoch", train_epoch)
    config = make_config(make_store(), epochs=1)
    summary = run_training(config)
    assert 24 / summary["images_per_second"] >= 3 * 0.2
    assert records(config)[0]["epoch_time_s"] >= 24 / summary["images_per_second"]


@pytest.mark.parametrize("lengths", [None, [3, 2]])
def test_lstm_runs_in_float32_under_autocast(lengths: list[int] | None) -> None:
    """cuDNN's recurrent layers would run in float16 under bfloat16 autocast, without a gradient scaler."""
    student: Any = build_student("lstm/small", num_classes=3, image_size=32).train()
    seen: list[tuple[torch.dtype, bool]] = []

    def look(module: Any, arguments: Any) -> None:
        rows = getattr(arguments[0], "data", arguments[0])
        seen.append((rows.dtype, torch.is_autocast_enabled("cpu")))

    student.lstm.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        output = student(torch.randn(2, 3, 3, 32, 32), None if lengths is None else torch.tensor(lengths))
    assert seen == [(torch.float32, False)]
    assert output.logits.isfinite().all()


class Names(TorchDispatchMode):
    """Remembers the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_segmentation_uses_no_kernel_without_a_deterministic_version(smoothing: float) -> None:
    """`nll_loss2d` raises on CUDA under --deterministic."""
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    mask = torch.randint(0, 3, (2, 8, 8))
    mask[:, :3] = 255
    batch = Batch(np.arange(2), torch.zeros(2), np.zeros((2, 2, 3)), torch.ones(2), masks=mask)
    task = build_task("segmentation", num_classes=3, label_smoothing=smoothing)
    with Names() as names:
        loss = task.loss(DistilledOutput(logits, None, None), batch, task.counts(batch), None)
        assert loss is not None
        loss.backward()
    assert not {name for name in names.seen if "nll_loss2d" in name}
    expected = torch.nn.functional.cross_entropy(
        logits, mask, ignore_index=255, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(pixel_entropy_sum(logits, mask, label_smoothing=smoothing), expected)
