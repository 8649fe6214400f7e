"""What a teacher is, and the table of the teachers there are.

Shapes: `B` images, `H W` pixels, `h w` grid cells, `D` width. torch is imported only with a teacher.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

    pooled: float32 [B, D], the mean of the tokens inside the image, or what `--pool` names.
    grid: float32 [B, h, w, D] in raster order (row by row from the top left).
    layers: the grids of the teacher's further layers by their number, each float32 [B, h_L, w_L, D_L].
    """

    pooled: torch.Tensor
    grid: torch.Tensor
    layers: Mapping[int, torch.Tensor] = field(default_factory=dict)


class Layer(NamedTuple):
    """A layer before the last whose features are encoded too: its number, counted from 0, and its width."""

    number: int
    width: int


@runtime_checkable
class Teacher(Protocol):
    """A frozen image encoder.

    temporal_patch_size: frames of a clip that it encodes together, as uint8 [B, frames, 3, H, W]; 1: single frames.
    layers: further layers that `encode` gives, in ascending order. license: of the published weights, as the hub spells it
    (`apache-2.0`); None: not known, or random weights. trained_size: side in pixels of the images that the weights were
    trained with; None: any size, or random weights.
    """

    spec: TeacherSpec
    preprocessing: Preprocessing
    device: torch.device
    temporal_patch_size: int
    license: str | None
    trained_size: int | None
    layers: tuple[Layer, ...]

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

    def layer_sizes(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        """Grids (h, w) of the further layers, by number."""
        ...


class TeacherEntry(NamedTuple):
    """One row of the table: where the loader lives and what `cli teachers` prints about it."""

    target: str  # "module:function"
    description: str
    width: str
    patch: str
    blocks: str
    native: str
    weights: str
    license: str
    how_to_get: str


# Licenses of published weights that leave use free. What is not listed here is named before an extraction starts.
FREE_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")
NON_COMMERCIAL = "no commercial use"
CONDITIONS = "commercial use is allowed under its conditions"
LICENSE_TERMS = {
    "apple-amlr": "Apple Machine Learning Research Model License, research only",
    "apple-ascl": "Apple Sample Code License",
    "cc-by-nc-4.0": NON_COMMERCIAL,
    "dinov3-license": f"DINOv3 License, {CONDITIONS}; Meta's own repositories on the hub need an agreement",
    "fair-noncommercial-research-license": NON_COMMERCIAL,
    "nvidia-open-model-license": f"NVIDIA Open Model License, {CONDITIONS}",
    "qwen-research": f"Qwen Research License, {NON_COMMERCIAL}",
    "qwen": "Qwen License, commercial use above 100 million monthly users needs an agreement",
}


def license_notice(license: str | None) -> str | None:
    """One line about weights whose use is not free; None for free licenses and where none is known."""
    if license is None or license in FREE_LICENSES:
        return None
    return f"license {license}: {LICENSE_TERMS.get(license, 'read its terms before you use the features')}"


TEACHERS: dict[str, TeacherEntry] = {
    "qwen2.5-vl": TeacherEntry(
        "extract.teachers.qwen_vl:load_qwen_vl",
        "The vision tower of Qwen2.5-VL (any size), loaded alone; its output before the merger",
        "1280",
        "14",
        "32",
        "multiples of 28",
        "--teacher-path: a checkpoint folder or a Hugging Face name",
        "Apache-2.0 (7B, 32B); 3B and 72B: Qwen's own terms",
        "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir DIR (only the files with visual.* are needed)",
    ),
    "qwen3-vl": TeacherEntry(
        "extract.teachers.qwen_vl:load_qwen_vl",
        "The vision tower of Qwen3-VL (any size), loaded alone; its output before the merger",
        "1152 or 1024",
        "16",
        "27 or 24",
        "multiples of 32",
        "--teacher-path: a checkpoint folder or a Hugging Face name",
        "Apache-2.0",
        "hf download Qwen/Qwen3-VL-8B-Instruct --local-dir DIR (only the files with visual.* are needed)",
    ),
    "qwen3.5": TeacherEntry(
        "extract.teachers.qwen_vl:load_qwen_vl",
        "The vision tower of Qwen3.5 (any size), loaded alone; its output before the merger",
        "1152, 1024 or 768",
        "16",
        "27, 24 or 12",
        "multiples of 32",
        "--teacher-path: a checkpoint folder or a Hugging Face name",
        "Apache-2.0",
        "hf download Qwen/Qwen3.5-9B --local-dir DIR (only the files with visual.* are needed)",
    ),
    "timm:NAME": TeacherEntry(
        "extract.teachers.timm_encoder:load_timm",
        "Any timm image encoder, e.g. timm:tf_efficientnet_lite2; those below are tested",
        "the model's",
        "the model's",
        "the model's",
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
    pool: str = "mean",
    layers: str = "",
    **options: Any,
) -> Teacher:
    """Load the teacher `name`: `qwen2.5-vl`, `qwen3-vl`, `qwen3.5`, or `timm:NAME` for any timm model.

    path: checkpoint folder, weights file or hub name. device: `auto` takes CUDA where there is one.
    dtype: `auto` is bfloat16 on CUDA, float32 elsewhere. image_size: pixels of the square that images become.
    resize: `squash`, `letterbox` or `center-crop`. pool: what `pooled` is: `mean` of the tokens inside the image, `cls`
    token, or the `model`'s own pooling. layers: further layers, see `choose_layers`. options: what the teacher's own loader takes.

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
    import torch

    from extract.teachers.devices import memory_advice

    try:
        teacher: Teacher = loader(
            path,
            device=device,
            dtype=dtype,
            image_size=image_size,
            resize=resize,
            pool=pool,
            layers=layers,
            **options,
        )
    except torch.OutOfMemoryError:
        raise TeacherError(memory_advice(device, image_size)) from None
    return teacher


def choose_layers(layers: str, count: int, automatic: Sequence[int], what: str) -> tuple[int, ...]:
    """The numbers, ascending, of the layers that `layers` names besides the last, which is always encoded.

    layers: numbers counted from 0, like `8,16,24,last`, or `auto`; empty: none. count: how many layers there are.

    Raises:
        TeacherError: for what is no number, and for a layer that does not exist.
    """
    if layers.strip() == "auto":
        return tuple(automatic)
    chosen = set()
    for word in filter(None, (word.strip() for word in layers.split(","))):
        if word == "last":
            continue
        if not word.isdecimal():
            raise TeacherError(f"--layers {layers}: {word!r} is no layer; expected numbers, `last`, or auto")
        if int(word) >= count:
            raise TeacherError(f"--layers {layers}: {what} has {count} layers, 0 to {count - 1}; got {word}")
        chosen.add(int(word))
    return tuple(sorted(chosen))


def spread_layers(count: int) -> tuple[int, ...]:
    """The layers after a quarter, a half and three quarters of `count` blocks: 5, 11, 17 of 24."""
    return tuple(sorted({count * part // 4 - 1 for part in (1, 2, 3)} - {-1}))


def list_teachers() -> list[dict[str, str]]:
    """One record per teacher for `cli teachers`: the fields of TeacherEntry but `target`, and what the license asks for."""
    from extract.known_teachers import TIMM_ROWS

    any_timm = TEACHERS["timm:NAME"]
    entries = dict(TEACHERS)
    for row in TIMM_ROWS:
        entries[f"timm:{row.name}"] = any_timm._replace(
            description=row.family,
            width=str(row.width),
            patch=str(row.patch),
            blocks=str(row.blocks),
            native=str(row.native),
            license=row.license,
        )
    records = []
    for name, entry in entries.items():
        record = {key: value for key, value in entry._asdict().items() if key != "target"}
        records.append({"name": name, **record, "terms": LICENSE_TERMS.get(entry.license, "")})
    return records
