"""The timm encoders that `cli teachers` lists: their figures are timm's, their features those of forward_intermediates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from extract.known_teachers import TIMM_ROWS, TimmRow
from extract.teachers import TeacherError, license_notice, load_teacher
from extract.teachers.timm_encoder import TimmTeacher, as_grid

# Quick ones: the narrowest of each kind of architecture. The rest run with -m slow.
QUICK = (
    "vit_small_patch16_dinov3.lvd1689m",
    "convnext_tiny.dinov3_lvd1689m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_pe_core_tiny_patch16_384.fb",
    "vit_pe_spatial_tiny_patch16_512.fb",
    "eva02_small_patch14_224.mim_in22k",
)
DEPTH = 2
# An older timm than the pinned one lacks some; with the pinned one `test_no_row_is_left_out` holds.
KNOWN = [row for row in TIMM_ROWS if row.name.partition(".")[0] in timm.list_models()]


def test_no_row_is_left_out() -> None:
    pinned = tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 31)
    assert not pinned or len(KNOWN) == len(TIMM_ROWS)


def test_a_row_that_the_installed_timm_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "list_models", lambda: ["resnet18"])
    with pytest.raises(
        TeacherError, match=r"timm [\d.]+ has no model 'vit_huge_patch16_radio_v4.c_radio': a newer"
    ):
        load(row_named("vit_huge_patch16_radio_v4.c_radio"))


def marked(row: TimmRow) -> Any:
    return pytest.param(row, id=row.name, marks=[] if row.name in QUICK else pytest.mark.slow)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm builds the published architectures with two blocks, which says as much and is quicker."""
    create = timm.create_model

    def build(name: str, **options: Any) -> torch.nn.Module:
        few = {"depths": (1, 1, 1, 1)} if name.startswith("convnext") else {"depth": DEPTH}
        if name.startswith("samvit"):
            few["global_attn_indexes"] = (1,)  # type: ignore[assignment]
        return create(name, **few, **options)

    monkeypatch.setattr(timm, "create_model", build)


def side_of(row: TimmRow) -> int:
    return 4 * row.patch


def load(row: TimmRow, **options: Any) -> TimmTeacher:
    torch.manual_seed(0)
    options = {"random_weights": True, "image_size": side_of(row), "device": "cpu", **options}
    teacher = load_teacher(f"timm:{row.name}", dtype="float32", **options)
    assert isinstance(teacher, TimmTeacher)
    return teacher


def noise_images(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)


