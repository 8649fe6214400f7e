"""YOLOv8 students: ultralytics' detection model, built from its architecture file, so that no download is needed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files.weights import (
    WeightsError,
    begins_as_torch_file,
    only_plain_classes,
    read_weights,
    why_unreadable,
)
from train.students.base import (
    InitialWeights,
    Student,
    StudentError,
    StudentOutput,
    StudentSpec,
)
from train.students.families import FAMILIES, StudentName
from train.students.offline import prepare_ultralytics
from train.students.weights import find_tensors

# Where a checkpoint holds the model or its tensors; ultralytics pickles whole models, the averaged one first.
CONTAINERS = ("ema", "model", "model_state_dict", "student_state_dict", "state_dict")
ULTRALYTICS_ERROR = "ERROR ❌️ "
P5_STRIDE = 32
P5 = 2  # index among the Detect head's inputs P3, P4, P5


class YoloStudent(Student):
    """A YOLOv8 detector. It trains in ultralytics' own trainer (`train.yolo`), not in the common loop.

    Without classes (phase one of a training, which does run in the common loop) it is backbone and neck alone, and
    its levels are the neck's maps.
    """

    last_level = "P5"

    def __init__(self, network: nn.Module, spec: StudentSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        layers: Any = network.model
        if not spec.num_classes:
            self.level_widths = dict(zip(("P3", "P4"), level_widths(network), strict=False))
            self.default_levels = ("P3", "P4")
            layers[-1] = NeckOutput(layers[-1])
        head = f"model.{len(layers) - 1}."
        # Names of this student's parameters, and of layers below `lora_root`.
        self.head_prefixes = (f"network.{head}", head)

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        """`images` float [B, 3, H, W] in [0, 1], sides multiples of 32.

        `features` are the P5 map [B, D, H/32, W/32]. `logits` in eval mode are ultralytics' decoded predictions
        [B, 4 + C, A] (boxes as center and size in pixels, then class scores; A anchors); in training mode None.
        """
        out: Any = self.network(images)
        if not self.spec.num_classes:
            return StudentOutput(None, out[P5], self.chosen_maps(out[P5], {"P3": out[0], "P4": out[1]}))
        if self.training:
            return StudentOutput(None, out["feats"][P5])
        return StudentOutput(out[0], out[1]["feats"][P5])

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise StudentError("gradient checkpointing: YOLO students have none; use a smaller batch_size")

    def lora_root(self) -> nn.Module:
        """ultralytics' own model, so that adapter names are its names."""
        return self.network

    def load_local_weights(self, path: Path) -> InitialWeights:
        """Fill the network from an ultralytics `.pt`, a state dict, or our own `best.pt`; see `read_yolo_weights`."""
        self.initial_weights = load_yolo_weights(self.network, path)
        return self.initial_weights


class NeckOutput(nn.Module):
    """Takes the place of the Detect head and returns its inputs, the list of P3, P4 and P5."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        # Which layers' outputs it gets, and its own number: ultralytics' models are run by these.
        self.f, self.i = head.f, head.i

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return maps


def build_yolo(name: StudentName, *, num_classes: int, image_size: int) -> YoloStudent:
    """A YOLOv8 student with random weights; without classes its backbone and neck. Raises StudentError."""
    network = build_network(name.size, num_classes or 1)
    return YoloStudent(network, student_spec(network, name.size, num_classes, image_size))


def student_spec(network: Any, size: str, num_classes: int, image_size: int) -> StudentSpec:
    """The spec of a YOLOv8 student around `network`."""
    return StudentSpec.of(
        StudentName("yolov8", size),
        num_classes,
        image_size=image_size,
        feature_width=level_widths(network)[P5],
        feature_kind="map",
        feature_stride=P5_STRIDE,
        distilled_layer="P5, the last input of the Detect head",
    )


def build_network(size: str, num_classes: int, network_class: Callable[..., Any] | None = None) -> Any:
    """ultralytics' DetectionModel of yolov8`size`, or a sub-class of it."""
    prepare_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    # ultralytics measures strides while it builds, which the meta device cannot.
    target = torch.get_default_device()
    with torch.device("cpu"):
        network: Any = (network_class or DetectionModel)(
            FAMILIES["yolov8"].sizes[size], ch=3, nc=num_classes, verbose=False
        )
    if target.type != "cpu":
        strides = network.model[-1].stride
        network.to(target)
        network.model[-1].stride = strides  # read as numbers when boxes are decoded
    return network


def level_widths(network: Any) -> list[int]:
    """Channels of the Detect head's inputs P3, P4, P5."""
    return [branch[0].conv.in_channels for branch in network.model[-1].cv2]


def load_yolo_weights(network: Any, path: Path) -> InitialWeights:
    """Fill a DetectionModel from a file; a class head of another size is initialized randomly and named.

    Raises StudentError when the file cannot be read or holds another architecture.
    """
    found = read_yolo_weights(path)
    expected = network.state_dict()
    whole = f"model.{len(network.model) - 1}."
    # A label-free run (task features) has trained backbone and neck alone.
    head = f"{whole}cv3." if any(key.startswith(whole) for key in found) else whole
    misfits = [
        key
        for key, value in expected.items()
        if not key.startswith(head) and (key not in found or found[key].shape != value.shape)
    ]
    if misfits:
        raise StudentError(
            f"student_path {path} does not fit: {len(misfits)} tensors are missing or of another size, e.g. "
            f"{', '.join(misfits[:4])}; is it a YOLOv8 model of the same size?"
        )
    fitting = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    network.load_state_dict(fitting, strict=False)
    return InitialWeights(
        str(path), tuple(f"network.{name}" for name in sorted(set(expected) - set(fitting)))
    )


def read_yolo_weights(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a YOLO checkpoint by ultralytics' names: `.pt` of ultralytics, state dict, our `best.pt`.

    Raises StudentError for a missing or damaged file, and for one with anything else than a model's parts in it.
    """
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise StudentError(f"student_path {path} does not exist")
    try:
        content = read_safely(path)
    except Exception as error:
        # ultralytics knows best which of its models it cannot read.
        known = str(error).startswith(ULTRALYTICS_ERROR) and begins_as_torch_file(path)
        first_line = str(error).removeprefix(ULTRALYTICS_ERROR).strip().partition("\n")[0]
        reason = (
            first_line
            if known
            else str(error)
            if isinstance(error, WeightsError)
            else why_unreadable(path, error)
        )
        raise StudentError(f"student_path {path} is not a readable YOLO checkpoint: {reason}") from error
    tensors = find_tensors(content, CONTAINERS)
    if not tensors:
        raise StudentError(f"student_path {path} holds no weights")
    return {key.removeprefix("network."): value.float() for key, value in tensors.items()}


def read_safely(path: Path) -> Any:
    """What a checkpoint holds; no code of the file's own runs.

    ultralytics pickles whole models, which its restricted loader rebuilds from its own classes alone.
    """
    try:
        return read_weights(path)
    except WeightsError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        prepare_ultralytics()
        from ultralytics.nn.tasks import torch_safe_load

        # It leaves its classes allowed; outside of it their constructors can run code.
        with only_plain_classes():
            return torch_safe_load(path, safe_only=True)[0]
