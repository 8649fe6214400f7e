"""What the device does with a batch: stored form, one shape, no reading back, and what happens when it cannot."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from extract.decode.pool import DecodedBatch, PixelBuffer
from extract.decode.sample import DecodedSample, Encoding
from extract.encode import Encoder
from extract.plan import batch_rows
from extract.sources.base import Sample
from extract.teachers import TeacherError
from extract.teachers.base import Encoded
from extract.teachers.devices import CompiledBlocks, check_memory, pick_dtype
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.teachers.timm_encoder import TimmTeacher
from store import format as names
from store.format import Preprocessing, TeacherSpec
from store.writer import channel_scale, to_stored
from tests.test_extract.test_teacher_forward_pass import HOST_READS, OpCounter, few_dimensional_teacher

SIZE = 56
KINDS: dict[str, dict[str, Any]] = {
    "pooled": {},
    "grid": {"grid": 4},
    "smaller grid": {"grid": 2},
    "uneven grid": {"grid": 3},
    "letterbox": {"grid": 2, "resize": "letterbox"},
    "views": {"grid": 4, "views": 2},
    "clips": {"grid": 4, "frames": 3, "pair": 2},
}


def make_encoding(**changes: Any) -> Encoding:
    return Encoding(**{"image_size": SIZE, "resize": "squash", **changes})


def decoded(encoding: Encoding, count: int) -> DecodedBatch:
    """A decoded batch of random pixels, of images of different sizes."""
    buffer = PixelBuffer((count, encoding.planes, 3, SIZE, SIZE), shared=False)
    buffer.pixels[:] = np.random.default_rng(0).integers(0, 256, buffer.pixels.shape)
    results = [DecodedSample(size=(60 + 20 * index, 50)) for index in range(count)]
    return DecodedBatch(0, [Sample(str(index)) for index in range(count)], buffer, [], results)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_form_is_that_of_the_store(kind: str) -> None:
    """Scaling and rounding on the device gives the bits that the writer computes from float32."""
    encoding, teacher = make_encoding(**KINDS[kind]), few_dimensional_teacher(depth=2)
    batch = decoded(encoding, 3)
    plain = Encoder(teacher, encoding, 3).launch(batch)
    scales = {name: channel_scale(values) / 8 for name, values in plain.arrays().items()}
    pending = Encoder(teacher, encoding, 3, scales).launch(batch)
    assert pending.finite
    for name, values in plain.arrays().items():
        expected = to_stored(values, scales[name], np.dtype(np.float16))
        stored = pending.arrays()[name]
        assert stored.dtype == np.float16
        assert np.array_equal(stored.view(np.uint16), expected.view(np.uint16)), name


def test_what_float16_cannot_hold_is_noticed_on_the_device() -> None:
    encoding, teacher = make_encoding(grid=4), few_dimensional_teacher(depth=2)
    batch = decoded(encoding, 3)
    arrays = Encoder(teacher, encoding, 3).launch(batch).arrays()
    scales = {name: channel_scale(values) for name, values in arrays.items()}
    scales[names.GRID][7] /= 2.0**30
    pending = Encoder(teacher, encoding, 3, scales).launch(batch)
    assert not pending.finite
    assert np.isinf(pending.arrays()[names.GRID][..., 7]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_reads_nothing_back_from_the_device(kind: str) -> None:
    """On the meta device every read of a value and every mix of devices raises."""
    encoding, teacher = make_encoding(**KINDS[kind]), few_dimensional_teacher(depth=9, device="meta")
    encoder = Encoder(teacher, encoding, 4)
    width = teacher.spec.width
    scaled = {
        spec.name
        for spec in names.feature_arrays(
            width, grid=encoding.grid or None, views=encoding.views, frames=encoding.frames > 0
        )
        if spec.scaled
    }
    encoder.factors = {name: torch.ones(width, device="meta") for name in scaled}
    encoder.fill = True
    pixels = torch.zeros(3, encoding.planes, 3, SIZE, SIZE, dtype=torch.uint8, device="meta")
    inside = torch.ones(3, 4, 4, device="meta") if encoding.resize == "letterbox" else None
    with torch.inference_mode():
        tensors, finite = encoder.encode(pixels, inside)
    assert scaled <= tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {tensor.device.type for tensor in [*tensors.values(), finite]} == {"meta"}
    assert all(len(tensor) == 3 for tensor in tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_reads_of_a_batch(kind: str) -> None:
    """Of a batch cross to the host: each array once, and one flag; nothing is read as a number."""
    encoding, teacher = make_encoding(**KINDS[kind]), few_dimensional_teacher(depth=2, device="meta")
    encoder = Encoder(teacher, encoding, 3)
    encoder.factors = {}
    pixels = torch.zeros(3, encoding.planes, 3, SIZE, SIZE, dtype=torch.uint8, device="meta")
    inside = torch.ones(3, 4, 4, device="meta") if encoding.resize == "letterbox" else None
    encoder.encode(pixels, inside)  # the layout of a size is copied once
    with torch.inference_mode(), OpCounter() as counter:
        encoder.encode(pixels, inside)
    assert counter.copies_between_devices == 0
    assert {name: counter.ops[name] for name in HOST_READS if counter.ops[name]} == {}


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_timm_teachers_read_nothing_back(name: str, resize: str) -> None:
    """On the meta device reads and mixed devices raise; scaled, checked and cast there, with nothing copied across."""
    import timm

    model = timm.create_model(name, **({"img_size": 96} if "vit" in name else {})).eval().to("meta")
    width = int(model.num_features)
    spec = TeacherSpec(name=f"timm:{name}", fingerprint="", layer="", width=width, random_weights=True)
    teacher = TimmTeacher(model, spec, Preprocessing(image_size=96))
    h, w = teacher.grid_size(96, 96)
    encoder = Encoder(teacher, make_encoding(image_size=96, resize=resize, grid=2), 4)
    encoder.factors = {name: torch.ones(width, device="meta") for name in (names.POOLED, names.GRID)}
    encoder.fill = True
    pixels = torch.zeros(3, 1, 3, 96, 96, dtype=torch.uint8, device="meta")
    inside = torch.ones(3, h, w, device="meta") if resize == "letterbox" else None
    with torch.inference_mode():
        encoder.encode(pixels, inside)  # weights of an uneven grid are copied once
        with OpCounter() as counter:
            tensors, finite = encoder.encode(pixels, inside)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {tensor.device.type for tensor in [*tensors.values(), finite]} == {"meta"}
    assert counter.copies_between_devices == 0
    assert {name: counter.ops[name] for name in HOST_READS if counter.ops[name]} == {}


class RecordingTeacher:
    """The teacher, and how many images each forward pass had; out of memory beyond `room` of them."""

    def __init__(self, teacher: QwenVLTeacher, room: int = 1000) -> None:
        self.teacher, self.room = teacher, room
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def encode(self, images: Tensor, *, inside: Tensor | None = None) -> Encoded:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.passes.append(len(images))
        return self.teacher.encode(images, inside=inside)


@pytest.mark.parametrize("kind", ["grid", "letterbox", "views", "clips"])
def test_a_short_batch_is_filled_up_and_gives_the_same(kind: str) -> None:
    encoding, teacher = make_encoding(**KINDS[kind]), RecordingTeacher(few_dimensional_teacher(depth=2))
    batch = decoded(encoding, 3)
    encoder = Encoder(teacher, encoding, 8)  # type: ignore[arg-type]
    plain = encoder.launch(batch).arrays()
    encoder.fill = True
    teacher.passes.clear()
    filled = encoder.launch(batch).arrays()
    assert set(teacher.passes) == {8}
    assert all(np.allclose(filled[name], plain[name], atol=1e-6) for name in plain)


def test_out_of_memory_leaves_one_shape() -> None:
    encoding, teacher = make_encoding(grid=4), RecordingTeacher(few_dimensional_teacher(depth=1), room=4)
    encoder = Encoder(teacher, encoding, 16)  # type: ignore[arg-type]
    encoder.fill = True
    arrays = encoder.launch(decoded(encoding, 11)).arrays()
    assert encoder.parts.halved == [5, 2]
    assert set(teacher.passes) == {2}
    assert len(arrays[names.POOLED]) == 11


def test_a_compiler_that_fails_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first pass finds out; features come from the code as it is."""
    import torch._inductor.config

    teacher = few_dimensional_teacher(depth=2)
    pixels = torch.randint(
        0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plain = teacher.encode(pixels).grid
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    teacher.compiled = CompiledBlocks(teacher.tower.blocks)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(teacher.encode(pixels).grid, plain)
        assert torch.equal(teacher.encode(pixels).grid, plain)
    messages = [
        record.getMessage() for record in caplog.records if "torch.compile failed" in record.getMessage()
    ]
    assert len(messages) == 1
    assert "--no-compile" in messages[0]


def fake_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int = 80_000_000_000
) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 16_000_000_000))
    return torch.device("cuda:0")


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = fake_gpu(monkeypatch, (7, 5))
    assert pick_dtype("auto", device) == torch.float32
    assert "Tesla T4, compute capability 7.5) has no bfloat16: computing in float32" in caplog.text
    with pytest.raises(TeacherError, match=r"--dtype bfloat16: cuda:0 \(Tesla T4.*use --dtype float32"):
        pick_dtype("bfloat16", device)
    assert pick_dtype("auto", fake_gpu(monkeypatch, (9, 0))) == torch.bfloat16


