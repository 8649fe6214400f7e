"""The distillation term of YOLO students as a GPU sees it: one copy of each array a batch, nothing read back."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.distill.projector import TargetStandardizer

pytest.importorskip("ultralytics")
WIDTH, IMAGES, SOURCES = 6, 2, 3
SIDES = {"P3": 8, "P4": 4, "P5": 2}
HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Crossings(TorchDispatchMode):
    """Counts copies between devices and reads of values."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        devices = {item.device for item in (*args, *kwargs.values(), out) if isinstance(item, Tensor)}
        self.copies += len(devices) > 1
        self.reads += func.name().partition(".")[0] in HOST_READS
        return out


def make_targets(**options: Any) -> Any:
    from train.yolo.targets import TeacherTargets

    generator = np.random.default_rng(0)
    return TeacherTargets(
        lambda rows, _flipped, _device: torch.from_numpy(
            generator.normal(size=(len(rows), 4, 4, WIDTH)).astype(np.float16)
        ),
        np.array([[64, 48]] * 9),
        TargetStandardizer(np.zeros(WIDTH), np.ones(WIDTH)),
        resize="letterbox",
        teacher_size=(64, 64),
        **options,
    )


def make_batch() -> dict[str, Any]:
    """Mosaics of three sources each, with a box."""
    from train.yolo.geometry import UNIT_SQUARE, Placement, packed_placements

    placements = [Placement(row, UNIT_SQUARE * 64 - (16 * row, 0)) for row in range(SOURCES)]
    rows, values = packed_placements(placements, 64, 64)
    return {
        "img": torch.zeros(IMAGES, 3, 64, 64),
        "source_rows": torch.from_numpy(rows).repeat(IMAGES, 1),
        "source_placements": torch.from_numpy(values).repeat(IMAGES, 1, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
        "batch_idx": torch.zeros(1),
        "cls": torch.zeros(1, 1),
    }


def make_term(kind: str) -> Any:
    from train.yolo.model import Distillation

    return Distillation(
        dict.fromkeys(SIDES, 5), dict.fromkeys(SIDES, WIDTH), kind=kind, hard_weight=1.0, soft_weight=1.0, foreground=2.0, align=True,
        align_head="linear",
    )  # fmt: skip


def on_meta(batch: dict[str, Any], targets: Any) -> dict[str, Any]:
    """The batch after preprocessing, on the meta device, its grids read and copied there."""
    from train.yolo.targets import PENDING

    targets.to(torch.device("meta"))
    read = targets.read(batch["source_rows"].numpy(), batch["source_placements"].numpy())
    assert {tensor.device.type for tensor in read.tensors} == {"meta"}
    moved = {name: value.to("meta") for name, value in batch.items()}
    moved[PENDING] = Future()
    moved[PENDING].set_result(read)
    return moved


@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
@pytest.mark.parametrize("sources_per_cell", [1, 2])
def test_the_term_stays_on_the_device(kind: str, sources_per_cell: int) -> None:
    """Forward and backward on the meta device, where a mix of devices and every read of a value raises."""
    targets, term = make_targets(sources_per_cell=sources_per_cell), make_term(kind).to("meta")
    batch = on_meta(make_batch(), targets)
    maps = [torch.zeros(IMAGES, 5, side, side, device="meta", requires_grad=True) for side in SIDES.values()]
    with Crossings() as first:
        term(maps, batch, dict.fromkeys(SIDES, targets)).backward()
    assert first.reads == 0
    assert first.copies <= len(SIDES)  # the centres of each level's cells, once
    assert all(values.grad is not None for values in maps)
    with Crossings() as counter:
        term(maps, batch, dict.fromkeys(SIDES, targets)).backward()
    assert (counter.copies, counter.reads) == (0, 0)


def test_each_array_of_a_batch_is_copied_once() -> None:
    targets, batch = make_targets(), make_batch()
    targets.to(torch.device("meta"))
    with Crossings() as counter:
        read = targets.read(batch["source_rows"].numpy(), batch["source_placements"].numpy())
    assert counter.copies == len(read.tensors) == 4
    assert counter.reads == 0


def test_a_norm_that_is_not_finite_is_noticed_before_anything_is_saved() -> None:
    """On a GPU norms are read every few steps; on a CPU at once."""
    from train.errors import TrainError
    from train.yolo.trainer import StoreTrainer

    trainer = StoreTrainer.__new__(StoreTrainer)
    trainer.epoch = 3
    trainer.unread = [(torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(float("nan")), torch.tensor(2.0))]
    with pytest.raises(TrainError, match="the gradient is not finite in epoch 4"):
        trainer.check_finite()
    trainer.unread = [(torch.tensor(float("nan")), torch.tensor(float("inf")))]
    with pytest.raises(TrainError, match="the loss is not finite in epoch 4"):
        trainer.check_finite()
    assert trainer.unread == []


def test_grids_are_read_a_batch_ahead() -> None:
    """The loader starts reading batch n + 1 before it hands out batch n, and hands out each once, in order."""
    from train.yolo.targets import PENDING
    from train.yolo.trainer import ReadingAhead

    events: list[str] = []

    class Targets:
        def prefetch(self, batch: dict[str, Any]) -> None:
            events.append(f"read {int(batch['number'])}")
            batch[PENDING] = "reading"

    data = [{"number": torch.tensor(n), "source_rows": torch.tensor([n])} for n in range(3)]
    loader = ReadingAhead(data, batch_size=1, collate_fn=lambda items: items[0])
    loader.targets = Targets()
    for _ in range(2):
        for batch in loader:
            events.append(f"step {int(batch['number'])}")
            assert batch.pop(PENDING) == "reading"
    assert events == 2 * ["read 0", "read 1", "step 0", "read 2", "step 1", "step 2"]
    loader.targets = None
    assert [int(batch["number"]) for batch in loader] == [0, 1, 2]


def config_of(**options: Any) -> Any:
    from train.config import TrainConfig

    return TrainConfig(**{"store": "s.zarr", "student": "yolov8/n", "out": Path("run"), **options})


@pytest.mark.parametrize(
    ("precision", "has_bf16", "amp"),
    [
        ("auto", True, "bf16"),
        ("auto", False, True),
        ("bf16", True, "bf16"),
        ("fp16", True, True),
        ("fp32", True, False),
    ],
)
def test_the_precision_option_decides_ultralytics_amp(
    precision: str, has_bf16: bool, amp: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the answers of torch.cuda are faked: there is no GPU here."""
    from ultralytics.cfg import get_cfg

    from train.yolo.job import device_arguments

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    found = device_arguments(config_of(device="cuda:1", precision=precision))
    assert found == {"device": "1", "amp": amp}
    assert get_cfg(overrides=found).amp == amp  # ultralytics accepts it


def test_a_precision_or_device_that_the_gpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.errors import ConfigError
    from train.yolo.job import device_arguments

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(ConfigError, match="precision bf16: this GPU does not have it"):
        device_arguments(config_of(device="cuda", precision="bf16"))
    with pytest.raises(ConfigError, match="device cuda:1 is not there: this machine shows 1 CUDA devices"):
        device_arguments(config_of(device="cuda:1"))


def test_fp16_training_is_set_up_without_ultralytics_own_check(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check_amp` loads a model file that it would have to download; it runs on a CPU too when amp is True."""
    from store.reader import open_store
    from train.students.offline import prepare_ultralytics
    from train.yolo.job import build_job
    from train.yolo.trainer import StoreTrainer

    prepare_ultralytics()
    config = config_of(out=tmp_path, image_size=64, device="cpu", batch_size=4, yolo_settings="plots=false")
    job = build_job(config, tmp_path, open_store(yolo_store), None)
    job.arguments["amp"] = True
    trainer = StoreTrainer(job)
    before = set(Path.cwd().iterdir())
    trainer._setup_train()
    assert trainer.amp is True
    assert set(Path.cwd().iterdir()) == before


def test_loader_processes_are_this_process_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from console import devices
    from train.yolo.job import worker_count

    monkeypatch.setattr(devices, "available_cores", lambda: 16)
    assert worker_count(config_of(), {"device": "0"}) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(config_of(), {"device": "0,1,2,3"}) == 4
    assert worker_count(config_of(), {"device": "cpu"}) == 0
    assert worker_count(config_of(workers=3), {"device": "0"}) == 3


def test_grids_are_gathered_into_buffers_that_are_used_in_turn(tmp_path: Path) -> None:
    """A new array for each batch costs page faults and a second copy to pinned memory."""
    from benchmarks.detection_cost import make_store
    from store.reader import open_store
    from train.yolo.dataset import GridReader
    from train.yolo.targets import BUFFERS

    split = open_store(make_store(tmp_path / "store.zarr"))["train"]
    read, device = GridReader(split), torch.device("cpu")
    read(np.arange(4), np.zeros(4, np.bool_), device)  # tells the shapes
    for _ in range(BUFFERS - 1):
        read(np.arange(4), np.zeros(4, np.bool_), device)
    seen = [read(np.array([turn, 9, 3]), np.zeros(3, np.bool_), device) for turn in range(BUFFERS)]
    assert len({grids.data_ptr() for grids in seen}) == BUFFERS
    for turn, grids in enumerate(seen):
        expected = split.gather([turn, 9, 3], ["features/grid"])["features/grid"]
        assert np.array_equal(grids.numpy(), expected)
    assert read(np.array([0]), np.zeros(1, np.bool_), device).data_ptr() == seen[0].data_ptr()
