"""One face for a trained student, whether it comes from a checkpoint or from an exported ONNX file.

`B` images, `S` the input's side in pixels, `C` classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn

from console.devices import find_device
from imaging.decode import FULL_DEPTH, upright_rgb
from imaging.geometry import View, resize_view
from train.checkpoint import BEST, load_student_from_run
from train.data.images import Shown
from train.data.views import render_image
from train.distill.projector import Projector, channels_last_rows, pool_cells, pooled_rows
from train.errors import DeliveryError
from train.metrics import TASK_METRICS
from train.run_folder import SUMMARY
from train.students.base import Student, StudentOutput, StudentSpec
from train.students.families import parse_student_name

METADATA_KEY = "qwen_distill"
LARGEST_SIDE = 16_384  # of an input: a file from elsewhere could ask for any memory


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """All that using a student takes besides its weights; travels in ONNX metadata as JSON.

    `mean` and `std` are of RGB in [0, 1]; `resize` is the policy that the images are fitted with. Students of clips
    saw `frames` of each clip, or with `frame_pairs` so many pairs of neighbors. `bit_depth`: of 16-bit gray images.
    `teacher`: fingerprint of the teacher whose features were learned; None in older files. `standardize`: how they were.
    """

    student: str
    task: str
    class_names: tuple[str, ...]
    image_size: int
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames: int | None = None
    frame_pairs: bool = False
    bit_depth: int = FULL_DEPTH
    teacher: str | None = None
    standardize: str = "channel"

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> ModelCard:
        shown = content["preprocessing"]
        return cls(
            student=content["student"]["name"],
            task=content["task"],
            class_names=tuple(content["class_names"]),
            image_size=int(shown["image_size"]),
            resize=str(shown["resize"]),
            mean=tuple(shown["mean"]),
            std=tuple(shown["std"]),
            frames=shown.get("frames"),
            frame_pairs=bool(shown.get("frame_pairs")),
            bit_depth=int(shown.get("bit_depth", FULL_DEPTH)),
            teacher=content.get("teacher"),
            standardize=str(content["config"].get("standardize", "channel")),
        )

    @property
    def takes_clips(self) -> bool:
        """Whether an input is a clip: for a clip student, with or without labels."""
        return self.task == "sequence" or (self.task == "features" and self.frames is not None)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What a checkpoint says about how the student is shown images."""
        return {"resize": self.resize, "bit_depth": self.bit_depth}

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelCard:
        """The card in a file's metadata; entries of newer versions are ignored. Raises DeliveryError when damaged."""
        try:
            known = {field.name for field in fields(cls)}
            values = {name: value for name, value in json.loads(text).items() if name in known}
            card = TypeAdapter(cls).validate_python(values)
            if card.task not in TASK_METRICS or not 0 < card.image_size <= LARGEST_SIDE:
                raise ValueError
            return card
        except (ValueError, AttributeError):  # pydantic's error is a ValueError
            raise DeliveryError(
                f"{where}: its {METADATA_KEY} metadata is damaged: export the student again with `cli export RUN`"
            ) from None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def view_of(self, size: tuple[int, int]) -> View:
        """Where the student's input is in an image of `size` (width, height)."""
        return resize_view(self.resize, size, self.image_size)

    def render(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image as the student sees it, uint8 [S, S, 3]."""
        return render_image(image, self.view_of(image.size), self.image_size)

    def show(self, shown: Shown) -> NDArray[np.uint8]:
        """An image of a store as the student sees it, uint8 [S, S, 3]: in training, in evaluation and here."""
        if self.task == "detection":  # ultralytics fits whatever image the store holds
            return self.render(shown.image)
        return render_image(shown.image, shown.into_image(self.view_of(shown.size)), self.image_size)

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [..., S, S, 3] → float32 [..., 3, S, S], as the network takes it."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3), dtype=np.float32)


class TrainedModel(Protocol):
    """A student that can be run on normalized batches."""

    card: ModelCard

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [B, 3, S, S] (clips [B, T, 3, S, S]) → logits [B, C]; masks [B, C, S, S].

        Detectors: boxes as center and size in pixels of the input, then class scores, [B, 4 + C, A] of A anchors.
        Label-free students: embeddings [B, D].
        """

    def outputs(self, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """All outputs by name; the first is what `run` returns. See `Embeddings` for those of label-free students."""


class TorchModel:
    """A student from a run folder or a checkpoint of ours."""

    def __init__(self, student: Student, card: ModelCard, device: torch.device) -> None:
        self.student, self.card, self.device = student.to(device).eval(), card, device

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return next(iter(self.outputs(batch).values()))

    @torch.inference_mode()
    def outputs(self, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        images = torch.from_numpy(batch).to(self.device, non_blocking=True)
        if isinstance(self.student, LabelFreeStudent):
            found = self.student.embed(images).named()
        else:
            found = {"logits": self.student(images).logits}
        return {name: np.asarray(value.float().cpu().numpy()) for name, value in found.items()}


class OnnxModel:
    """An exported student in ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise DeliveryError(
                f"{path}: ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}"
            ) from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise DeliveryError(
                f"{path}: not exported by `cli export`: no {METADATA_KEY} entry in its metadata"
            )
        self.card = ModelCard.from_json(metadata[METADATA_KEY], str(path))
        self.input_name = self.session.get_inputs()[0].name
        self.output_names = [output.name for output in self.session.get_outputs()]

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        first = self.session.run(self.output_names[:1], {self.input_name: batch})[0]
        return np.asarray(first, dtype=np.float32)

    def outputs(self, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        found = self.session.run(self.output_names, {self.input_name: batch})
        return {
            name: np.asarray(value, dtype=np.float32)
            for name, value in zip(self.output_names, found, strict=True)
        }


def open_model(path: Path, device: str = "auto") -> TrainedModel:
    """The model of a run folder, a checkpoint (`best.pt`) or an exported ONNX file.

    Raises DeliveryError or CheckpointError, naming the path and what was expected.
    """
    if not path.exists():
        raise DeliveryError(
            f"{path}: no such run or file; expected a run folder, its best.pt or an exported .onnx"
        )
    if path.suffix == ".onnx":
        return OnnxModel(path)
    student, card = open_student(path)
    return TorchModel(student, card, choose_device(device))


def open_student(run: Path) -> tuple[Student, ModelCard]:
    """The student as it is deployed: evaluation mode, LoRA merged into its weights.

    A label-free student is a `LabelFreeStudent`. Raises DeliveryError for a run folder whose training has not finished.
    """
    if run.suffix == ".onnx":
        raise DeliveryError(f"{run}: an exported file already; name the run folder that it was made from")
    check_finished(run)
    student, content = load_student_from_run(run)
    if content["config"].get("lora_rank"):
        from train.lora import merge_lora

        student = merge_lora(student)
    if student.spec.num_classes == 0:
        student = label_free_student(student, content)
    return student.eval(), ModelCard.of_checkpoint(content)


def check_finished(run: Path) -> None:
    """A folder stands for a finished training; its best epoch so far must be asked for by name."""
    best = run / BEST
    if best.exists() and not (run / SUMMARY).exists():
        raise DeliveryError(
            f"{run}: this run has not finished (no {SUMMARY}): go on with `cli train … --resume`, or name {best} for "
            "its best epoch so far"
        )


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; a GPU that was asked for and is absent is an error."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device(find_device(name, gpus, DeliveryError))


class LogitsOnly(nn.Module):
    """The exported face of a student: images in, logits out."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.student(images).logits
        assert logits is not None  # label-free students have their own face
        return logits


def exported_face(student: Student) -> nn.Module:
    """The student as a module of tensors in and tensors out, as exporters take it."""
    return EmbeddingsOnly(student) if isinstance(student, LabelFreeStudent) else LogitsOnly(student)


def class_name(card: ModelCard, index: int) -> str:
    """The class's name, or its number where the head is wider than the names."""
    return card.class_names[index] if index < len(card.class_names) else str(index)


def batches(items: Any, size: int) -> list[Any]:
    """A list's or an array's `items` in runs of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class PublishedStatistics(nn.Module):
    """Where evaluation looks for the normalization of a student's input (see `train.checkpoint.normalization`)."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": mean, "std": std}


class OnnxStudent(Student):
    """Runs on the CPU, in ONNX Runtime. `spec` comes from the model card and the shape of the file's outputs."""

    def __init__(self, model: OnnxModel) -> None:
        super().__init__()
        card = model.card
        width = model.session.get_outputs()[0].shape[1]  # more classes than have names, perhaps
        named = len(card.class_names)
        self.exported = model
        self.spec = StudentSpec(
            name=card.student,
            type=parse_student_name(card.student).type,
            size="",
            task=card.task,
            num_classes=max(named, width) if isinstance(width, int) else named,
            image_size=card.image_size,
            feature_width=0,
            feature_kind="vector",
            feature_stride=None,
            distilled_layer="",
        )
        self.model = PublishedStatistics(card.mean, card.std)

    def forward(self, images: torch.Tensor, lengths: torch.Tensor | None = None) -> StudentOutput:
        if lengths is not None:
            for length in lengths.unique().tolist():
                check_frames(self.exported, length)
        logits = torch.from_numpy(self.exported.run(images.numpy()))
        return StudentOutput(logits, logits)


def check_frames(model: OnnxModel, length: int) -> None:
    """An exported clip student takes clips of one length. Raises DeliveryError for another."""
    shape = model.session.get_inputs()[0].shape
    if isinstance(shape[1], int) and shape[1] != length:
        raise DeliveryError(
            f"the exported student takes clips of {shape[1]} frames, the store has one of {length}: "
            "measure the run folder instead of its ONNX file"
        )


class Embeddings(NamedTuple):
    """float [B, D] `embedding`: the mean of the features; `features`: map [B, D, h, w], sequence [B, T, D] or None.

    `aligned`: the embedding in the teacher's standardized space [B, D_teacher]; None without an alignment head.
    """

    embedding: Tensor
    features: Tensor | None
    aligned: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The outputs that there are, by the names that exported files give them."""
        values = {"embedding": self.embedding, "features": self.features, "aligned": self.aligned}
        return {name: value for name, value in values.items() if value is not None}


class LabelFreeStudent(Student):
    """A trained backbone with the alignment head of its training, which measures how close it is to the teacher.

    `of_cells`: the training aligned each cell (or frame), so a head that is not linear must see cells here too.
    """

    def __init__(self, backbone: Student, head: nn.Module | None, *, of_cells: bool) -> None:
        super().__init__()
        self.spec, self.backbone, self.head, self.of_cells = backbone.spec, backbone, head, of_cells

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        return self.backbone(images) if lengths is None else self.backbone(images, lengths)  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Embeddings:
        """`images` float [B, 3, S, S] (clips [B, T, 3, S, S], every frame counts)."""
        features = self(images).features
        pooled = pooled_rows(features)
        aligned = None
        if self.head is not None and self.of_cells and features.ndim > 2:
            aligned = pool_cells(self.head(channels_last_rows(features)), None)
        elif self.head is not None:
            aligned = self.head(pooled)
        return Embeddings(pooled, features if features.ndim > 2 else None, aligned)


class EmbeddingsOnly(nn.Module):
    """The exported face of a label-free student: images in, the outputs of `Embeddings.named` out, in that order."""

    def __init__(self, student: LabelFreeStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.student.embed(images).named().values())


def label_free_student(backbone: Student, content: Mapping[str, Any]) -> LabelFreeStudent:
    """The student of a checkpoint's `content`, with the head that it holds (older ones hold none)."""
    state, config = content.get("alignment_head"), content["config"]
    if state is None:
        return LabelFreeStudent(backbone, None, of_cells=False).eval()
    head: nn.Module = nn.Identity()  # widths were equal, and nothing was aligned
    kind = str(config.get("align_head") or "linear")
    if state:
        teacher_width = list(state.values())[-1].shape[0]  # the last layer's bias
        head = Projector(backbone.spec.feature_width, teacher_width, kind)
        head.load_state_dict(dict(state))
    # A linear head gives the same for the mean as on average for the cells, and the mean is cheaper.
    return LabelFreeStudent(backbone, head, of_cells=kind != "linear").eval()


class Preprocess:
    """A PIL image → the student's input, as in its training: upright, RGB, resized, normalized."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> Tensor:
        """float32 [3, S, S] of an image; [T, 3, S, S] of the frames of a clip.

        Raises:
            DeliveryError: an image for a student of clips, or frames for a student of images.
            imaging.decode.ImageError: pixels without a defined white.
        """
        is_clip = not isinstance(image, Image.Image)
        if is_clip != self.card.takes_clips:
            expected = "a clip, a list of PIL images" if self.card.takes_clips else "one PIL image"
            raise DeliveryError(
                f"preprocess: {self.card.student} takes {expected}, got {'a list' if is_clip else 'one image'}"
            )
        frames = [image] if isinstance(image, Image.Image) else image
        shown = np.stack([self.card.render(upright_rgb(frame, self.card.bit_depth)) for frame in frames])
        normalized = torch.from_numpy(self.card.normalize(shown))
        return normalized if is_clip else normalized[0]

    def __repr__(self) -> str:
        side = self.card.image_size
        return f"Preprocess({side}×{side}, {self.card.resize}, mean={self.card.mean}, std={self.card.std})"


def load_student(run: str | os.PathLike[str]) -> nn.Module:
    """The trained student of a run folder (or of a `best.pt`), in evaluation mode on the CPU, with LoRA merged.

        model = load_student("runs/resnet18")
        scores = model(model.preprocess(image)[None]).softmax(1)[0]
        model.class_names[scores.argmax()]

    The module takes float32 [B, 3, S, S] (clips [B, T, 3, S, S]) and returns logits [B, C]; masks: [B, C, S, S];
    detectors: boxes as center and size in pixels of the input, then class scores, [B, 4 + C, A] of A anchors;
    label-free students: the tuple of embedding [B, D], features, and embedding in the teacher's space, as far as they
    exist. `class_names` is a tuple of texts and `preprocess` a `Preprocess`.

    Raises:
        DeliveryError: no such run, a run that has not finished, an exported file.
        train.checkpoint.CheckpointError: a damaged checkpoint.
    """
    path = Path(run)
    if not path.exists():
        raise DeliveryError(f"{path}: no such run or file; expected a run folder or its best.pt")
    student, card = open_student(path)
    model = exported_face(student).eval()
    model.class_names = card.class_names  # type: ignore[assignment]
    model.preprocess = Preprocess(card)  # type: ignore[assignment]
    return model
