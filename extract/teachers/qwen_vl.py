"""The teachers Qwen2.5-VL, Qwen3-VL and Qwen3.5: the vision tower alone, and the only file that knows transformers.

transformers is imported inside functions, by those that need the whole model (zero-shot logits) or make one (tiny
checkpoints). The tower itself runs on `vision_tower.py` and is held to transformers' own by tests.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from extract.known_teachers import QWEN_CHECKPOINTS
from extract.teachers.base import (
    CheckpointError,
    Encoded,
    Layer,
    Teacher,
    TeacherError,
    choose_layers,
    spread_layers,
)
from extract.teachers.checkpoint import (
    checkpoint_folder,
    find_tensors,
    fingerprint_of,
    hub_client,
    load_tensors,
    missing_files,
    one_line,
    read_json,
)
from extract.teachers.devices import (
    PREFERRED,
    CompiledBlocks,
    check_memory,
    pick_device,
    pick_dtype,
)
from extract.teachers.pixels import as_pixels, as_resize_policy, normalize, patchify, pooled_mean
from extract.teachers.vision_tower import (
    GridLayout,
    TowerConfig,
    VisionTower,
    pad_mlp_width,
)
from store.format import RANDOM_WEIGHTS_NOTICE, Preprocessing, TeacherSpec

if TYPE_CHECKING:
    from PIL.Image import Image

    from extract.teachers.zero_shot import LanguageModel, ZeroShotScorer

TENSOR_PREFIXES = ("visual.", "model.visual.")
RANDOM_WEIGHTS_FILE = "random_weights.json"
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


def save_random_checkpoint(
    folder: Path,
    *,
    vision: dict[str, Any],
    text: dict[str, Any],
    seed: int,
    family: str = "qwen2.5-vl",
    **config: Any,
) -> None:
    """Write a whole model of the family with random weights, made and saved by transformers itself.

    vision, text, config: values of the vision, text and outer configuration. The same seed gives the same bytes.

    Raises:
        TeacherError: when the installed transformers is older than the family.
    """
    import json

    import transformers
    from transformers.utils import logging

    kind = FAMILIES[family]
    try:
        config_class = getattr(transformers, f"{kind.model}Config")
        model_class = getattr(transformers, f"{kind.model}ForConditionalGeneration")
    except AttributeError:
        raise TeacherError(
            f"transformers {transformers.__version__} has no {kind.title}: install a newer one (pip install -U transformers)"
        ) from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(vision_config=vision, text_config=text, **config))
    model.save_pretrained(folder)
    processor = transformers.Qwen2VLImageProcessor(
        patch_size=kind.tower.patch_size,
        image_mean=list(kind.mean),
        image_std=list(kind.std),
        max_pixels=kind.max_pixels,
    )
    processor.save_pretrained(folder)
    record = {"random_weights": True, "seed": seed, "depth": vision["depth"], "notice": RANDOM_WEIGHTS_NOTICE}
    (folder / RANDOM_WEIGHTS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def transformers_encoder(path: str, teacher: QwenVLTeacher) -> tuple[str, Callable[[Tensor], Tensor]]:
    """transformers' own tower of the checkpoint at `path` in float32: its name, and a function from uint8 [1, 3, H, W]
    to features [1, h, w, D] in raster order.

    Raises:
        CheckpointError: when transformers does not load it.
    """
    import transformers
    from transformers.utils import logging

    kind, config = FAMILIES[teacher.spec.name], teacher.tower.config
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verbosity = logging.get_verbosity()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would list the language model's tensors
    folder = checkpoint_folder(path, TENSOR_PREFIXES)
    try:
        module, name = kind.reference.split(":")
        tower_class: Any = getattr(importlib.import_module(module), name)
        tower, report = tower_class.from_pretrained(
            folder,
            config=tower_class.config_class.from_dict(read_json(folder / "config.json")["vision_config"]),
            dtype=torch.float32,
            key_mapping={r"^(model\.)?visual\.": ""},
            output_loading_info=True,
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # OS, safetensors, JSON and configuration errors alike
        raise CheckpointError(
            f"--check {path}: transformers {transformers.__version__} does not load its vision tower "
            f"({one_line(error)}): it needs all files of the checkpoint; download it completely"
        ) from None
    finally:
        logging.set_verbosity(verbosity)  # type: ignore[no-untyped-call]
    if report["missing_keys"] or report["mismatched_keys"]:
        raise CheckpointError(
            f"--check {path}: transformers finds no {sorted(report['missing_keys'])[:1]} in it: is it a {kind.title} "
            "checkpoint?"
        )
    tower = tower.eval().requires_grad_(False).to(teacher.device)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        values = processor(images=list(pixels.cpu()), do_resize=False, return_tensors="pt")
        grids = values["image_grid_thw"].to(teacher.device)
        out = tower(values["pixel_values"].to(teacher.device), grid_thw=grids)
        h, w = teacher.grid_size(*pixels.shape[-2:])
        side = config.window_patches or max(h, w)
        places = torch.tensor(
            [
                row * w + column
                for window_row in range(0, h, side)
                for window_column in range(0, w, side)
                for block_row in range(window_row, min(window_row + side, h), 2)
                for block_column in range(window_column, min(window_column + side, w), 2)
                for row in (block_row, block_row + 1)
                for column in (block_column, block_column + 1)
            ],
            device=teacher.device,
        )
        grid = torch.empty_like(out.last_hidden_state)
        grid[places] = out.last_hidden_state
        return grid.view(1, h, w, -1)

    return f"transformers {transformers.__version__}", encode


def load_zero_shot(
    path: str | Path,
    teacher: Teacher,
    class_names: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    calibrate: bool = False,
) -> ZeroShotScorer:
    """A scorer of class names from the whole model at `path`, on the teacher's device and in its dtype.

    The tower is the teacher's own; of the checkpoint's, only the merger is kept. Options: see `ZeroShotScorer`.

    Raises:
        CheckpointError: when the language model or the tokenizer is missing or damaged.
        TeacherError: for a teacher that has no language model.
    """
    from extract.teachers.zero_shot import PROMPTS, ZeroShotScorer

    if not isinstance(teacher, QwenVLTeacher) or teacher.spec.name != "qwen2.5-vl":
        raise TeacherError(
            f"zero-shot logits need the teacher qwen2.5-vl, got {teacher.spec.name}: use --logits probe"
        )
    language = load_language_model(str(path), teacher.device, teacher.dtype)
    return ZeroShotScorer(language, teacher, class_names, prompts=prompts or PROMPTS, calibrate=calibrate)


def load_language_model(path: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Language model, merger and tokenizer of the checkpoint at `path` (folder or hub name)."""
    from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    from extract.teachers.zero_shot import LanguageModel

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(path)
    try:
        with hub_client():
            loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                path,
                dtype=dtype,
                device_map={"": str(device)},
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except Exception as error:  # OS, hub, safetensors and JSON errors alike
        raise incomplete_model(path, error) from None
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        absent = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
        raise CheckpointError(
            f"--teacher-path {path}: {len(absent)} tensors of the whole model are missing, first {absent[0]}"
        )
    model.requires_grad_(False).eval()
    model.model.visual.blocks = torch.nn.ModuleList()  # the teacher's own tower has encoded the images
    return LanguageModel(model, tokenizer, DynamicCache)


def load_tokenizer(path: str) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError when there is none, or another model's."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        with hub_client():
            tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    except Exception as error:  # OS, hub, JSON and tokenizer errors alike
        raise incomplete_model(path, error) from None
    start = config.vision_start_token_id
    if tokenizer.encode("<|vision_start|>", add_special_tokens=False) != [start]:
        raise CheckpointError(
            f"--teacher-path {path}: its tokenizer does not know <|vision_start|> as token {start}: "
            "download tokenizer.json and tokenizer_config.json of the same checkpoint"
        )
    return tokenizer


def incomplete_model(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"--teacher-path {path}: zero-shot logits need the whole model and its tokenizer, which do not load "
        f"({one_line(error)}): download the complete checkpoint, or use --logits probe"
    )


def check_zero_shot(path: str) -> None:
    """Raises CheckpointError where zero-shot scoring would: without tokenizer, or without files of the language model."""
    load_tokenizer(path)
    absent = missing_files(Path(path))
    if absent:
        raise CheckpointError(
            f"--teacher-path {path}: zero-shot logits need the whole model, {len(absent)} of its files are missing, "
            f"first {absent[0]}: download the complete checkpoint, or use --logits probe"
        )
