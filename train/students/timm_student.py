"""ResNet, ViT and any other timm model as a student."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from train.students.base import InitialWeights, Student, StudentError, StudentOutput, StudentSpec
from train.students.families import FAMILIES, StudentName

HUB_TIMEOUT_S = 5.0
DISTILLED = {
    "map": "last stage's map before pooling (token models: the last block's patch tokens as a grid)",
    "sequence": "tokens of the last block",
    "vector": "pooled features before the classifier",
}


class TimmStudent(Student):
    """A timm model whose `forward_features` output is distilled.

    The wrapper adds nothing to the names in `state_dict()`: they are timm's own, so a checkpoint loads into
    a plain `timm.create_model(...)` with `strict=True`. Levels are those of `forward_intermediates`: stages by their
    stride (P3 is stride 8), or where all have one stride, blocks by their number.
    """

    def __init__(self, model: nn.Module, spec: StudentSpec) -> None:
        super().__init__()
        self.model: Any = model
        self.spec = spec
        self.head_prefixes = classifier_prefixes(model)
        self.stages, self.last_level = find_stages(model) if spec.feature_kind == "map" else ({}, "LAST")
        info: Any = getattr(model, "feature_info", ())
        self.level_widths = {level: int(info[index]["num_chs"]) for level, index in self.stages.items()}
        self.register_load_state_dict_pre_hook(_add_model_prefix)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        """`images` float [B, 3, H, W] → logits [B, C] or None, features [B, D, h, w] (or [B, D])."""
        raw, maps = self.run_stages(images)
        logits = self.model.forward_head(raw) if self.spec.num_classes else None
        # Distilled heads (levit) return a pair while training.
        if isinstance(logits, tuple):
            logits = torch.stack(logits).mean(0)
        features = features_of(self.model, raw)
        return StudentOutput(logits, features, self.chosen_maps(features, maps))

    def run_stages(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward_features` gives, and the chosen levels but the last [B, D, h, w] by name."""
        wanted = sorted((self.stages[level], level) for level in self.levels if level != self.last_level)
        if not wanted:
            return self.model.forward_features(images), {}
        raw, maps = self.model.forward_intermediates(
            images, indices=[index for index, _ in wanted], output_fmt="NCHW"
        )
        return raw, {level: values for (_, level), values in zip(wanted, maps, strict=True)}

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass; StudentError where timm has no support."""
        try:
            self.model.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            raise StudentError(f"{self.spec.name}: timm offers no gradient checkpointing for it") from error

    def lora_root(self) -> nn.Module:
        """timm's own model, so that adapter names are timm's."""
        return cast(nn.Module, self.model)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """timm's own parameter names, without a wrapper's prefix."""
        return self.model.state_dict(*args, **kwargs)


def _add_model_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the wrapper's attribute name back before torch looks the keys up."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}model.{key.removeprefix(prefix)}"] = state.pop(key)


def classifier_prefixes(model: Any) -> tuple[str, ...]:
    """Names of the classifier modules as timm's configuration states them, each with a trailing dot."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(f"{name}." for name in names)


def find_stages(model: Any) -> tuple[dict[str, int], str]:
    """The levels before the last, with their numbers in `forward_intermediates`, and the name of the last level."""
    stages = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not isinstance(stages, list) or not stages:
        return {}, "LAST"
    strides = [int(stage["reduction"]) for stage in stages]
    if len(set(strides)) == 1:
        return {str(number): number for number in range(len(stages))}, "LAST"
    # The last stage of each stride, as detectors take it.
    levels = {
        f"P{stride.bit_length() - 1}": number
        for number, stride in enumerate(strides)
        if stride.bit_count() == 1
    }
    last = f"P{strides[-1].bit_length() - 1}" if strides[-1].bit_count() == 1 else "LAST"
    levels.pop(last, None)
    return levels, last


def features_of(model: Any, raw: Tensor) -> Tensor:
    """timm's `forward_features` output → map [B, D, h, w]; vector [B, D] when no grid can be told.

    Raster order: rows from the top, columns from the left, as timm flattens its patches.
    """
    if raw.ndim == 4:
        return raw.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else raw
    if raw.ndim == 3:
        tokens = raw[:, getattr(model, "num_prefix_tokens", 0) :]
        grid = _grid_size(model, tokens.shape[1])
        if grid is None:
            return tokens.mean(1)
        return tokens.transpose(1, 2).unflatten(2, grid)
    return raw


