"""The classic U-Net with batch normalization.

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015. Base width
64 is the paper's (31.0 M parameters with transposed convolutions and batch norm); 48 and 32 give 17.5 M and 7.8 M.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from train.students.base import Student, StudentError, StudentOutput, StudentSpec
from train.students.families import FAMILIES, StudentName

STRIDE = 16


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3×3 convolutions with batch norm and ReLU; the padding keeps H and W."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(Student):
    """Four halvings, four doublings, skip connections; the bottleneck map is distilled.

    Levels: P4 is the bottleneck, P3 to P0 are the decoder's maps of stride 8 to 1.
    """

    last_level = "P4"

    def __init__(self, base_width: int, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.head_prefixes = ("head.",)
        self.checkpointing = False
        widths = [base_width * 2**level for level in range(5)]
        self.encoder = nn.ModuleList(map(double_convolution, [3, *widths[:-1]], widths))
        pairs = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, stride=2) for low, high in pairs)
        self.decoder = nn.ModuleList(double_convolution(low, high) for low, high in pairs)
        self.head = nn.Conv2d(base_width, spec.num_classes, 1) if spec.num_classes else nn.Identity()
        self.level_widths = {f"P{level}": widths[level] for level in reversed(range(4))}
        if not spec.num_classes:
            self.default_levels = ("P0",)

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        """`images` float [B, 3, H, W] → logits [B, C, H, W] or None, features [B, 16·base, H/16, W/16].

        Label-free, P0 is taught by default, so that the decoder learns the teacher's features too.
        """
        skips: list[Tensor] = []
        maps = images
        for level, block in enumerate(self.encoder):
            maps = self._run(block, functional.max_pool2d(maps, 2) if level else maps)
            skips.append(maps)
        features = skips.pop()
        decoded = self._decode(features, skips)
        logits = self.head(decoded["P0"]) if self.spec.num_classes else None
        return StudentOutput(logits, features, self.chosen_maps(features, decoded))

    def _decode(self, maps: Tensor, skips: list[Tensor]) -> dict[str, Tensor]:
        """The decoder's maps by level."""
        decoded = {}
        for level, up, block in zip(self.level_widths, self.up, self.decoder, strict=True):
            skip = skips.pop()
            maps = _pad_to(up(maps), skip)
            maps = decoded[level] = self._run(block, torch.cat([skip, maps], dim=1))
        return decoded

    def _run(self, block: nn.Module, maps: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, maps, use_reentrant=False)
        else:
            out = block(maps)
        return out

    def rest_levels(self) -> None:
        finest = max(
            (number for number, level in enumerate(self.level_widths, 1) if level in self.levels), default=0
        )
        self.up[finest:].requires_grad_(False)
        self.decoder[finest:].requires_grad_(False)

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute each double convolution in the backward pass."""
        self.checkpointing = enable


def _pad_to(maps: Tensor, reference: Tensor) -> Tensor:
    """Sizes that 16 does not divide lose an odd row or column on the way down: add it back."""
    rows = reference.shape[-2] - maps.shape[-2]
    columns = reference.shape[-1] - maps.shape[-1]
    return functional.pad(maps, (0, columns, 0, rows)) if rows or columns else maps


def build_unet(name: StudentName, *, num_classes: int, image_size: int) -> UNet:
    """Build `unet/small|medium|large`; StudentError for images under 16 pixels."""
    if image_size < STRIDE:
        raise StudentError(f"image_size {image_size} is too small for {name}: at least {STRIDE}")
    width = FAMILIES[name.type].sizes[name.size]
    spec = StudentSpec.of(
        name,
        num_classes,
        image_size=image_size,
        feature_width=width * 16,
        feature_kind="map",
        feature_stride=STRIDE,
        distilled_layer="bottleneck map",
    )
    return UNet(width, spec)