def timms_own(teacher: TimmTeacher, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last grid [B, h, w, D] and class token [B, D] by timm's `forward_intermediates`, from timm's own normalization."""
    config = timm.data.resolve_model_data_config(teacher.model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    model: Any = teacher.model
    options: dict[str, Any] = {"norm": True, "output_fmt": "NCHW"}
    with torch.inference_mode():
        values = (images / 255 - mean) / std
        if not getattr(model, "num_prefix_tokens", 0):
            final, grids = model.forward_intermediates(values, **options)
            # SAM's neck and ConvNeXt's norm come after the blocks
            return (final if final.dim() == 4 else grids[-1]).permute(0, 2, 3, 1), None
        _, last = model.forward_intermediates(values, indices=1, return_prefix_tokens=True, **options)
        return last[-1][0].permute(0, 2, 3, 1), last[-1][1][:, 0]


# Rows that differ in their weights only are one architecture.
ARCHITECTURES = {row.name.partition(".")[0]: row for row in reversed(KNOWN)}


@pytest.mark.parametrize("row", [marked(row) for row in ARCHITECTURES.values()])
def test_features_are_those_of_forward_intermediates(row: TimmRow, shallow: None) -> None:
    teacher = load(row)
    images = noise_images(side_of(row))
    encoded = teacher.encode(images)
    grid, token = timms_own(teacher, images)
    assert encoded.grid.shape == (2, side_of(row) // row.patch, side_of(row) // row.patch, row.width)
    scale = grid.abs().max()
    assert (encoded.grid - grid).abs().max() <= 1e-5 * scale
    assert torch.allclose(encoded.pooled, grid.mean(dim=(1, 2)), atol=1e-5 * scale.item())
    assert (encoded.grid.flatten(1, 2).roll(1, dims=1) - grid.flatten(1, 2)).abs().max() > 1e-2 * scale
    teacher.pool = "cls"
    if token is None:
        with pytest.raises(TeacherError, match="has no class token, use --pool mean or model"):
            load(row, pool="cls")
    else:
        pooled = teacher.encode(images).pooled
        assert torch.allclose(pooled, token, atol=1e-5 * scale.item())
        assert not torch.allclose(pooled, encoded.pooled, atol=1e-2 * scale.item())


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_license_and_native_size_are_timms(row: TimmRow) -> None:
    config = get_pretrained_cfg(row.name)
    assert config is not None
    assert (config.license, config.input_size[1]) == (row.license, row.native)


@pytest.mark.slow
@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_width_patch_and_blocks_are_timms(row: TimmRow) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(row.name.partition(".")[0])
    if hasattr(model, "stages"):
        patch, blocks = model.feature_info[-1]["reduction"], sum(len(stage.blocks) for stage in model.stages)
    else:
        patch, blocks = model.patch_embed.patch_size[0], len(model.blocks)
    assert (model.num_features, patch, blocks) == (row.width, row.patch, row.blocks)


def row_named(name: str) -> TimmRow:
    return next(row for row in TIMM_ROWS if row.name == name)


def test_the_models_own_pooling(shallow: None) -> None:
    row = row_named("vit_pe_core_tiny_patch16_384.fb")  # attention pooling
    teacher = load(row, pool="model")
    assert teacher.spec.options == {"pool": "model"}
    images = noise_images(side_of(row))
    pooled = teacher.encode(images).pooled
    model: Any = teacher.model
    values = (images / 255 - 0.5) / 0.5
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(values), pre_logits=True)
    assert torch.allclose(pooled, expected, atol=1e-5)
    assert not torch.allclose(pooled, teacher.encode(images).grid.mean(dim=(1, 2)), atol=1e-3)
    assert load(row).spec.options == {}


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("timm:test_vit", {"pool": "max"}, r"unknown pooling 'max': expected mean, cls, model"),
        ("timm:test_efficientnet", {"pool": "cls"}, r"has no class token, use --pool mean or model"),
        (
            "timm:mobilenetv3_small_050",
            {"pool": "model"},
            r"pooling gives \[1024\] numbers .* grid of .* 288",
        ),
        ("qwen3-vl", {"pool": "cls"}, r"--pool cls: qwen3-vl has no class token"),
        ("timm:test_vit", {"image_size": 150}, r"patches of timm:test_vit have 16×16 pixels.*e.g. 144×144"),
    ],
)
def test_poolings_and_sizes_that_a_model_lacks(name: str, options: dict[str, Any], problem: str) -> None:
    random = {"random_weights": True} if name.startswith("timm") else {"path": "somewhere"}
    with pytest.raises(TeacherError, match=problem):
        load_teacher(name, device="cpu", **random, **options)


def test_a_wrong_count_of_prefix_tokens_is_refused() -> None:
    teacher = load_teacher("timm:test_vit", device="cpu", random_weights=True, image_size=160)
    assert isinstance(teacher, TimmTeacher)
    teacher.model.num_prefix_tokens = 3  # type: ignore[assignment]
    tokens = torch.zeros(1, 101, teacher.spec.width)
    with pytest.raises(
        TeacherError, match=r"gives 101 tokens: expected 3 prefix tokens and a grid of 10×10, 103"
    ):
        as_grid(tokens, teacher.spec.width, teacher.model, (160, 160))


def test_weights_of_the_native_size_load_for_another_size(tmp_path: Path) -> None:
    """Learned positions are resampled as timm itself does it."""
    torch.manual_seed(0)
    native = timm.create_model("test_vit", img_size=160)
    torch.save(native.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher("timm:test_vit", str(tmp_path / "weights.pth"), device="cpu", image_size=96)
    assert isinstance(teacher, TimmTeacher)
    overlay = {"state_dict": native.state_dict()}
    expected: Any = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96
    )
    assert torch.equal(teacher.model.pos_embed, expected.pos_embed)
    assert teacher.grid_size(96, 96) == (6, 6)


@pytest.mark.parametrize(
    ("license", "notice"),
    [
        ("apache-2.0", None),
        (None, None),
        ("cc-by-nc-4.0", "license cc-by-nc-4.0: no commercial use"),
        ("dinov3-license", "need an agreement"),
        ("seer-license", "license seer-license: read its terms before you use the features"),
    ],
)
def test_licenses_that_restrict_use_are_named(license: str | None, notice: str | None) -> None:
    got = license_notice(license)
    assert got is None if notice is None else notice in str(got)
