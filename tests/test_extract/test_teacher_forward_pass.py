"""The forward pass as the device sees it: few launches, no waiting for the host, one graph, any magnitude."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from extract.teachers import TeacherError, load_teacher
from extract.teachers.qwen_config import FAMILIES
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.teachers.vision_tower import TowerConfig, VisionTower, grid_layout, pad_mlp_width, rotate
from store.format import Preprocessing, TeacherSpec

MAX_OPS = 2500
#: A size whose windows are cut, where the family has windows.
CUT = {"qwen2.5-vl": (140, 224), "qwen3-vl": (160, 224), "qwen3.5": (160, 224)}
HOST_READS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal")


class OpCounter(TorchDispatchMode):
    """Counts the operators that reach the device, and where tensors are copied to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.copies_between_devices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.ops[str(func).rpartition(".")[0]] += 1
        out = func(*args, **kwargs)
        devices = {
            item.device.type for item in (*args, *kwargs.values(), out) if isinstance(item, torch.Tensor)
        }
        self.copies_between_devices += len(devices) > 1
        return out


def few_dimensional_teacher(
    depth: int, device: str = "cpu", family: str = "qwen2.5-vl", **changes: Any
) -> QwenVLTeacher:
    """A tower of the published structure and tiny width: the operators are those of the real one."""
    published = FAMILIES[family].tower
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_heads": 2, **changes}
    shape["fullatt_block_indexes"] = tuple(i for i in published.fullatt_block_indexes if i < depth)
    config = replace(published, depth=depth, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        tower = VisionTower(config).eval().requires_grad_(False)
    spec = TeacherSpec(name=family, fingerprint="", layer="", width=config.hidden_size, random_weights=True)
    return QwenVLTeacher(tower, spec, Preprocessing(image_size=224, std=(0.5, 0.5, 0.5)), max_pixels=1 << 24)


def count_ops(teacher: QwenVLTeacher, images: torch.Tensor) -> OpCounter:
    teacher.encode(images)  # the layout of a size is made once
    with OpCounter() as counter:
        teacher.encode(images)
    return counter


@pytest.mark.parametrize("size", [(224, 224), (252, 308)], ids=["whole windows", "cut windows"])
def test_ops_per_forward_at_full_depth(size: tuple[int, int]) -> None:
    """Trap 3: 32 images, 32 blocks; transformers' own sdpa path dispatches about 14,100 operators."""
    teacher = few_dimensional_teacher(depth=32, device="meta")  # counts the same, computes nothing
    shapes = 1 if size == (224, 224) else 4  # whole, right, bottom, corner
    counter = count_ops(teacher, torch.zeros(32, 3, *size, dtype=torch.uint8, device="meta"))
    attention_calls = sum(count for name, count in counter.ops.items() if "scaled_dot_product" in name)
    assert attention_calls == 28 * shapes + 4
    if shapes == 1:
        assert counter.ops.total() <= MAX_OPS, counter.ops.most_common(12)


def test_the_counter_sees_what_transformers_does() -> None:
    """The same counter on transformers' tower: one attention call per window and image."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=8,
        fullatt_block_indexes=[1],
    )
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    with OpCounter() as counter, torch.inference_mode():
        model(torch.zeros(8 * 256, 1176), grid_thw=torch.tensor([[1, 16, 16]] * 8))
    ours = count_ops(few_dimensional_teacher(depth=2), torch.zeros(8, 3, 224, 224, dtype=torch.uint8))
    assert sum(count for name, count in counter.ops.items() if "scaled_dot_product" in name) == 8 * 4 + 8
    with pytest.raises(Exception, match=r"(?i)meta"):
        model.to("meta")(
            torch.zeros(256, 1176, device="meta"), grid_thw=torch.tensor([[1, 16, 16]], device="meta")
        )
    assert counter.ops.total() > 2 * ours.ops.total()


def test_a_tower_without_windows_makes_one_attention_call_per_block() -> None:
    """27 blocks, 32 images: transformers' eager path dispatches about 9,700 operators, its sdpa path 4,500."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    teacher = few_dimensional_teacher(depth=27, device="meta", family="qwen3-vl")
    ours = count_ops(teacher, torch.zeros(32, 3, 64, 96, dtype=torch.uint8, device="meta"))
    assert sum(count for name, count in ours.ops.items() if "scaled_dot_product" in name) == 27
    config = Qwen3VLVisionConfig(
        depth=27, hidden_size=32, intermediate_size=24, num_heads=2, out_hidden_size=8
    )
    model = Qwen3VLVisionModel._from_config(config, attn_implementation="eager").eval()
    with OpCounter() as theirs, torch.inference_mode():
        model(torch.zeros(32 * 24, 1536), grid_thw=torch.tensor([[1, 4, 6]] * 32))
    assert 5 * ours.ops.total() <= theirs.ops.total(), (ours.ops.total(), theirs.ops.total())
    # Per block: 2 norms, 4 linear layers, 2 residual sums and one attention call; the rest are views and the rotation.
    computing = ("linear", "layer_norm", "add", "gelu", "scaled_dot_product_attention", "mul", "roll")
    assert sum(ours.ops[f"aten.{name}"] for name in computing) == 27 * (4 + 2 + 3 + 1 + 1 + 2 + 1) + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_back_or_copied_between_devices(family: str) -> None:
    teacher = few_dimensional_teacher(depth=9, family=family)
    counter = count_ops(teacher, torch.zeros(4, 3, *CUT[family], dtype=torch.uint8))
    assert {name: counter.ops[name] for name in HOST_READS if counter.ops[name]} == {}
    assert counter.copies_between_devices == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_on_a_device_without_data(family: str) -> None:
    """On the meta device any `.item()`, `.tolist()` or copy to the host raises."""
    teacher = few_dimensional_teacher(depth=9, device="meta", family=family)
    out = teacher.encode(torch.zeros(3, 3, *CUT[family], dtype=torch.uint8, device="meta"))
    assert out.grid.shape == (3, 10, 224 // teacher.tower.config.patch_size, 32)
    assert out.grid.device.type == out.pooled.device.type == "meta"


@pytest.mark.parametrize("size", [(112, 112), (224, 112), (140, 252)])
def test_every_attention_kernel_gives_the_same(size: tuple[int, int], noise: torch.Generator) -> None:
    """Kernels differ in the strides of what they return; CUDA picks another one for each dtype and version."""
    teacher = few_dimensional_teacher(depth=8)  # its last block attends to the whole image
    pixels = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=noise)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = teacher.encode(pixels).grid
    with sdpa_kernel(SDPBackend.MATH):
        plain = teacher.encode(pixels).grid
    assert torch.allclose(flash, plain, atol=1e-4)


def test_a_wider_mlp_gives_the_same() -> None:
    teacher = few_dimensional_teacher(depth=3)
    pixels = torch.randint(
        0, 256, (2, 3, 112, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plain, width = teacher.encode(pixels).grid, teacher.tower.config.intermediate_size
    pad_mlp_width(teacher.tower, 2 * width - 1)
    assert {block.mlp.down_proj.in_features for block in teacher.tower.blocks} == {2 * width - 1}  # type: ignore[union-attr]
    assert torch.allclose(teacher.encode(pixels).grid, plain, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_each_block_compiles_as_one_graph(family: str) -> None:
    teacher = few_dimensional_teacher(depth=2, family=family)
    pixels = torch.randint(
        0, 256, (2, 3, *CUT[family]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plain = teacher.encode(pixels).grid
    torch.compiler.reset()
    for block in teacher.tower.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(teacher.encode(pixels).grid, plain, atol=1e-5)


def reference_rotation(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The textbook form: each pair (first half, second half) turned by its angle."""
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return turned.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_have_the_bits_of_the_textbook_form(dtype: torch.dtype) -> None:
    config = TowerConfig()
    layout = grid_layout(config, 4, 6)
    rows, columns = layout.order // 6, layout.order % 6
    spatial = config.head_dim // 2
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
    half = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    x = torch.randn(2, 24, 2, 16, config.head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference_rotation(x, torch.cat([half, half], dim=-1)[:, None, None])
    assert torch.equal(rotate(x, layout.cos, layout.sin), expected)


def test_the_layout_is_computed_once_per_size() -> None:
    teacher = few_dimensional_teacher(depth=1)
    for _ in range(3):
        teacher.encode(torch.zeros(1, 3, 56, 84, dtype=torch.uint8))
        teacher.encode(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    assert sorted(teacher.layouts) == [(2, 2), (4, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_beyond_float16_survive(dtype: torch.dtype) -> None:
    """Trap 4: some channels exceed 65504, float16's largest number."""
    teacher = few_dimensional_teacher(depth=2)
    teacher.tower.blocks[0].mlp.down_proj.bias[5] = 3e6  # type: ignore[union-attr, index]
    teacher.tower.to(dtype)
    teacher = QwenVLTeacher(teacher.tower, teacher.spec, teacher.preprocessing, max_pixels=1 << 24)
    out = teacher.encode(torch.zeros(2, 3, 56, 56, dtype=torch.uint8))
    assert out.grid.dtype == out.pooled.dtype == torch.float32
    assert torch.isfinite(out.grid).all()
    assert (out.grid[..., 5] > 2e6).all()
    assert (out.pooled[..., 5] > 2e6).all()
    with np.errstate(over="ignore"):
        assert np.isinf(out.pooled.numpy().astype(np.float16)).any()  # stored as it is, it would be lost


def test_float16_is_refused(tiny_teacher_folder: Path) -> None:
    with pytest.raises(TeacherError, match=r"float16 is not possible \(some activations exceed"):
        load_teacher("qwen2.5-vl", str(tiny_teacher_folder), device="cpu", dtype="float16")


def test_bfloat16_stays_close_to_float32(sharp_checkpoints: dict[str, Path], noise: torch.Generator) -> None:
    pixels = torch.randint(0, 256, (2, 3, 112, 140), dtype=torch.uint8, generator=noise)
    grids = {}
    for dtype in ("float32", "bfloat16"):
        teacher = load_teacher("qwen2.5-vl", str(sharp_checkpoints["full"]), device="cpu", dtype=dtype)
        assert teacher.spec.dtype == dtype
        grids[dtype] = teacher.encode(pixels).grid.flatten(0, 2)
    near = torch.nn.functional.cosine_similarity(grids["float32"], grids["bfloat16"])
    far = torch.nn.functional.cosine_similarity(grids["float32"], grids["bfloat16"].roll(1, dims=0))
    assert near.min() > 0.999
    assert far.median() < 0.99
