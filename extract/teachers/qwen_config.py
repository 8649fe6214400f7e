"""The families of Qwen vision towers, and what a checkpoint's configuration files say of its tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extract.known_teachers import QWEN_CHECKPOINTS
from extract.teachers.base import CheckpointError, spread_layers
from extract.teachers.checkpoint import read_json
from extract.teachers.vision_tower import TowerConfig

TENSOR_PREFIXES = ("visual.", "model.visual.")  # of the tower's tensors in a checkpoint
RANDOM_WEIGHTS_FILE = "random_weights.json"  # marks a checkpoint that is made here
# Keys of `vision_config` that describe the tower. They are part of its fingerprint: do not change them.
SHAPE_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "hidden_act",
    "rope_theta",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints whose towers have the same parts.

    model_types: of config.json. tower: the parts, and the values that config.json may leave out. keys: those of
    `vision_config` that describe the tower. mean, std, max_pixels: preprocessor_config.json of the published
    checkpoints; used when the folder has none. model: transformers' name of the whole model, without its ending.
    reference: its class of the tower, "module:class". licenses: of the published checkpoints by the width of their language model; None: of all others.
    """

    title: str
    example: str
    model_types: tuple[str, ...]
    tower: TowerConfig
    keys: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int
    model: str
    reference: str
    licenses: Mapping[int | None, str]


QWEN3_TOWER = TowerConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    patch_size=16,
    window_size=0,
    fullatt_block_indexes=(),
    hidden_act="gelu_pytorch_tanh",
    num_position_embeddings=48 * 48,
    norm="layer",
    gated_mlp=False,
    patch_bias=True,
)
FAMILIES = {
    "qwen2.5-vl": Family(
        title="Qwen2.5-VL",
        example="Qwen/Qwen2.5-VL-7B-Instruct",
        model_types=QWEN_CHECKPOINTS["qwen2.5-vl"].model_types,
        tower=TowerConfig(),
        keys=(*SHAPE_KEYS, "window_size", "fullatt_block_indexes"),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        max_pixels=28 * 28 * 16384,
        model="Qwen2_5_VL",
        reference="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
        licenses={
            2048: "qwen-research",
            3584: "apache-2.0",
            5120: "apache-2.0",
            8192: "qwen",
        },  # 3B, 7B, 32B, 72B
    ),
    "qwen3-vl": Family(
        title="Qwen3-VL",
        example="Qwen/Qwen3-VL-8B-Instruct",
        model_types=QWEN_CHECKPOINTS["qwen3-vl"].model_types,
        tower=QWEN3_TOWER,
        keys=(*SHAPE_KEYS, "num_position_embeddings"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        max_pixels=4096 * 4096,
        model="Qwen3VL",
        reference="transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionModel",
        licenses={None: "apache-2.0"},
    ),
    "qwen3.5": Family(
        title="Qwen3.5",
        example="Qwen/Qwen3.5-9B",
        model_types=QWEN_CHECKPOINTS["qwen3.5"].model_types,
        tower=QWEN3_TOWER,
        keys=(*SHAPE_KEYS, "num_position_embeddings"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        max_pixels=4096 * 4096,
        model="Qwen3_5",
        reference="transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5VisionModel",
        licenses={None: "apache-2.0"},
    ),
}


def read_tower_config(folder: Path, family: str) -> TowerConfig:
    """The tower's shape from config.json, in the spelling of transformers 4 or 5.

    Raises:
        CheckpointError: when it is of another family, lacks a value, or has one this code does not implement.
    """
    file = folder / "config.json"
    config = read_json(file)
    expected = FAMILIES[family]
    if config.get("model_type") not in expected.model_types:
        raise CheckpointError(f"{file}: {another_family(config.get('model_type'), expected)}")
    vision = config.get("vision_config")
    if not isinstance(vision, dict) or "hidden_size" not in vision:
        raise CheckpointError(f"{file} has no vision_config with a hidden_size: download it again")
    vision = dict(vision)
    vision.setdefault("in_channels", vision.get("in_chans", 3))
    vision["rope_theta"] = (vision.get("rope_parameters") or {}).get("rope_theta", TowerConfig.rope_theta)
    values = {key: vision[key] for key in expected.keys if key in vision}
    if "fullatt_block_indexes" in values:
        values["fullatt_block_indexes"] = tuple(values["fullatt_block_indexes"])
    try:
        tower = replace(expected.tower, **values)
        sound = tower.hidden_act == expected.tower.hidden_act
        sound = sound and tower.hidden_size % (4 * tower.num_heads) == 0
        sound = sound and tower.depth > 0 and tower.in_channels == 3
        sound = sound and (tower.window_patches > 0 or not expected.tower.window_size)
        sound = sound and math.isqrt(tower.num_position_embeddings) ** 2 == tower.num_position_embeddings
        sound = sound and bool(tower.num_position_embeddings) == bool(expected.tower.num_position_embeddings)
    except (TypeError, ValueError, ZeroDivisionError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{file}: vision_config {values} is not a {expected.title} tower that this version can run"
        )
    return tower


def automatic_layers(folder: Path, config: TowerConfig) -> tuple[int, ...]:
    """What `--layers auto` takes: DeepStack's taps, the blocks before the last that see the whole image, or, where a tower
    has neither, those after a quarter, a half and three quarters of the blocks."""
    taps = read_json(folder / "config.json")["vision_config"].get("deepstack_visual_indexes") or ()
    found = sorted(index for index in (taps or config.fullatt_block_indexes) if 0 <= index < config.depth - 1)
    return tuple(found) or spread_layers(config.depth)


def published_license(folder: Path, family: str) -> str | None:
    """The license of the published checkpoint of this size; sizes of Qwen2.5-VL differ, told apart by their text width."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    width = (text if isinstance(text, dict) else config).get("hidden_size")
    return FAMILIES[family].licenses.get(width, FAMILIES[family].licenses.get(None))


def another_family(model_type: object, expected: Family) -> str:
    """What is wrong with a checkpoint of this model_type, and which teacher takes it."""
    for name, family in FAMILIES.items():
        if model_type in family.model_types:
            return (
                f"this is a {family.title} checkpoint (model_type {model_type!r}), expected {expected.title}: "
                f"use --teacher {name}, or give the folder of a {expected.title} checkpoint"
            )
    return (
        f"model_type is {model_type!r}, expected {expected.model_types[0]!r}: "
        f"give the folder of a {expected.title} checkpoint"
    )


def read_processor_config(folder: Path) -> dict[str, Any]:
    """The image processor's values, or an empty dict: then the published ones hold.

    transformers 5 saves a whole processor as processor_config.json; published folders have preprocessor_config.json.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return read_json(file)
    whole = folder / "processor_config.json"
    processor = read_json(whole).get("image_processor") if whole.is_file() else None
    return processor if isinstance(processor, dict) else {}
