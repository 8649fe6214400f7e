"""Teachers by name, without torch: which Qwen teacher takes a checkpoint folder, and the timm encoders that are tested.

`cli teachers` lists the encoders, and a platform's request is checked by these tables; any other timm encoder loads too.
Not in `extract.teachers`, which imports numpy: a request is checked before anything heavy is loaded.

The figures are those of timm's own models and configurations; `tests/test_extract/test_teacher_timm_rows.py` compares them,
and the features of each architecture with timm's `forward_intermediates`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from files.reading import read_regular


class TimmRow(NamedTuple):
    """One encoder: timm's name, width of its features, pixels of a patch (convolutions: their stride), native size."""

    name: str
    family: str
    width: int
    patch: int
    blocks: int
    native: int
    license: str


TIMM_ROWS = (
    TimmRow("vit_small_patch16_dinov3.lvd1689m", "DINOv3", 384, 16, 12, 256, "dinov3-license"),
    TimmRow("vit_small_plus_patch16_dinov3.lvd1689m", "DINOv3", 384, 16, 12, 256, "dinov3-license"),
    TimmRow("vit_base_patch16_dinov3.lvd1689m", "DINOv3", 768, 16, 12, 256, "dinov3-license"),
    TimmRow("vit_large_patch16_dinov3.lvd1689m", "DINOv3", 1024, 16, 24, 256, "dinov3-license"),
    TimmRow("vit_large_patch16_dinov3.sat493m", "DINOv3", 1024, 16, 24, 256, "dinov3-license"),
    TimmRow("vit_huge_plus_patch16_dinov3.lvd1689m", "DINOv3", 1280, 16, 32, 256, "dinov3-license"),
    TimmRow("convnext_tiny.dinov3_lvd1689m", "DINOv3", 768, 32, 18, 224, "dinov3-license"),
    TimmRow("convnext_small.dinov3_lvd1689m", "DINOv3", 768, 32, 36, 224, "dinov3-license"),
    TimmRow("convnext_base.dinov3_lvd1689m", "DINOv3", 1024, 32, 36, 224, "dinov3-license"),
    TimmRow("convnext_large.dinov3_lvd1689m", "DINOv3", 1536, 32, 36, 224, "dinov3-license"),
    TimmRow("vit_small_patch14_reg4_dinov2.lvd142m", "DINOv2 with registers", 384, 14, 12, 518, "apache-2.0"),
    TimmRow("vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2 with registers", 768, 14, 12, 518, "apache-2.0"),
    TimmRow(
        "vit_large_patch14_reg4_dinov2.lvd142m", "DINOv2 with registers", 1024, 14, 24, 518, "apache-2.0"
    ),
    TimmRow(
        "vit_giant_patch14_reg4_dinov2.lvd142m", "DINOv2 with registers", 1536, 14, 40, 518, "apache-2.0"
    ),
    TimmRow("vit_base_patch16_siglip_224.v2_webli", "SigLIP 2", 768, 16, 12, 224, "apache-2.0"),
    TimmRow("vit_base_patch16_siglip_512.v2_webli", "SigLIP 2", 768, 16, 12, 512, "apache-2.0"),
    TimmRow("vit_large_patch16_siglip_384.v2_webli", "SigLIP 2", 1024, 16, 24, 384, "apache-2.0"),
    TimmRow("vit_so400m_patch14_siglip_378.v2_webli", "SigLIP 2", 1152, 14, 27, 378, "apache-2.0"),
    TimmRow("vit_so400m_patch16_siglip_512.v2_webli", "SigLIP 2", 1152, 16, 27, 512, "apache-2.0"),
    TimmRow("vit_base_patch16_radio_v3.c_radio", "C-RADIO", 768, 16, 12, 512, "nvidia-open-model-license"),
    TimmRow("vit_large_patch16_radio_v3.c_radio", "C-RADIO", 1024, 16, 24, 512, "nvidia-open-model-license"),
    TimmRow("vit_so400m_patch16_radio_v4.c_radio", "C-RADIO", 1152, 16, 27, 512, "nvidia-open-model-license"),
    TimmRow("vit_huge_patch16_radio_v4.c_radio", "C-RADIO", 1280, 16, 32, 512, "nvidia-open-model-license"),
    TimmRow("vit_pe_core_tiny_patch16_384.fb", "Perception Encoder", 192, 16, 12, 384, "apache-2.0"),
    TimmRow("vit_pe_core_base_patch16_224.fb", "Perception Encoder", 768, 16, 12, 224, "apache-2.0"),
    TimmRow("vit_pe_core_large_patch14_336.fb", "Perception Encoder", 1024, 14, 24, 336, "apache-2.0"),
    TimmRow("vit_pe_spatial_tiny_patch16_512.fb", "Perception Encoder", 192, 16, 12, 512, "apache-2.0"),
    TimmRow("vit_pe_spatial_base_patch16_512.fb", "Perception Encoder", 768, 16, 12, 512, "apache-2.0"),
    TimmRow("vit_pe_spatial_large_patch14_448.fb", "Perception Encoder", 1024, 14, 24, 448, "apache-2.0"),
    TimmRow("vit_pe_spatial_gigantic_patch14_448.fb", "Perception Encoder", 1536, 14, 50, 448, "apache-2.0"),
    TimmRow("eva02_small_patch14_224.mim_in22k", "EVA-02", 384, 14, 12, 224, "mit"),
    TimmRow("eva02_base_patch14_224.mim_in22k", "EVA-02", 768, 14, 12, 224, "mit"),
    TimmRow("eva02_large_patch14_224.mim_m38m", "EVA-02", 1024, 14, 24, 224, "mit"),
    TimmRow("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", "EVA-02", 1024, 14, 24, 448, "mit"),
    TimmRow("vit_base_patch14_reg1_tipsv2.webli", "TIPSv2", 768, 14, 12, 448, "apache-2.0"),
    TimmRow("vit_large_patch14_reg1_tipsv2.webli", "TIPSv2", 1024, 14, 24, 448, "apache-2.0"),
    TimmRow("aimv2_large_patch14_224.apple_pt", "AIMv2", 1024, 14, 24, 224, "apple-ascl"),
    TimmRow("aimv2_large_patch14_448.apple_pt", "AIMv2", 1024, 14, 24, 448, "apple-ascl"),
    TimmRow("samvit_base_patch16.sa1b", "SAM", 256, 16, 12, 1024, "apache-2.0"),
)


class QwenCheckpoint(NamedTuple):
    """How a family of Qwen checkpoints is told from the others, before torch is imported.

    model_types: of config.json. side: sides of images are multiples of it, in pixels (patch × merge).
    """

    model_types: tuple[str, ...]
    side: int


QWEN_CHECKPOINTS = {
    "qwen2.5-vl": QwenCheckpoint(("qwen2_5_vl",), 28),
    "qwen3-vl": QwenCheckpoint(("qwen3_vl", "qwen3_vl_moe"), 32),
    "qwen3.5": QwenCheckpoint(("qwen3_5", "qwen3_5_moe"), 32),
}


def teacher_of_checkpoint(folder: Path) -> str | None:
    """The teacher (`qwen2.5-vl`, `qwen3-vl`, `qwen3.5`) that takes a checkpoint folder, from its config.json.

    None for a folder without one, or of another architecture.
    """
    try:
        config = json.loads(read_regular(folder / "config.json"))
    except (OSError, ValueError):
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return next((name for name, known in QWEN_CHECKPOINTS.items() if model_type in known.model_types), None)
