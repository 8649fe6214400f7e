"""What transformers does with Qwen checkpoints, the only file that knows it: random ones, its own tower to compare
with, and the language model for zero-shot logits.

transformers is imported inside the functions, so that a teacher's forward pass does not wait for it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extract.teachers.base import CheckpointError, Teacher, TeacherError
from extract.teachers.checkpoint import checkpoint_folder, hub_client, missing_files, one_line, read_json
from extract.teachers.qwen_config import FAMILIES, RANDOM_WEIGHTS_FILE, TENSOR_PREFIXES
from extract.teachers.qwen_vl import QwenVLTeacher
from store.format import RANDOM_WEIGHTS_NOTICE

if TYPE_CHECKING:
    from extract.teachers.zero_shot import LanguageModel, ZeroShotScorer


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
