"""Export a student: ONNX with dynamic batch, or torch.export; each checked against PyTorch on real inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from files.writing import check_writable, whole_file
from train.deliver.inputs import run_folder, sample_inputs
from train.deliver.model import ModelCard, TorchModel, open_student
from train.deliver.program import OPSET, write_onnx, write_torch_export
from train.errors import DeliveryError
from train.run_folder import make_folder

Format = Literal["onnx", "torch-export"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}

CHECK_IMAGES = 16
# Largest allowed difference of the outputs, as a share of their largest absolute value (and at least 1e-4): both
# runtimes compute in float32, in different order of summation and with fused batch norms.
RELATIVE_TOLERANCE = 1e-3
ABSOLUTE_TOLERANCE = 1e-4


class Exported(NamedTuple):
    """What was written, and how far it is from PyTorch on `checked_images` real inputs."""

    path: Path
    format: str
    size_bytes: int
    checked_images: int
    max_abs_difference: float
    tolerance: float


def export_student(
    run: Path, format: Format, out: Path | None = None, images: Path | None = None, opset: int = OPSET
) -> Exported:
    """Export `best.pt` of a run and compare it with PyTorch on real images.

    Args:
        out: the file to write; None names it after the student, in the run folder.
        images: a folder to take the check's images (or clips) from; None takes the run's store.
        opset: ONNX operator set.
    Raises:
        DeliveryError: unknown run, an operator that cannot be exported, outputs that differ by more than the
            tolerance. Nothing is left at `out` then.
    """
    check_writable(out or run_folder(run), "--out")
    student, card = open_student(run)
    default = f"{file_name(card.student)}{SUFFIXES[format]}"
    path = out or run_folder(run) / default
    if path.is_dir():
        raise DeliveryError(f"--out {path}: is a folder, expected a file: name one in it, {path / default}")
    make_folder(path.parent)
    inputs = sample_inputs(run, card, CHECK_IMAGES, images)
    expected = TorchModel(student, card, torch.device("cpu")).outputs(inputs)
    with whole_file(path) as partial:
        got = writer_of(format, card)(student, card, partial, inputs, opset)
        difference, tolerance = worst_difference(card, got, expected)
        if not difference <= tolerance:
            raise DeliveryError(
                f"{path.name}: outputs differ by {difference:.3g} from PyTorch on {len(inputs)} real images, allowed "
                f"{tolerance:.3g}: not written; please report the student {card.student}"
            )
    return Exported(path, format, path.stat().st_size, len(inputs), difference, tolerance)


def worst_difference(
    card: ModelCard, got: Mapping[str, NDArray[np.float32]], expected: Mapping[str, NDArray[np.float32]]
) -> tuple[float, float]:
    """The largest difference and its tolerance, of the output that uses most of its tolerance."""
    found = []
    for name, values in expected.items():
        ours, theirs = comparable(card, got[name]), comparable(card, values)
        tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(theirs).max()))
        found.append((float(np.abs(ours - theirs).max()), tolerance))
    # A difference that is no number is the worst of all.
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))


def writer_of(format: Format, card: ModelCard) -> Callable[..., dict[str, NDArray[np.float32]]]:
    """What writes the format: detectors as ONNX go through ultralytics, whose tools then read the file."""
    if card.task == "detection":
        from train.deliver.yolo_export import write_yolo_onnx, write_yolo_program

        return write_yolo_onnx if format == "onnx" else write_yolo_program
    return write_onnx if format == "onnx" else write_torch_export


def comparable(card: ModelCard, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs on one scale: a detector's boxes [B, :4, A] in shares of the image, as its scores lie in [0, 1]."""
    if card.task != "detection":
        return outputs
    return np.concatenate([outputs[:, :4] / card.image_size, outputs[:, 4:]], axis=1)


def file_name(student: str) -> str:
    """`timm:resnet10t` as a file is called on every system: timm-resnet10t."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", student)
