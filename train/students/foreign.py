"""Parameter names of other libraries → timm's: torchvision's ViT, transformers' ViT and ResNet.

torchvision's ResNet already has timm's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]

TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
)
TRANSFORMERS_VIT: Rules = (
    (r"^(?:vit|deit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
)
TRANSFORMERS_RESNET: Rules = (
    (r"^resnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^classifier\.1\.", "fc."),
)
QKV = re.compile(
    r"^(?:vit\.|deit\.)?(?:encoder\.layer|layers)\.(\d+)\.attention\."
    r"(?:attention\.(query|key|value)|(q|k|v)_proj)\.(weight|bias)$"
)
RESNET_LAYER = re.compile(
    r"^(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.(layer\.(\d+)|shortcut)\.(convolution|normalization)\.(.+)$"
)


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recognise torchvision's and transformers' names and translate them; other names stay as they are."""
    converter = next((convert for mark, convert in CONVERTERS if any(mark in key for key in state)), None)
    return state if converter is None else converter(state)


def rename(state: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Apply every rule to every name, in order."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def from_transformers_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers `ViTModel`, `ViTForImageClassification` (DeiT without distillation): query, key, value are one."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in state.items():
        match = QKV.match(key)
        if match:
            which = (match[2] or match[3])[0]
            parts.setdefault((match[1], match[4]), {})[which] = value
        elif ".pooler." not in f".{key}":
            rest[key] = value
    joined = {
        f"blocks.{block}.attn.qkv.{kind}": torch.cat([part["q"], part["k"], part["v"]])
        for (block, kind), part in parts.items()
        if {"q", "k", "v"} <= part.keys()
    }
    return {**rename(rest, TRANSFORMERS_VIT), **joined}


def from_transformers_resnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers `ResNetModel`, `ResNetForImageClassification` (microsoft/resnet-50 and its sisters)."""
    renamed: dict[str, Tensor] = {}
    for key, value in rename(state, TRANSFORMERS_RESNET).items():
        match = RESNET_LAYER.match(key)
        renamed[resnet_name(match) if match else key] = value
    return renamed


def resnet_name(match: re.Match[str]) -> str:
    """`encoder.stages.0.layers.1.layer.2.normalization.weight` → `layer1.1.bn3.weight`."""
    block = f"layer{int(match[1]) + 1}.{match[2]}"
    if match[3] == "shortcut":
        return f"{block}.downsample.{0 if match[5] == 'convolution' else 1}.{match[6]}"
    kind = "conv" if match[5] == "convolution" else "bn"
    return f"{block}.{kind}{int(match[4]) + 1}.{match[6]}"


#: A piece of a name that only one library uses → its translator.
CONVERTERS: tuple[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]], ...] = (
    ("encoder.layers.encoder_layer_", partial(rename, rules=TORCHVISION_VIT)),
    ("embeddings.patch_embeddings.projection", from_transformers_vit),
    ("embedder.embedder.convolution", from_transformers_resnet),
)
