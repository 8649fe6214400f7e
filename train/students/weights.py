"""`--student-path`: local weights for a student, from any of the forms that users have them in.

Parameter names of torchvision's ViT, transformers' ViT and ResNet become timm's; torchvision's ResNet already has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from console.output import get_logger
from files.weights import WeightsError, read_weights
from train.students.base import InitialWeights, Student, StudentError

log = get_logger("train")

#: Where training programs keep the weights inside a checkpoint dictionary, in order of preference.
CONTAINERS = (
    "student_state_dict",
    "model_state_dict",
    "state_dict_ema",
    "state_dict",
    "model_ema",
    "model",
    "student",
)
#: Prefixes that wrappers (DDP, torch.compile, encoders of training programs) put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
LISTED = 6


def load_initial_weights(student: Student, path: Path) -> InitialWeights:
    """Fill `student` from `path`; returns (and sets on it) where the weights came from.

    `path` is a `.pt`, `.pth`, `.bin` or `.safetensors` file with a state dict of timm, torchvision or our own
    `best.pt`, or a Hugging Face folder (timm's or transformers' ResNet and ViT names). Pickles are read with
    `weights_only=True`. A head of another size, or none, is initialized randomly and named in the log. For an LSTM a plain
    ResNet-50 fills the frame encoder.

    Raises StudentError when the file is missing or unreadable, or when anything but the head does not fit; the
    text lists the keys.
    """
    found = to_timm_names(strip_wrappers(read_state_dict(path), student))
    found = resample_positions(found, student)
    expected = student.state_dict()
    found = as_frame_encoder(found, expected)
    head = head_names(expected, student.head_prefixes)
    fitting = {k: v for k, v in found.items() if k not in head or v.shape == expected[k].shape}
    refuse_misfits(path, student, fitting, expected, head)
    student.load_state_dict({**expected, **{k: v for k, v in fitting.items() if k in expected}})
    fresh = tuple(sorted(set(expected) - set(fitting) - ignorable(expected)))
    student.initial_weights = InitialWeights(str(path), fresh)
    log.info("%s: %d tensors from %s", student.spec.name, len(set(fitting) & set(expected)), path)
    if fresh:
        log.warning(
            "%s: initialized randomly: missing from the weights or of a different shape: %s",
            path,
            ", ".join(fresh),
        )
    return student.initial_weights


def load_phase_one(student: Student, checkpoint: Mapping[str, Any]) -> None:
    """Fill `student` from the checkpoint of phase one, which has a head only if it learned soft class maps.

    Raises StudentError for tensors of another shape.
    """
    expected = student.state_dict()
    found = resample_positions(dict(checkpoint["model_state_dict"]), student)
    fitting = {name: value for name, value in found.items() if name in expected}
    shapes = [name for name, value in fitting.items() if value.shape != expected[name].shape]
    if shapes:
        raise StudentError(
            f"phase one was trained with other sizes of {', '.join(shapes[:LISTED])}: start again with --overwrite"
        )
    student.load_state_dict({**expected, **fitting})
    student.initial_weights = InitialWeights("phase one")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file or folder, by name; StudentError when there are none."""
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise StudentError(f"student_path {path} does not exist")
    content = read_safetensors(path) if path.suffix == ".safetensors" else unpickle(path)
    state = find_tensors(content)
    if any(".lora_A." in key for key in state):
        return merged_run_weights(path, content)
    if not state:
        raise StudentError(f"student_path {path} holds no weights: expected a dictionary of tensors")
    return state


def read_folder(folder: Path) -> dict[str, Tensor]:
    """A Hugging Face folder: one weights file, or an index with its shards; or a run folder of ours."""
    for name in (*FOLDER_FILES, "best.pt"):
        if (folder / name).is_file():
            return read_state_dict(folder / name)
    for name in FOLDER_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {k: v for shard in shards for k, v in read_state_dict(folder / Path(shard).name).items()}
    raise StudentError(f"student_path {folder} is a folder without {', '.join(FOLDER_FILES)} or best.pt")


