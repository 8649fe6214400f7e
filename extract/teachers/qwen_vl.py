"""The teachers Qwen2.5-VL, Qwen3-VL and Qwen3.5: the vision tower alone, with its preprocessing.

The tower runs on `vision_tower.py`, without transformers, and is held to transformers' own by tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from extract.teachers.base import CheckpointError, Encoded, Layer, TeacherError, choose_layers
from extract.teachers.checkpoint import checkpoint_folder, find_tensors, fingerprint_of, load_tensors
from extract.teachers.devices import PREFERRED, CompiledBlocks, check_memory, pick_device, pick_dtype
from extract.teachers.pixels import as_pixels, as_resize_policy, normalize, patchify, pooled_mean
from extract.teachers.qwen_config import (
    FAMILIES,
    RANDOM_WEIGHTS_FILE,
    TENSOR_PREFIXES,
    automatic_layers,
    published_license,
    read_processor_config,
    read_tower_config,
)
from extract.teachers.vision_tower import GridLayout, VisionTower, pad_mlp_width
from store.format import Preprocessing, TeacherSpec

if TYPE_CHECKING:
    from PIL.Image import Image


class QwenVLTeacher:
    """The vision tower with its preprocessing; see `extract.teachers.base.Teacher`."""

    def __init__(
        self,
        tower: VisionTower,
        spec: TeacherSpec,
        preprocessing: Preprocessing,
        *,
        max_pixels: int,
        layers: tuple[int, ...] = (),
        license: str | None = None,
        compiled: CompiledBlocks | None = None,
    ) -> None:
        weight = tower.patch_embed.proj.weight
        self.tower, self.spec, self.preprocessing, self.max_pixels = tower, spec, preprocessing, max_pixels
        self.device, self.dtype = weight.device, weight.dtype
        self.temporal_patch_size = tower.config.temporal_patch_size
        self.mean = 255 * torch.tensor(preprocessing.mean, device=self.device).view(3, 1, 1)
        self.std = 255 * torch.tensor(preprocessing.std, device=self.device).view(3, 1, 1)
        self.license, self.compiled = license, compiled
        self.trained_size: int | None = None  # images of many sizes
        self.layers = tuple(Layer(number, tower.config.hidden_size) for number in layers)
        self.layouts: dict[tuple[int, int], GridLayout] = {}

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of an image of this many pixels.

        Raises:
            TeacherError: when a side is no multiple of patch × merge (28 or 32 pixels), or the image has more pixels
                than the checkpoint allows.
        """
        unit = self.tower.config.patch_size * self.tower.config.spatial_merge_size
        if height % unit or width % unit or not height or not width:
            raise TeacherError(
                f"image size {width}×{height}: both sides must be multiples of {unit}, e.g. "
                f"{max(1, width // unit) * unit}×{max(1, height // unit) * unit}"
            )
        if height * width > self.max_pixels:
            raise TeacherError(
                f"image size {width}×{height} is {height * width:,} pixels: the checkpoint's cap is "
                f"{self.max_pixels:,} (max_pixels in preprocessor_config.json); use a smaller --image-size"
            )
        return height // self.tower.config.patch_size, width // self.tower.config.patch_size

    def layer_sizes(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        """Grids of the further layers: those of the last."""
        return dict.fromkeys((layer.number for layer in self.layers), self.grid_size(height, width))

    @torch.inference_mode()
    def encode(self, images: Sequence[Image] | Tensor, *, inside: Tensor | None = None) -> Encoded:
        """pooled float32 [B, D] and grid float32 [B, h, w, D] in raster order; see `Teacher.encode`.

        A tensor may also be uint8 [B, 2, 3, H, W]: two consecutive frames of a clip, seen as one temporal patch.
        """
        pixels, inside = as_pixels(images, inside, self)
        *layers, grid = self.encode_grids(pixels)
        numbers = (layer.number for layer in self.layers)
        return Encoded(pooled_mean(grid, inside), grid, dict(zip(numbers, layers, strict=True)))

    def encode_grids(self, pixels: Tensor) -> list[Tensor]:
        """Tokens float32 [B, h, w, D] of uint8 pixels [B, 3, H, W] or [B, 2, 3, H, W]: of the further layers, and the last."""
        height, width = pixels.shape[-2:]
        h, w = self.grid_size(height, width)
        if (h, w) not in self.layouts:
            self.layouts[h, w] = self.tower.layout(h, w)
        config = self.tower.config
        values = normalize(pixels.to(self.device, non_blocking=True), self.mean, self.std).to(self.dtype)
        patches = patchify(values, config.patch_size, config.temporal_patch_size)
        outputs = self.run_tower(patches, self.layouts[h, w])
        return [tokens.float().view(pixels.shape[0], h, w, config.hidden_size) for tokens in outputs]

    def run_tower(self, patches: Tensor, layout: GridLayout) -> list[Tensor]:
        """The tower's tokens [B, N, D] of every layer; through the compiled blocks while the compiler works."""
        numbers = tuple(layer.number for layer in self.layers)
        with sdpa_kernel(PREFERRED, set_priority=True) if self.device.type == "cuda" else nullcontext():
            if self.compiled is not None:
                try:
                    return self.tower(patches, layout, numbers)  # type: ignore[no-any-return]
                except self.compiled.errors as error:
                    self.compiled.give_up(error)
                    self.compiled = None
            return self.tower(patches, layout, numbers)  # type: ignore[no-any-return]


def load_qwen_vl(
    path: str | Path | None,
    *,
    family: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    image_size: int = 224,
    resize: str = "squash",
    pool: str = "mean",
    layers: str = "",
    compile_tower: bool | None = None,
    pad_mlp: bool | None = None,
) -> QwenVLTeacher:
    """Load the vision tower of the checkpoint at `path`: a folder, or a Hugging Face name.

    family: a key of FAMILIES. image_size: pixels of the square's side. Only the files with needed tensors are opened; on a CPU in the
    stored dtype the weights stay mapped from the files. compile_tower: run its blocks through `torch.compile`; when
    that fails, a warning, and they run as they are. pad_mlp: see `pad_mlp_width`. Both are None for: on CUDA devices.

    Raises:
        CheckpointError, TeacherError: as `load_teacher`.
    """
    if path is None:
        raise TeacherError(
            f"teacher {family} needs --teacher-path: a checkpoint folder or a name like {FAMILIES[family].example} "
            f"(`cli make-tiny-teacher DIR --family {family}` makes a small random one to try things with)"
        )
    if pool != "mean":
        raise TeacherError(
            f"--pool {pool}: {family} has no class token and no pooling of its own, use --pool mean"
        )
    picked = pick_device(device)
    compute = pick_dtype(dtype, picked)
    folder = checkpoint_folder(str(path), TENSOR_PREFIXES)
    config = read_tower_config(folder, family)
    chosen = choose_layers(layers, config.depth, automatic_layers(folder, config), f"the tower of {path}")
    with torch.device("meta"):
        tower = VisionTower(config)
    shapes = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    entries = find_tensors(folder, TENSOR_PREFIXES, shapes, FAMILIES[family].title)
    for name, entry in entries.items():
        if entry.shape != shapes[name]:
            raise CheckpointError(
                f"{entry.file}: {entry.stored_name} has shape {list(entry.shape)}, config.json says "
                f"{list(shapes[name])}: the files do not belong together"
            )
    size = sum(math.prod(shape) for shape in shapes.values()) * compute.itemsize
    check_memory(picked, size, f"the vision tower in {str(compute).removeprefix('torch.')}")
    tower.load_state_dict(load_tensors(entries, picked, compute), assign=True)
    tower.requires_grad_(False).eval()
    on_cuda = picked.type == "cuda"
    if on_cuda if pad_mlp is None else pad_mlp:
        pad_mlp_width(tower)
    spec = TeacherSpec(
        name=family,
        fingerprint=fingerprint_of(entries, {key: getattr(config, key) for key in FAMILIES[family].keys}),
        layer=f"vision tower, after block {config.depth} of {config.depth}, before the merger",
        width=config.hidden_size,
        dtype=str(compute).removeprefix("torch."),
        random_weights=(folder / RANDOM_WEIGHTS_FILE).is_file(),
    )
    processor = read_processor_config(folder)
    preprocessing = Preprocessing(
        image_size=image_size,
        resize=as_resize_policy(resize),
        interpolation="bicubic",
        mean=tuple(processor.get("image_mean", FAMILIES[family].mean)),
        std=tuple(processor.get("image_std", FAMILIES[family].std)),
    )
    # Most pixels an image may have, in the spelling of transformers 4 or 5.
    cap = processor.get("max_pixels") or (processor.get("size") or {}).get("longest_edge")
    teacher = QwenVLTeacher(
        tower,
        spec,
        preprocessing,
        layers=chosen,
        license=None if spec.random_weights else published_license(folder, family),
        max_pixels=int(cap) if cap else FAMILIES[family].max_pixels,
        compiled=CompiledBlocks(tower.blocks)
        if (on_cuda if compile_tower is None else compile_tower)
        else None,
    )
    teacher.grid_size(image_size, image_size)
    return teacher