def _grid_size(model: Any, tokens: int) -> tuple[int, int] | None:
    """Height and width of the token grid: the patch embedding's own, else a square."""
    known = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if known is not None and known[0] * known[1] == tokens:
        return int(known[0]), int(known[1])
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def build_timm_student(
    name: StudentName,
    *,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    **options: Any,
) -> TimmStudent:
    """Build `resnet`, `vit` or `timm:NAME`; `options` go to `timm.create_model` (e.g. `drop_path_rate`).

    Raises StudentError for an unknown timm name, an image size that the patches do not divide, and
    pretrained weights that cannot be had.
    """
    architecture = FAMILIES[name.type].sizes.get(name.size, name.size)
    check_known(architecture)
    settings = {**image_size_settings(architecture, image_size), **options}
    model = create_timm_model(architecture, pretrained, num_classes=num_classes, **settings)
    width, kind, stride, unreached = _probe_features(architecture, settings, image_size)
    if not num_classes:
        # Layers behind the features rest in label-free training; DDP waits for every gradient that is asked for.
        for parameter in unreached:
            model.get_parameter(parameter).requires_grad_(False)
    spec = StudentSpec.of(
        name,
        num_classes,
        image_size=image_size,
        feature_width=width,
        feature_kind=kind,  # type: ignore[arg-type]
        feature_stride=stride,
        distilled_layer=DISTILLED[kind],
        options=dict(options),
    )
    student = TimmStudent(model, spec)
    if pretrained:
        student.initial_weights = InitialWeights(origin=f"pretrained:{architecture}")
    return student


def check_known(architecture: str) -> None:
    """StudentError with timm's nearest names when timm has no such model."""
    base = architecture.split(".")[0]
    if timm.is_model(base):
        return
    near = get_close_matches(base, timm.list_models(), n=5, cutoff=0.4)
    raise StudentError(f"timm has no model {architecture!r}: nearest {', '.join(near) or 'none'}")


def create_timm_model(architecture: str, pretrained: bool, **settings: Any) -> nn.Module:
    """`timm.create_model`, with an error that says what to do when weights cannot be fetched."""
    try:
        with one_try_at_the_hub() if pretrained else contextlib.nullcontext():
            return timm.create_model(architecture, pretrained=pretrained, **settings)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if pretrained:
            raise StudentError(
                f"pretrained weights of {architecture} could not be fetched ({type(error).__name__}: {reason}): "
                "without a network, download them elsewhere and pass --student-path FILE, or leave --pretrained out"
            ) from error
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise StudentError(f"timm cannot build {architecture} with {given}: {reason}") from error


@contextlib.contextmanager
def one_try_at_the_hub() -> Iterator[None]:
    """Inside, the hub's client uses its cache alone when one short request to the hub gets no answer.

    By itself it repeats several requests with pauses in between: most of a minute without a network.
    """
    from huggingface_hub import constants

    online = not constants.HF_HUB_OFFLINE
    failure = hub_failure(constants.ENDPOINT) if online else None
    if failure is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        raise ConnectionError(f"{constants.ENDPOINT} does not answer: {failure}") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def hub_failure(endpoint: str) -> str | None:
    """Why the hub does not answer within HUB_TIMEOUT_S; None when it does. The client's proxies and certificates hold."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        return " ".join(str(error).split())[:160] or type(error).__name__
    return None


def image_size_settings(architecture: str, image_size: int) -> dict[str, Any]:
    """What timm must be told so that a model of fixed input size takes `image_size`; refuses cropped patches."""
    with torch.device("meta"):
        probe: Any = timm.create_model(architecture, pretrained=False)
    patch = getattr(getattr(probe, "patch_embed", None), "patch_size", None)
    if patch is not None:
        side = int(patch[0] if isinstance(patch, tuple) else patch)
        if image_size % side:
            lower = max(image_size // side, 1) * side
            raise StudentError(
                f"image_size {image_size} is not a multiple of {architecture}'s patch {side}, which would crop "
                f"the image silently: use {lower} or {lower + side}"
            )
    return {"img_size": image_size} if (probe.pretrained_cfg or {}).get("fixed_input_size") else {}


def _probe_features(
    architecture: str, settings: dict[str, Any], image_size: int
) -> tuple[int, str, int | None, list[str]]:
    """Width, kind and stride of the features, and the parameters they do not depend on.

    Measured on the meta device: no arithmetic, no memory.
    """
    with torch.device("meta"):
        model: Any = create_timm_model(architecture, False, num_classes=0, **settings).eval()
        try:
            features = features_of(model, model.forward_features(torch.zeros(1, 3, image_size, image_size)))
            features.sum().backward()
        except RuntimeError as error:
            raise StudentError(f"{architecture} does not run at image_size {image_size}: {error}") from error
    unreached = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    shape = features.shape
    if len(shape) == 4:
        return int(shape[1]), "map", max(round(image_size / int(shape[2])), 1), unreached
    return int(shape[-1]), "vector", None, unreached
