"""What a teacher is, and the table of the teachers there are.

Shapes: `B` images, `H W` pixels, `h w` grid cells, `D` width. torch is imported only with a teacher.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from store.errors import DistillError
from store.format import Preprocessing, TeacherSpec

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class TeacherError(DistillError):
    """A teacher cannot be loaded, or cannot encode what it was given."""


class CheckpointError(TeacherError):
    """A checkpoint folder or file is missing, damaged, incomplete or of another architecture."""


@dataclass(frozen=True)
class Encoded:
    """The features of a batch; tensors on the teacher's device.

    pooled: float32 [B, D], the mean of the tokens inside the image.
    grid: float32 [B, h, w, D] in raster order (row by row from the top left).
    """

    pooled: torch.Tensor
    grid: torch.Tensor


@runtime_checkable
class Teacher(Protocol):
    """A frozen image encoder.

    temporal_patch_size: frames of a clip that it encodes together, as uint8 [B, frames, 3, H, W]; 1: single frames.
    """

    spec: TeacherSpec
    preprocessing: Preprocessing
    device: torch.device
    temporal_patch_size: int

    def encode(
        self, images: Sequence[Image] | torch.Tensor, *, inside: torch.Tensor | None = None
    ) -> Encoded:
        """Encode PIL images (resized as in `preprocessing`) or uint8 [B, 3, H, W] (taken as they are).

        inside: float [B, h, w] ≥ 0, how much of each grid cell shows the image and not padding; weights of the
        mean in `pooled`. None: all of it, or for PIL images what the resize policy makes of them.

        Raises:
            TeacherError: when the shape, dtype or size is not one the teacher takes.
        """
        ...

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of an image of this many pixels."""
        ...


class TeacherEntry(NamedTuple):
    """One row of the table: where the loader lives and what `cli teachers` prints about it."""

    target: str  # "module:function"
    description: str
    width: str
    weights: str
    licence: str
    how_to_get: str


TEACHERS: dict[str, TeacherEntry] = {
    "qwen2.5-vl": TeacherEntry(
        "extract.teachers.qwen_vl:load_qwen_vl",
        "The vision tower of Qwen2.5-VL (any size), loaded alone; its output before the merger",
        "1280",
        "--teacher-path: a checkpoint folder or a Hugging Face name",
        "Apache-2.0 (7B, 32B); 3B and 72B: Qwen's own terms",
        "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir DIR (only the files with visual.* are needed)",
    ),
    "qwen3-vl": TeacherEntry(
        "extract.teachers.qwen_vl:load_qwen_vl",
        "The vision tower of Qwen3-VL (any size), loaded alone; its output before the merger",
        "1152 (8B and larger), 1024 (2B, 4B)",
        "--teacher-path: a checkpoint folder or a Hugging Face name",
        "Apache-2.0",
        "hf download Qwen/Qwen3-VL-8B-Instruct --local-dir DIR (only the files with visual.* are needed)",
    ),
    "qwen3.5": TeacherEntry(
        "extract.teachers.qwen_vl:load_qwen_vl",
        "The vision tower of Qwen3.5 (any size), loaded alone; its output before the merger",
        "1152, 1024 or 768",
        "--teacher-path: a checkpoint folder or a Hugging Face name",
        "Apache-2.0",
        "hf download Qwen/Qwen3.5-9B --local-dir DIR (only the files with visual.* are needed)",
    ),
    "timm:NAME": TeacherEntry(
        "extract.teachers.timm_encoder:load_timm",
        "Any timm image encoder, e.g. timm:tf_efficientnet_lite2 or timm:vit_base_patch14_dinov2",
        "the model's",
        "--teacher-path FILE, or timm's own from the hub",
        "the model's",
        "with a network nothing is to be done; else give a state dict with --teacher-path",
    ),
}


def load_teacher(
    name: str,
    path: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    image_size: int = 224,
    resize: str = "squash",
    **options: Any,
) -> Teacher:
    """Load the teacher `name`: `qwen2.5-vl`, `qwen3-vl`, `qwen3.5`, or `timm:NAME` for any timm model.

    path: checkpoint folder, weights file or hub name. device: `auto` takes CUDA where there is one.
    dtype: `auto` is bfloat16 on CUDA, float32 elsewhere. image_size: pixels of the square that images become.
    resize: `squash`, `letterbox` or `center-crop`. options: what the teacher's own loader takes.

    Raises:
        TeacherError: an unknown name or an option the teacher cannot follow.
        CheckpointError: weights that are missing, damaged or of another architecture.
    """
    family, _, model = name.partition(":")
    key = "timm:NAME" if family == "timm" else name
    if key not in TEACHERS:
        raise TeacherError(f"unknown teacher {name!r}: valid are {', '.join(TEACHERS)}")
    if key == "timm:NAME":
        if not model:
            raise TeacherError("teacher timm: needs a model name, e.g. timm:tf_efficientnet_lite2")
        options["model_name"] = model
    else:
        options["family"] = name
    module, function = TEACHERS[key].target.split(":")
    loader = getattr(importlib.import_module(module), function)
    teacher: Teacher = loader(
        path, device=device, dtype=dtype, image_size=image_size, resize=resize, **options
    )
    return teacher


def list_teachers() -> list[dict[str, str]]:
    """One record per teacher for `cli teachers`: name, description, width, weights, licence, how_to_get."""
    return [
        {"name": name, **{key: value for key, value in entry._asdict().items() if key != "target"}}
        for name, entry in TEACHERS.items()
    ]
