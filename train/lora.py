"""LoRA adapters (Hu et al. 2021) on any student, through peft.

peft is imported inside the functions: it pulls in transformers, which no other training needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.errors import TrainError
from train.students.base import Student
from train.students.families import FAMILIES

Bias = Literal["none", "all", "lora_only"]

#: Layers outside the blocks that share a name with layers inside them: adapted only when named in full.
STEMS = ("conv1", "patch_embed.proj")


class LoraError(TrainError):
    """LoRA cannot be applied as asked."""


@dataclass(frozen=True)
class LoraOptions:
    """`rank` above 0; scale `alpha` / rank; `target_modules` empty: defaults of the student's type."""

    rank: int
    alpha: float = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ()
    bias: Bias = "none"


@dataclass(frozen=True)
class AdaptedLayers:
    """What was adapted: full layer names, and how many parameters train out of how many."""

    targets: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int


def apply_lora_options(student: Student, options: Mapping[str, Any], *, trained: bool = True) -> Any:
    """Put adapters into `student` by the `lora_*` options; None when `lora_rank` is 0.

    `trained`: the student is rebuilt to read trained weights back, so random ones are fine for now.
    """
    if not options.get("lora_rank"):
        return None
    names = str(options.get("lora_target_modules") or "").split(",")
    return apply_lora(
        student,
        LoraOptions(
            rank=int(options["lora_rank"]),
            alpha=float(options["lora_alpha"]),
            dropout=float(options["lora_dropout"]),
            target_modules=tuple(name.strip() for name in names if name.strip()),
            bias=options["lora_bias"],
        ),
        require_weights=not trained,
    )


def apply_lora(student: Student, options: LoraOptions, *, require_weights: bool = True) -> AdaptedLayers:
    """Put adapters into `student`, in place; afterwards only adapters and the head get gradients.

    Parameters that were initialized randomly when the weights were loaded train as well, like the head. Batch-norm
    statistics keep moving while training, and are saved with the adapters.

    Raises LoraError for a student with random weights (unless `require_weights` is off, to read a trained
    student back), for target modules that no layer has (the text lists those there are), and for a bias
    setting that is not none, all or lora_only.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if require_weights and student.initial_weights.is_random:
        raise LoraError(
            f"LoRA trains small corrections to weights that are already good, but {student.spec.name} starts from "
            "random ones: give --student-path or --pretrained, or leave --lora-rank out"
        )
    if options.bias not in ("none", "all", "lora_only"):
        raise LoraError(f"lora_bias {options.bias!r}: expected none, all or lora_only")
    if student.spec.options.get("freeze_encoder"):
        raise LoraError(
            "lora_rank adapts the frame encoder, which freeze_encoder keeps fixed: choose one of them"
        )
    targets = choose_targets(student, options.target_modules)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        bias=options.bias,
        target_modules="|".join(re.escape(name) for name in targets),
    )
    was_trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, student.lora_root())
    freeze_base(student, options.bias, was_trained)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return AdaptedLayers(tuple(targets), trainable, student.parameter_count())


def freeze_base(student: Student, bias: Bias, was_trained: set[str]) -> None:
    """Leave gradients to adapters, head, freshly drawn parameters and, by `bias`, to biases."""
    fresh = {fresh_name(name) for name in student.initial_weights.reinitialized}
    for name, parameter in student.named_parameters():
        plain = fresh_name(name)
        head = plain.startswith(student.head_prefixes) if student.head_prefixes else False
        biased = bias == "all" or (bias == "lora_only" and name.endswith(".base_layer.bias"))
        wanted = head or plain in fresh or (biased and plain.rsplit(".", 1)[-1].startswith("bias"))
        allowed = name.replace(".base_layer.", ".") in was_trained
        parameter.requires_grad_("lora_" in name or (wanted and allowed))


def fresh_name(name: str) -> str:
    """A parameter's name as the state dict of a student without adapters has it."""
    return name.removeprefix("model.").replace(".base_layer.", ".")


