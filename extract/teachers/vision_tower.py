"""The vision towers of Qwen2.5-VL, Qwen3-VL and Qwen3.5 in plain torch: raster order in, raster order out.

Shapes: `B` images, `h w` patches per side, `N = h·w` tokens, `D` width, `A` heads, `W` windows of one shape.

transformers runs one attention call per window and image, because its images may all differ in size. Here a
batch has one size, so its windows fall into at most four shapes (whole, cut at the right, cut at the bottom, the
corner). Tokens are sorted by window shape once at the beginning; after that a block makes one attention call per
shape, over all windows of all images, without masks: flash attention stays possible. They are sorted back at the
end. Nothing inside the forward pass reads a value back to the host, so it compiles as one graph.

The towers of Qwen3-VL and Qwen3.5 (they are the same) differ from that of Qwen2.5-VL in their parts, not in the pass:
LayerNorm instead of RMSNorm, a plain MLP instead of a gated one, a bias in the patch embedding, learned positions
in addition to rotary ones, and no windows, so that an image is one window.
"""

# Calling a torch module gives Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The shape of a tower, with the names of the checkpoint's `vision_config`; the defaults are Qwen2.5-VL's.

    window_size: pixels of a window's side; 0: no windows. num_position_embeddings: learned positions, a square of
    them; 0: none. norm, gated_mlp, patch_bias: structure, which `vision_config` does not state.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    hidden_act: str = "silu"
    rope_theta: float = 10_000.0
    num_position_embeddings: int = 0
    norm: Literal["rms", "layer"] = "rms"
    gated_mlp: bool = True
    patch_bias: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: channels × frames × height × width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches along one side of a whole attention window (8 for 112 pixels); 0: no windows."""
        return self.window_size // self.spatial_merge_size // self.patch_size * self.spatial_merge_size


class WindowGroup(NamedTuple):
    """Windows of one shape: tokens `[start, start + windows · tokens)` of each image."""

    start: int
    windows: int
    tokens: int


class GridLayout(NamedTuple):
    """Everything that depends only on the grid's size; made once per size, kept on the device.

    order: int64 [N], raster index of the token at each sorted place. inverse: int64 [N], its inverse.
    cos, sin: float32 [N, 1, 1, head_dim], see `rotary_angles`, in sorted order.
    groups: the windows by shape; together they cover 0..N.
    positions: [N, D] in the tower's dtype, the learned positions in sorted order; None for a tower without.
    """

    order: Tensor
    inverse: Tensor
    cos: Tensor
    sin: Tensor
    groups: tuple[WindowGroup, ...]
    positions: Tensor | None = None


def grid_layout(config: TowerConfig, h: int, w: int, device: torch.device | str = "cpu") -> GridLayout:
    """Window order and rotary angles of an h × w patch grid."""
    order, groups = window_order(h, w, config.window_patches or max(h, w))
    cos, sin = rotary_angles(config, order // w, order % w)
    inverse = torch.argsort(order)
    return GridLayout(order.to(device), inverse.to(device), cos.to(device), sin.to(device), groups)


def interpolate_positions(table: Tensor, h: int, w: int) -> Tensor:
    """Learned positions [h·w, D] in raster order, of a square table [side², D]; computed in float32.

    The corners of the grid are those of the table, whatever the grid's size (`align_corners`).
    """
    side = math.isqrt(table.shape[0])
    square = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=True)
    return grid[0].flatten(1).t().to(table.dtype)


def window_order(h: int, w: int, side: int) -> tuple[Tensor, tuple[WindowGroup, ...]]:
    """Raster indices sorted by window shape, then window; and the groups of equal windows.

    Windows start at the top left corner and are cut at the right and bottom edges, as in the original.
    Inside a window the tokens are in raster order: attention does not care, rotary angles travel along.
    """
    raster = torch.arange(h * w).reshape(h, w)
    whole_h, whole_w = h // side * side, w // side * side
    parts, groups, start = [], [], 0
    for top, bottom in ((0, whole_h), (whole_h, h)):
        for left, right in ((0, whole_w), (whole_w, w)):
            block = raster[top:bottom, left:right]
            if block.numel() == 0:
                continue
            rows, columns = min(side, bottom - top), min(side, right - left)
            windows = block.unfold(0, rows, rows).unfold(1, columns, columns).reshape(-1, rows * columns)
            parts.append(windows.flatten())
            groups.append(WindowGroup(start, windows.shape[0], windows.shape[1]))
            start += windows.numel()
    return torch.cat(parts), tuple(groups)


def rotary_angles(config: TowerConfig, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [N, 1, 1, head_dim], of two-dimensional rotary positions.

    The first half of a head's frequencies turns with the row, the second with the column; the table is repeated
    for the two halves that `rotate` exchanges (arXiv 2104.09864, in the axial form of Qwen2-VL, 2409.12191). The first
    half of sin is negated, so that `rotate` needs no negated copy.
    """
    spatial = config.head_dim // 2
    exponents = torch.arange(0, spatial, 2, dtype=torch.float32) / spatial
    frequencies = 1.0 / (config.rope_theta**exponents)
    half = torch.cat([rows[:, None].float() * frequencies, columns[:, None].float() * frequencies], dim=-1)
    cos, sin = half.cos(), half.sin()
    return torch.cat([cos, cos], dim=-1)[:, None, None, :], torch.cat([-sin, sin], dim=-1)[:, None, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, N, 2, A, head_dim] by the rotary angles, computed in float32.

    The halves are exchanged by `roll`: compiled, it is read in place, where `cat` of the halves writes a float32 copy.
    """
    x32 = x.float()
    return (x32 * cos + x32.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm; the statistics in float32 whatever the model's dtype."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)  # one kernel on a GPU


def norm_layer(config: TowerConfig) -> nn.Module:
    """The norm before attention and MLP."""
    return RMSNorm(config.hidden_size) if config.norm == "rms" else nn.LayerNorm(config.hidden_size, eps=1e-6)


class Attention(nn.Module):
    """Self-attention inside windows, or over the whole image when `groups` is one window of N tokens."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, layout: GridLayout, groups: tuple[WindowGroup, ...]) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        qk = rotate(qkv[:, :, :2], layout.cos, layout.sin)
        v = qkv[:, :, 2]
        parts = [self.attend(qk, v, group) for group in groups]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.proj(mixed.reshape(batch, tokens, width))  # attention kernels differ in their strides

    def attend(self, qk: Tensor, v: Tensor, group: WindowGroup) -> Tensor:
        """One attention call over all windows of one shape: [B, windows · tokens, A, head_dim]."""
        batch = v.shape[0]
        length = group.windows * group.tokens
        if length != v.shape[1]:
            qk, v = qk.narrow(1, group.start, length), v.narrow(1, group.start, length)
        q, k = qk.unbind(2)
        shape = (batch * group.windows, group.tokens, self.num_heads, self.head_dim)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, length, self.num_heads, self.head_dim)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation of GELU."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