def merged_run_weights(path: Path, content: Any) -> dict[str, Tensor]:
    """The weights of a run of ours that trained with LoRA, its adapters folded in."""
    from train.checkpoint import load_student_from_run
    from train.lora import merge_lora

    if not isinstance(content, Mapping) or "student" not in content:
        raise StudentError(
            f"student_path {path} holds LoRA adapters that are not merged: merge them before saving"
        )
    return dict(merge_lora(load_student_from_run(path)[0]).state_dict())


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; StudentError for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StudentError(f"student_path {path} is not a readable safetensors file: {error}") from error


def unpickle(path: Path) -> Any:
    """A torch file without executing anything in it."""
    try:
        return read_weights(path)
    except (WeightsError, OSError) as error:
        raise StudentError(f"student_path {path}: weights cannot be read: {error}") from error


def find_tensors(content: Any, containers: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: of a pickled model, in one of the containers, or the content itself."""
    if isinstance(content, nn.Module):
        return dict(content.state_dict())
    if not isinstance(content, Mapping):
        return {}
    # Containers first: a checkpoint may hold other tensors beside its weights (random state, counters).
    inside = (find_tensors(content.get(key), containers) for key in containers)
    own = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return next((found for found in inside if found), own)


def strip_wrappers(state: dict[str, Tensor], student: Student) -> dict[str, Tensor]:
    """Remove a prefix that all names share and the student's own names lack (`module.`, `backbone.` …)."""
    own = student.state_dict().keys()
    for _ in range(3):
        shared = next((p for p in WRAPPERS if state and all(key.startswith(p) for key in state)), None)
        if shared is None or any(key.startswith(shared) for key in own):
            break
        state = {key.removeprefix(shared): value for key, value in state.items()}
    return state


def as_frame_encoder(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of a plain image encoder become those of an LSTM's frame encoder (its classifier is dropped)."""
    renamed = {f"encoder.{key}": value for key, value in found.items()}
    inside = {key: value for key, value in renamed.items() if key in expected}
    return inside if len(inside) > len(found) / 2 else found


def resample_positions(state: dict[str, Tensor], student: Student) -> dict[str, Tensor]:
    """Position embeddings of a ViT trained at another image size, resampled as timm does it."""
    model: Any = getattr(student, "model", None)
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or given.shape == own.shape or given.shape[-1] != own.shape[-1]:
        return state
    from timm.layers import resample_abs_pos_embed

    prefix = int(getattr(model, "num_prefix_tokens", 0))
    side = tuple(model.patch_embed.grid_size)
    log.info("position embeddings resampled from %d to %d tokens", given.shape[1], own.shape[1])
    return state | {"pos_embed": resample_abs_pos_embed(given, new_size=list(side), num_prefix_tokens=prefix)}


def head_names(expected: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> set[str]:
    """The student's parameters that belong to its task head."""
    return {key for key in expected if any(key.startswith(prefix) for prefix in prefixes)}


def ignorable(expected: Mapping[str, Tensor]) -> set[str]:
    """Counters that old checkpoints lack and that do not change results."""
    return {key for key in expected if key.endswith("num_batches_tracked")}


def refuse_misfits(
    path: Path,
    student: Student,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    head: set[str],
) -> None:
    """StudentError naming the keys that are missing, unknown or of another shape."""
    spare = head | ignorable(expected) | may_be_missing(student, found, expected)
    missing = sorted(set(expected) - set(found) - spare)
    prefixes = student.head_prefixes
    unknown = sorted(
        key for key in set(found) - set(expected) if not any(key.startswith(p) for p in prefixes)
    )
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(set(found) & set(expected))
        if found[key].shape != expected[key].shape
    ]
    problems = [
        f"{kind}: {', '.join(keys[:LISTED])}{f' and {len(keys) - LISTED} more' if len(keys) > LISTED else ''}"
        for kind, keys in (
            ("missing", missing),
            ("not in the student", unknown),
            ("of another shape", shapes),
        )
        if keys
    ]
    if problems:
        raise StudentError(f"student_path {path} does not fit {student.spec.name}: {'; '.join(problems)}")


def may_be_missing(student: Student, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[str]:
    """What an encoder alone cannot bring along: an LSTM's recurrent part."""
    if student.spec.type != "lstm" or any(key.startswith("lstm.") for key in found):
        return set()
    return {key for key in expected if not key.startswith("encoder.")}


# -- names of other libraries ------------------------------------------------------------------------------------

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
    """Recognize torchvision's and transformers' names and translate them; other names stay as they are."""
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
