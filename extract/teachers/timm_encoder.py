"""Any timm image encoder as a teacher: its features before the classifier, as a grid and as their mean.

Shapes: `B` images, `H W` pixels, `h w` grid cells, `D` width, `T` tokens (prefix tokens included).
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from extract.known_teachers import TIMM_ROWS
from extract.teachers.base import (
    CheckpointError,
    Encoded,
    Layer,
    TeacherError,
    choose_layers,
    spread_layers,
)
from extract.teachers.checkpoint import endpoint, hub_client, one_line
from extract.teachers.devices import CompiledModel, device_error, pick_device, pick_dtype, warn_of_compiler
from extract.teachers.pixels import as_pixels, as_resize_policy, normalize, pooled_mean
from files.weights import WeightsError, read_weights
from store.format import Preprocessing, TeacherSpec

if TYPE_CHECKING:
    from PIL.Image import Image

POOLINGS = ("mean", "cls", "model")
# Where checkpoints of the usual training scripts keep the state dict.
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")


class TimmTeacher:
    """A timm model without its head; see `extract.teachers.base.Teacher`."""

    def __init__(
        self,
        model: nn.Module,
        spec: TeacherSpec,
        preprocessing: Preprocessing,
        *,
        pool: str = "mean",
        layers: tuple[Layer, ...] = (),
        license: str | None = None,
        trained_size: int | None = None,
        compiled: CompiledModel | None = None,
    ) -> None:
        weight = next(model.parameters())
        self.pool, self.license, self.trained_size, self.compiled = pool, license, trained_size, compiled
        self.model, self.spec, self.preprocessing, self.layers = model, spec, preprocessing, layers
        self.device, self.dtype = weight.device, weight.dtype
        self.temporal_patch_size = 1
        self.mean = 255 * torch.tensor(preprocessing.mean, device=self.device).view(3, 1, 1)
        self.std = 255 * torch.tensor(preprocessing.std, device=self.device).view(3, 1, 1)
        # Grid of the last layer (None) and of each further one, by the image's size.
        self.grid_sizes: dict[tuple[int, int], dict[int | None, tuple[int, int]]] = {}

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of an image of this many pixels; found by encoding one black image per size.

        Raises:
            TeacherError: when the model does not take this size.
        """
        return self.all_sizes(height, width)[None]

    def layer_sizes(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        """Grids of the further layers, by number; found as `grid_size` does it."""
        sizes = self.all_sizes(height, width)
        return {layer.number: sizes[layer.number] for layer in self.layers}

    def all_sizes(self, height: int, width: int) -> dict[int | None, tuple[int, int]]:
        if (height, width) not in self.grid_sizes:
            out = self.encode(torch.zeros(1, 3, height, width, dtype=torch.uint8))
            grids = [(None, out.grid), *out.layers.items()]
            self.grid_sizes[height, width] = {
                number: (grid.shape[1], grid.shape[2]) for number, grid in grids
            }
        return self.grid_sizes[height, width]

    @torch.inference_mode()
    def encode(self, images: Sequence[Image] | Tensor, *, inside: Tensor | None = None) -> Encoded:
        """pooled float32 [B, D] and grid float32 [B, h, w, D] in raster order; see `Teacher.encode`."""
        pixels, inside = as_pixels(images, inside, self)
        if pixels.dim() == 5:
            raise TeacherError(f"{self.spec.name} takes single frames [B, 3, H, W], got {list(pixels.shape)}")
        features, maps = self.features(pixels)
        grid = as_grid(features, self.spec.width, self.model, pixels.shape[-2:]).float()
        layers = {
            layer.number: values.permute(0, 2, 3, 1).float()
            for layer, values in zip(self.layers, maps, strict=True)
        }
        return Encoded(self.pooled(features, grid, inside), grid, layers)

    def pooled(self, features: Tensor, grid: Tensor, inside: Tensor | None) -> Tensor:
        """float32 [B, D] by the teacher's pooling; `inside` counts for the mean only."""
        if self.pool == "cls":
            return features[:, 0].float()
        if self.pool == "model":
            return self.model.forward_head(features, pre_logits=True).float()  # type: ignore[operator,no-any-return]
        return pooled_mean(grid, inside)

    def features(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the model's `forward_features` gives for uint8 pixels [B, 3, H, W], and maps [B, D, h, w] of the layers."""
        check_multiple(self.spec.name, self.model, pixels.shape[-2:])
        values = normalize(pixels.to(self.device, non_blocking=True), self.mean, self.std).to(self.dtype)
        # Convolutions run a quarter faster so; and one layout whatever the caller's gives one result to the last bit.
        values = values.contiguous(memory_format=torch.channels_last)
        try:
            return self.run_model(values)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error, RuntimeError) and (failed := device_error(error, self.device)) is not None:
                raise failed from error  # the GPU, not the image's size
            size = f"{pixels.shape[-1]}×{pixels.shape[-2]}"
            raise TeacherError(
                f"{self.spec.name} cannot encode {size} pixels ({one_line(error)}): another --image-size?"
            ) from error

    def run_model(self, values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's features; through the compiled model while the compiler works."""
        if self.compiled is not None:
            try:
                return self.compiled(values)
            except self.compiled.errors as error:
                warn_of_compiler(error)
                self.compiled = None
        return self.forward_layers(values)

    def forward_layers(self, values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's last features and maps [B, D, h, w] of the further layers, from one pass of timm's own code."""
        model: Any = self.model
        if not self.layers:
            return model.forward_features(values), []
        numbers = [layer.number for layer in self.layers]
        final, maps = model.forward_intermediates(values, indices=numbers, output_fmt="NCHW")
        return final, maps


def check_multiple(name: str, model: nn.Module, size: Sequence[int]) -> None:
    """Raises TeacherError for a size whose last rows or columns a patch embedding would silently leave out."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or not (size[0] % patch[0] or size[1] % patch[1]):
        return
    near = [max(1, round(side / unit)) * unit for side, unit in zip(size, patch, strict=True)]
    raise TeacherError(
        f"image size {size[1]}×{size[0]}: the patches of {name} have {patch[1]}×{patch[0]} pixels, both sides must be "
        f"multiples of them, e.g. {near[1]}×{near[0]}"
    )


def as_grid(features: Tensor, width: int, model: nn.Module, size: Sequence[int]) -> Tensor:
    """What a timm model's `forward_features` gives, as [B, h, w, D]: maps of either layout, or tokens.

    Raises:
        TeacherError: when the tokens do not form the grid of the model's patch embedding.
    """
    if not isinstance(features, Tensor):
        raise TeacherError(
            f"{type(model).__name__} gives {type(features).__name__}, which is no grid: choose another timm model"
        )
    if features.dim() == 4:
        return features.permute(0, 2, 3, 1) if features.shape[1] == width else features
    embed = getattr(model, "patch_embed", None)
    if (
        features.dim() == 3
        and embed is not None
        and (hasattr(embed, "dynamic_feat_size") or hasattr(embed, "grid_size"))
    ):
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        tokens = features[:, prefix:]
        h, w = (
            embed.dynamic_feat_size(tuple(size)) if hasattr(embed, "dynamic_feat_size") else embed.grid_size
        )
        if h * w == tokens.shape[1]:
            return tokens.reshape(features.shape[0], h, w, features.shape[-1])
        raise TeacherError(
            f"{type(model).__name__} gives {features.shape[1]} tokens: expected {prefix} prefix tokens and a grid of "
            f"{h}×{w}, {prefix + h * w} in all; choose another timm model"
        )
    raise TeacherError(
        f"{type(model).__name__} gives features {list(features.shape)}, which are no grid: choose another timm model"
    )


def load_timm(
    path: str | Path | None,
    *,
    model_name: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    image_size: int = 224,
    resize: str = "squash",
    pool: str = "mean",
    layers: str = "",
    random_weights: bool = False,
    compile_tower: bool | None = None,
) -> TimmTeacher:
    """Load the timm model `model_name` with the weights in `path`, or with timm's own from the hub.

    random_weights: neither of them (to try the commands); the spec records it. compile_tower: run the model through
    `torch.compile`; when that fails, a warning, and it runs as it is.

    Raises:
        CheckpointError, TeacherError: as `load_teacher`.
    """
    from timm.data import resolve_model_data_config

    if pool not in POOLINGS:
        raise TeacherError(f"unknown pooling {pool!r}: expected {', '.join(POOLINGS)}")
    picked = pick_device(device)
    compute = pick_dtype(dtype, picked)
    model = build(model_name, image_size, pretrained=path is None and not random_weights)
    if path is not None:
        load_weights(model, Path(path).expanduser(), model_name)
    fingerprint = fingerprint_of_state(model_name, model.state_dict())
    width = int(model.num_features)  # type: ignore[arg-type]
    data = resolve_model_data_config(model)
    spec = TeacherSpec(
        name=f"timm:{model_name}",
        fingerprint=fingerprint,
        layer="features before the classifier",
        width=width,
        dtype=str(compute).removeprefix("torch."),
        random_weights=random_weights,
        options={} if pool == "mean" else {"pool": pool},
    )
    preprocessing = Preprocessing(
        image_size=image_size,
        resize=as_resize_policy(resize),
        interpolation=str(data["interpolation"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
    model = model.requires_grad_(False).eval().to(picked, compute).to(memory_format=torch.channels_last)
    license = None if random_weights else getattr(model, "pretrained_cfg", {}).get("license")
    chosen = timm_layers(model, layers, spec.name)
    trained_size = None if random_weights else int(data["input_size"][-1])
    teacher = TimmTeacher(
        model, spec, preprocessing, pool=pool, layers=chosen, license=license, trained_size=trained_size
    )
    check_pooling(teacher, image_size)  # one image: not a shape to compile for
    teacher.compiled = CompiledModel(teacher.forward_layers) if compile_tower else None
    return teacher


def timm_layers(model: nn.Module, layers: str, name: str) -> tuple[Layer, ...]:
    """The layers that `layers` names: blocks of a transformer, stages of what shrinks its map (numbers from 0).

    `auto`: the stages of stride 8 and 16 before the last; of a transformer, see `spread_layers`.

    Raises:
        TeacherError: for a layer that does not exist, or a model whose layers timm does not give.
    """
    if not layers:
        return ()
    stages: Any = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not isinstance(stages, list):
        raise TeacherError(f"--layers {layers}: timm gives only the last layer of {name}")
    strides = [int(stage["reduction"]) for stage in stages]
    same = len(set(strides)) == 1
    automatic = (
        spread_layers(len(stages))
        if same
        else [i for i, stride in enumerate(strides[:-1]) if stride in (8, 16)]
    )
    numbers = choose_layers(layers, len(stages), automatic, name)
    return tuple(Layer(number, int(stages[number]["num_chs"])) for number in numbers)


def timm_encoder(path: str | Path | None, teacher: TimmTeacher) -> tuple[str, Callable[[Tensor], Tensor]]:
    """timm's own model with weights that timm itself loads, in float32: its name and version, and a function from uint8
    [1, 3, H, W] to features [1, h, w, D] by `forward_intermediates`.

    Raises:
        CheckpointError: when timm does not load the file.
    """
    import timm
    from timm.data import resolve_model_data_config

    name = teacher.spec.name.removeprefix("timm:")
    options: dict[str, Any] = {} if path is None else {"pretrained_cfg_overlay": {"file": str(path)}}
    model = build(name, teacher.preprocessing.image_size, pretrained=True, **options)
    model = model.requires_grad_(False).eval().to(teacher.device)
    data = resolve_model_data_config(model)
    mean, std = (torch.tensor(data[key], device=teacher.device).view(3, 1, 1) for key in ("mean", "std"))

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        values = (pixels.to(teacher.device) / 255 - mean) / std
        final, grids = model.forward_intermediates(values, norm=True, output_fmt="NCHW")  # type: ignore[operator]
        # Convolutions and SAM have a norm or neck after the last block, which `final` has passed.
        grid = final if final.dim() == 4 and final.shape[1] == teacher.spec.width else grids[-1]
        return grid.permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    return f"timm {timm.__version__}", encode


def check_pooling(teacher: TimmTeacher, image_size: int) -> None:
    """Raises TeacherError when the model does not take the size, or lacks the pooling asked for."""
    model, name = teacher.model, teacher.spec.name
    if teacher.pool == "cls" and (
        getattr(model, "cls_token", None) is None or not getattr(model, "num_prefix_tokens", 0)
    ):
        raise TeacherError(f"--pool cls: {name} has no class token, use --pool mean or model")
    teacher.grid_size(image_size, image_size)
    black = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    pooled = teacher.encode(black).pooled
    if pooled.shape != (1, teacher.spec.width):
        raise TeacherError(
            f"--pool {teacher.pool}: the model's own pooling gives {list(pooled.shape[1:])} numbers an image, the grid of "
            f"{name} has {teacher.spec.width}: use --pool mean"
        )


def build(model_name: str, image_size: int, *, pretrained: bool, **options: Any) -> nn.Module:
    """The timm model, for this image size where its architecture depends on it (ViTs). options: of `timm.create_model`.

    Raises:
        TeacherError: no such model. CheckpointError: timm's weights are out of reach.
    """
    import timm

    known = timm.list_models()
    architecture = model_name.partition(".")[0]
    if architecture not in known:
        if any(architecture == row.name.partition(".")[0] for row in TIMM_ROWS):
            raise TeacherError(
                f"timm {timm.__version__} has no model {model_name!r}: a newer one has (pip install -U timm)"
            )
        near = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`timm.list_models()` lists the valid names"
        raise TeacherError(f"timm has no model {model_name!r}: {hint}")
    # Convolutional models have no img_size; their factories refuse it with a TypeError.
    choices: tuple[dict[str, Any], ...] = ({"img_size": image_size}, {})
    for size in choices:
        try:
            with hub_client() if pretrained else nullcontext():
                model: nn.Module = timm.create_model(model_name, pretrained=pretrained, **size, **options)
            return model
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        except Exception as error:  # the hub's client raises its own, httpx's and OS errors
            if not pretrained:
                raise TeacherError(f"timm:{model_name} at {image_size} pixels: {one_line(error)}") from error
            raise CheckpointError(no_hub_weights(model_name, error)) from None
    raise TeacherError(f"timm cannot build {model_name}")


def no_hub_weights(model_name: str, error: Exception) -> str:
    return (
        f"timm:{model_name}: no weights from {endpoint()} ({type(error).__name__}: {one_line(error)[:120]}); "
        "set HF_ENDPOINT to a mirror, or give a state dict with --teacher-path FILE"
    )


def load_weights(model: nn.Module, file: Path, model_name: str) -> None:
    """Load a state dict into the model: by name, or by order when every shape fits in its place.

    Classifier weights of another number of classes are left out, and batch counters (old files have none) may be
    missing: the features do not depend on them.

    Raises:
        CheckpointError: when the file is missing, unsafe or damaged, or its tensors do not fit.
    """
    state = read_state_dict(file)
    expected = model.state_dict()
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = in_timms_form(state, model, expected)
    if not set(state) & set(expected) and [v.shape for v in state.values()] == [
        v.shape for v in expected.values()
    ]:
        # The same network under other names: some ports of TensorFlow weights keep timm's order but not its names.
        state = dict(zip(expected, state.values(), strict=True))
    head = tuple(f"{name}." for name in head_names(model))
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    wrong = [
        name for name in wrong if not name.startswith(head) and not name.endswith(".num_batches_tracked")
    ]
    if wrong:
        got = list(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        raise CheckpointError(
            f"{file} does not fit timm:{model_name}: {len(wrong)} of {len(expected)} tensors are missing or of another "
            f"shape, first {wrong[0]}: expected {list(expected[wrong[0]].shape)}, got {got}; is it another model?"
        )
    fitting = {name: value for name, value in state.items() if name in expected}
    fitting = {name: value for name, value in fitting.items() if value.shape == expected[name].shape}
    model.load_state_dict(fitting, strict=False)


def in_timms_form(
    state: dict[str, Tensor], model: nn.Module, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state as timm itself would load it: names of the original release translated, positions resampled to the size.

    A state that fits as it is stays so. timm keeps the translation beside each architecture.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or all(
        name in state and state[name].shape == value.shape for name, value in expected.items()
    ):
        return state
    try:
        return dict(convert(dict(state), model))
    except (KeyError, IndexError, AttributeError, RuntimeError, TypeError, ValueError):
        return state  # of another model: what does not fit is named from the file's own names


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules, as timm's configuration gives them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file or a torch checkpoint; nothing else is unpickled.

    Raises:
        CheckpointError: when it is missing, damaged, or holds other objects.
    """
    if not file.is_file():
        raise CheckpointError(
            f"--teacher-path {file}: no such file; expected a state dict (.pth, .pt, .safetensors)"
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        content: Any = read_weights(file)
    except WeightsError as error:
        raise CheckpointError(f"{file}: weights cannot be read: {error}") from None
    except Exception as error:  # safetensors and OS errors
        raise CheckpointError(f"{file}: weights cannot be read: {one_line(error)}") from None
    for key in STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} holds {type(content).__name__}, expected a state dict of tensors")
    return dict(content)


def fingerprint_of_state(model_name: str, state: Mapping[str, Tensor]) -> str:
    """blake2b-128 (hex) of the model's name and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(model_name.partition(".")[0].encode(), digest_size=16)
    for name, value in state.items():
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