def choose_targets(student: Student, wanted: Sequence[str]) -> list[str]:
    """Full names, inside `student.lora_root()`, of the layers to adapt.

    A wanted name fits a layer whose full name is it or ends in `.` and it.
    """
    names = adaptable_layers(student)
    defaults = FAMILIES[student.spec.type].adapters
    if not wanted:
        inner = [name for name in names if name not in STEMS]
        chosen = [n for n in inner if defaults is None or n.rsplit(".", 1)[-1] in defaults]
        if not chosen:
            raise LoraError(
                f"lora_rank: {student.spec.name} has none of the layers {', '.join(defaults or ())}; name some with "
                f"--lora-target-modules, candidates: {', '.join(short_names(inner))}"
            )
        return chosen
    unknown = [want for want in wanted if not any(fits(name, want) for name in names)]
    if unknown:
        raise LoraError(
            f"lora_target_modules {', '.join(unknown)}: {student.spec.name} has no such layer that can carry "
            f"an adapter; candidates: {', '.join(short_names(names))}"
        )
    return [name for name in names if any(fits(name, want) for want in wanted)]


def fits(name: str, want: str) -> bool:
    return name == want or name.endswith(f".{want}")


def short_names(names: Iterable[str]) -> list[str]:
    """The distinct last parts of layer names; numbered ones keep the part before (`downsample.0`)."""
    short = []
    for name in names:
        parts = name.split(".")
        short.append(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    return sorted(set(short))


def adaptable_layers(student: Student) -> list[str]:
    """Layers that peft can adapt and that the student really calls.

    Plain convolutions without groups and linear layers, not the head. Sub-classes pad or scale in ways of their
    own that an adapter beside them would not follow; layers whose weight is read without calling them (fused
    attention of some timm models) would ignore their adapter silently. One forward pass tells.
    """
    root = student.lora_root()
    prefixes = student.head_prefixes
    modules = {n: m for n, m in root.named_modules() if n and is_plain_layer(m)}
    called = called_modules(student, modules)
    return [n for n in modules if n in called and not (prefixes and f"{n}.".startswith(prefixes))]


def is_plain_layer(module: nn.Module) -> bool:
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


@torch.no_grad()
def called_modules(student: Student, modules: dict[str, nn.Module]) -> set[str]:
    """Names of those `modules` that one forward pass of an empty image calls."""
    called: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, name=n: called.add(name)) for n, m in modules.items()]
    was_training = student.training
    size = student.spec.image_size
    shape = (1, 1, 3, size, size) if student.spec.type == "lstm" else (1, 3, size, size)
    try:
        student.eval()(torch.zeros(shape, device=next(student.parameters()).device))
    finally:
        student.train(was_training)
        for hook in hooks:
            hook.remove()
    return called


def adapter_state(student: Student, weights_of: Student | None = None) -> dict[str, Tensor]:
    """Everything that differs from the base weights after training: what trained, and batch-norm buffers.

    `weights_of`: take the values from this copy of the student (averaged weights, which nothing trains). Small
    enough to keep one per task; `load_adapter_state` puts it onto the same base weights.
    """
    prefix = wrapper_prefix(student)
    names = {n.removeprefix(prefix) for n, p in student.named_parameters() if p.requires_grad}
    names |= {n.removeprefix(prefix) for n in batch_norm_buffers(student)}
    values = (weights_of or student).state_dict()
    return {n: v.detach().cpu().clone() for n, v in values.items() if n in names}


def load_adapter_state(student: Student, state: dict[str, Tensor]) -> None:
    """The inverse of `adapter_state`, on a student with the same base weights and the same `LoraOptions`.

    Raises LoraError, naming keys, when the adapters belong to another student or other options.
    """
    expected = set(adapter_state(student))
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        raise LoraError(f"adapters do not fit {student.spec.name}: {len(odd)} keys differ, such as {odd[0]}")
    student.load_state_dict({**student.state_dict(), **state})


def wrapper_prefix(student: Student) -> str:
    """What parameter names have before the names of the state dict (see TimmStudent)."""
    first_name = next(iter(dict(student.named_parameters())))
    return "" if first_name in student.state_dict() else "model."


def batch_norm_buffers(module: nn.Module) -> Iterator[str]:
    """Names of the running statistics of all batch-norm layers."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield from (f"{name}.{buffer}" for buffer, _ in layer.named_buffers(recurse=False))


def merge_lora(student: Student) -> Student:
    """A copy of `student` whose adapters are folded into the weights: plain layers, the same outputs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(student)
    root: Any = merged.lora_root()
    adapted = [(n, m) for n, m in root.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        # A number is an index of nn.Sequential, which setattr serves as well.
        setattr(root.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(root, "peft_config"):
        del root.peft_config
    return merged
