"""Mistakes that only a GPU shows, found here without one: devices mixed, clocks too early, kernels in other precisions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_train.runs import records
from train.data.batches import Batch
from train.distill.objective import Targets
from train.distill.projector import DistilledOutput, DistilledStudent
from train.errors import TrainError
from train.loop import loop
from train.loop.assemble import use_channels_last
from train.loop.evaluate import LossSums, cosine
from train.loop.machine import OutOfMemoryError, choose_device, choose_precision
from train.loop.optimizer import match_layout
from train.run import run_training
from train.students.build import build_student
from train.tasks import build_task
from train.tasks.segmentation import pixel_entropy_sum


def test_validation_without_features_keeps_its_sums_on_the_device() -> None:
    """Controls, `cli evaluate`, and distillation types none and logit have no cosine."""
    device = torch.device("meta")
    weight = torch.ones(4, device=device)
    batch = Batch(
        np.arange(4), torch.zeros(4, 8, 8, 3, device=device), np.zeros((4, 2, 3)), weight, samples=4.0
    )
    sums = LossSums(device)
    output = DistilledOutput(torch.zeros(4, 3, device=device), None, None)
    sums.add({"loss": torch.zeros((), device=device)}, batch, cosine(output, Targets()))
    assert sums.sums.device == device


def test_images_per_second_counts_the_time_that_the_device_takes(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU steps only queue work; the wait comes when losses are read."""
    plain_read, plain_init = loop.StepLosses.read, loop.Loop.__init__

    def read(self: Any) -> Any:
        time.sleep(0.2)
        return plain_read(self)

    def init(self: Any, parts: Any) -> None:
        plain_init(self, parts)
        self.reads_late = True

    monkeypatch.setattr(loop.StepLosses, "read", read)
    monkeypatch.setattr(loop.Loop, "__init__", init)
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
    batch = Batch(np.arange(2), torch.zeros(2), np.zeros((2, 2, 3)), torch.ones(2), 2.0, masks=mask)
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


def test_losses_of_the_newest_step_stay_unread_on_a_gpu(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the newest step would wait until the GPU has nothing left to do."""
    left: list[int] = []
    plain_settle, plain_init = loop.Loop.settle, loop.Loop.__init__

    def init(self: Any, parts: Any) -> None:
        plain_init(self, parts)
        self.reads_late = True

    def settle(self: Any, leave: int = 0) -> None:
        plain_settle(self, leave)
        left.append(len(self.unread))

    monkeypatch.setattr(loop.Loop, "__init__", init)
    monkeypatch.setattr(loop.Loop, "settle", settle)
    monkeypatch.setattr(loop, "READ_EVERY", 3)
    config = make_config(make_store(), epochs=1, batch_size=2)
    run_training(config)
    assert left[:4] == [1, 1, 1, 0], (
        "12 steps: read at 4, 7 and 10 but for the newest, all at the end of the epoch"
    )


def test_states_get_the_layout_of_their_parameters() -> None:
    """Fused kernels walk parameter, gradient and states by one index; a CPU run's states are contiguous."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    expected = state["exp_avg"].clone()
    state["exp_avg"] = state["exp_avg"].contiguous()
    match_layout(optimizer)
    assert state["exp_avg"].stride() == weight.stride()
    assert torch.equal(state["exp_avg"], expected)


def test_convolutions_become_channels_last_and_nothing_else() -> None:
    student: Any = build_student("timm:test_resnet", num_classes=3, image_size=32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    use_channels_last(student)
    kernels = [
        m.weight for m in student.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)
    ]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("CUDA error: an illegal memory access was encountered\nCompile with ...", "nvidia-smi"),
        (
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set ...",
            "without --deterministic",
        ),
    ],
)
def test_a_device_error_is_one_line(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, text: str, part: str
) -> None:
    def step(self: Any, group: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(loop.Loop, "step", step)
    with pytest.raises(TrainError, match=part) as caught:
        run_training(make_config(make_store()))
    assert "\n" not in str(caught.value)


def test_bfloat16_on_a_card_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(TrainError, match=r"Tesla T4 has compute capability 7\.5.*use fp16 or fp32"):
        choose_precision("bf16", torch.device("cuda"))
    assert choose_precision("auto", torch.device("cuda")) == "fp16"


def test_a_gpu_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TrainError, match=r"device cuda:7 is not there: this machine shows 2 CUDA devices"):
        choose_device("cuda:7")


@pytest.mark.parametrize("auto_batch", [False, True])
def test_out_of_memory_gives_advice_or_halves_the_batch(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, auto_batch: bool
) -> None:
    plain = loop.Loop.step

    def step(self: Any, group: Any) -> None:
        if len(group[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        plain(self, group)

    monkeypatch.setattr(loop.Loop, "step", step)
    config = make_config(make_store(), epochs=1, auto_batch=auto_batch)
    if not auto_batch:
        with pytest.raises(OutOfMemoryError, match=r"half the --batch-size.*\(batch_size 8\)"):
            run_training(config)
        return
    summary = run_training(config)
    assert (summary["batch_size"], summary["grad_accum_steps"]) == (4, 2)


def test_a_short_last_batch_is_not_compiled_again() -> None:
    student: Any = build_student("timm:test_resnet", num_classes=3, image_size=32).eval()
    module = DistilledStudent(student, None, cells=False, pooled=False)
    module.compile_student(4)
    sizes: list[int] = []

    def compiled(images: torch.Tensor) -> Any:
        sizes.append(len(images))
        return student(images)

    module.compiled = [compiled]
    for size in (4, 4, 3):
        assert module(torch.zeros(size, 3, 32, 32)).logits.shape == (size, 3)
    assert sizes == [4, 4]
