"""An exported ONNX file as a student, so that the task's own evaluation measures it."""

from __future__ import annotations

import torch
from torch import nn

from train.deliver.model import OnnxModel
from train.errors import DeliveryError
from train.students.base import Student, StudentOutput, StudentSpec
from train.students.families import parse_student_name


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
        self.session = model
        self.spec = StudentSpec(
            name=card.student,
            type=parse_student_name(card.student).type,
            size="",
            task=card.task,
            num_classes=class_count(model),
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
                check_frames(self.session, length)
        logits = torch.from_numpy(self.session.run(images.numpy()))
        return StudentOutput(logits, logits)


def check_frames(model: OnnxModel, length: int) -> None:
    """An exported clip student takes clips of one length. Raises DeliveryError for another."""
    shape = model.session.get_inputs()[0].shape
    if isinstance(shape[1], int) and shape[1] != length:
        raise DeliveryError(
            f"the exported student takes clips of {shape[1]} frames, the store has one of {length}: "
            "measure the run folder instead of its ONNX file"
        )


def class_count(model: OnnxModel) -> int:
    """Classes of the head, which may be more than have names."""
    width = model.session.get_outputs()[0].shape[1]
    named = len(model.card.class_names)
    return max(named, width) if isinstance(width, int) else named