def test_too_little_memory_says_how_much_is_needed_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_gpu(monkeypatch, (9, 0), free=400_000_000)
    with pytest.raises(TeacherError, match=r"needs 1\.26 GB, 0\.40 of 16\.00 GB are free.*--device"):
        check_memory(device, 1_260_000_000, "the vision tower in bfloat16")
    check_memory(device, 300_000_000, "the vision tower in bfloat16")
    check_memory(torch.device("cpu"), 1 << 60, "the vision tower in bfloat16")


@pytest.mark.parametrize(
    ("size", "planes", "rows"), [(224, 1, 256), (448, 1, 64), (112, 1, 1024), (3584, 1, 1), (224, 32, 111)]
)
def test_batches_on_a_gpu_have_a_budget_of_tokens(size: int, planes: int, rows: int) -> None:
    config: Any = SimpleNamespace(batch_size="auto")
    encoding: Any = SimpleNamespace(image_size=size, planes=planes)
    teacher: Any = SimpleNamespace(device=torch.device("cuda"))
    assert batch_rows(config, encoding, teacher) == rows
    config.batch_size = 7
    assert batch_rows(config, encoding, teacher) == 7


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile that captures graphs but generates no code."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="eager", **options),
    )
    torch.compiler.reset()


@pytest.mark.usefixtures("quick_compiler")
def test_halving_with_compiled_blocks_keeps_one_shape_at_a_time() -> None:
    """256 images down to 1 are nine sizes: one more than torch compiles of a function by default."""
    from torch._dynamo.utils import counters

    encoding, teacher = make_encoding(grid=4), RecordingTeacher(few_dimensional_teacher(depth=8))
    teacher.teacher.compiled = CompiledBlocks(teacher.teacher.tower.blocks)
    encoder = Encoder(teacher, encoding, 256)  # type: ignore[arg-type]
    encoder.fill = True
    counters.clear()
    while encoder.parts.limit > 1:
        encoder.launch(decoded(encoding, 2))
        encoder.parts.halve(encoder.parts.limit)
    encoder.launch(decoded(encoding, 2))
    assert teacher.teacher.compiled is not None, "the compiler was given up"
    assert set(teacher.passes) == {256 >> step for step in range(9)}
    assert counters["stats"]["unique_graphs"] == 9  # at 56 pixels both kinds of block have the same window


@pytest.mark.usefixtures("quick_compiler")
def test_too_many_shapes_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._dynamo.config

    from extract.teachers import devices

    monkeypatch.setattr(devices, "MOST_VERSIONS", 1)
    teacher = few_dimensional_teacher(depth=2)
    with torch._dynamo.config.patch(recompile_limit=2):
        teacher.compiled = CompiledBlocks(teacher.tower.blocks)
        for size in (28, 56, 84, 112):
            images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
            assert teacher.encode(images).grid.shape[1] == size // 14
    assert caplog.text.count("torch.compile failed") == 1