def pad_mlp_width(tower: VisionTower, multiple: int = 64) -> None:
    """Widen the hidden layer of every gated MLP to a multiple of `multiple` with units whose weights and biases are 0.

    The published width of 3420 gives rows of 6,840 bytes in bfloat16, which are not aligned to the 16 bytes that the
    fast matrix kernels of a GPU load at once. The added units are silu(0) · 0 = 0: the output is the same sum. The
    widths of the plain MLPs (4304, 4096, 3072) are aligned, so these are left as they are.
    """
    for block in tower.blocks:
        mlp = block.mlp
        if not isinstance(mlp, GatedMLP):
            continue
        missing = -mlp.down_proj.in_features % multiple
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight = frozen(F.pad(layer.weight, (0, 0, 0, missing)))
            layer.bias = frozen(F.pad(layer.bias, (0, missing)))
            layer.out_features += missing
        mlp.down_proj.weight = frozen(F.pad(mlp.down_proj.weight, (0, missing)))
        mlp.down_proj.in_features += missing


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(config)
        self.norm2 = norm_layer(config)
        self.attn = Attention(config)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)

    def forward(self, x: Tensor, layout: GridLayout, groups: tuple[WindowGroup, ...]) -> Tensor:
        x = x + self.attn(self.norm1(x), layout, groups)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches to tokens. The weight keeps the checkpoint's 3-d convolution shape [D, C, frames, p, p].

    Patches do not overlap, so the convolution is one matrix product, which is faster on every device.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, stride=kernel, bias=config.patch_bias
        )

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTower(nn.Module):
    """The tower without its merger. Parameter names are those of the checkpoint below `visual.`."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = (
            nn.Embedding(config.num_position_embeddings, config.hidden_size)
            if config.num_position_embeddings
            else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def layout(self, h: int, w: int) -> GridLayout:
        """What the forward pass needs to know of an h × w patch grid, on the weights' device."""
        layout = grid_layout(self.config, h, w, self.patch_embed.proj.weight.device)
        if self.pos_embed is None:
            return layout
        positions = interpolate_positions(self.pos_embed.weight, h, w)
        return layout._replace(positions=positions.index_select(0, layout.order))

    def forward(self, patches: Tensor, layout: GridLayout, layers: tuple[int, ...] = ()) -> list[Tensor]:
        """Encode patches [B, N, patch_values] in raster order to tokens [B, N, D] in raster order.

        The outputs keep the model's dtype: the residual stream after each block of `layers` (ascending numbers from 0),
        and after the last block, before the merger.
        """
        x = self.patch_embed(patches.index_select(1, layout.order))
        if layout.positions is not None:
            x = x + layout.positions
        whole = (WindowGroup(0, 1, x.shape[1]),)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, layout, whole if index in self.config.fullatt_block_indexes else layout.groups)
            if index in layers:
                outputs.append(x.index_select(1, layout.inverse))
        return [*outputs, x.index_select(1, layout.inverse)]
