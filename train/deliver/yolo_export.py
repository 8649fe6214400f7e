"""YOLOv8 students exported, from our weights-only checkpoint: as ONNX by ultralytics' own exporter."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.deliver.model import ModelCard, OnnxModel
from train.deliver.program import add_card, exporting, quiet, write_torch_export
from train.errors import DeliveryError
from train.students.base import Student
from train.yolo.offline import prepare_ultralytics

OPSETS = range(11, 21)  # that torch's older exporter, which ultralytics uses, and ONNX Runtime 1.20 both know


def write_yolo_onnx(
    student: Student, card: ModelCard, path: Path, inputs: NDArray[np.float32], opset: int
) -> dict[str, NDArray[np.float32]]:
    """Write what `YOLO(…).export(format="onnx", dynamic=True)` writes, with the model card added to its metadata.

    Returns its predictions [B, 4 + C, A] on `inputs`, as `logits`.
    """
    import onnx

    prepare_ultralytics()
    from ultralytics.engine.exporter import Exporter

    if opset not in OPSETS:
        raise DeliveryError(
            f"cannot export {card.student} to ONNX operator set {opset}: ultralytics makes {OPSETS[0]} to {OPSETS[-1]}"
        )
    network: Any = copy.deepcopy(student).network  # type: ignore[union-attr]  # the exporter changes its head
    network.names, network.task = dict(enumerate(card.class_names)), "detect"
    options = {"format": "onnx", "dynamic": True, "simplify": False, "device": "cpu"}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        network.pt_path = str(Path(scratch) / "student.pt")  # where ultralytics writes: beside this name
        exporter = Exporter(overrides={**options, "imgsz": card.image_size, "opset": opset})
        made = exporting(lambda: exporter(model=network), f"{card.student} to ONNX (operator set {opset})")
        add_card(onnx.load(made), card, path)
    # ultralytics' name for it is output0.
    return {"logits": OnnxModel(path).run(inputs)}


def write_yolo_program(
    student: Student, card: ModelCard, path: Path, inputs: NDArray[np.float32], opset: int
) -> dict[str, NDArray[np.float32]]:
    """`write_torch_export` for a detector, whose head would take the batch of the example for the only one."""
    network: Any = copy.deepcopy(student)
    network.network.model[
        -1
    ].dynamic = True  # anchors are computed in the graph, not kept with the batch's shape
    return write_torch_export(network, card, path, inputs, opset)
