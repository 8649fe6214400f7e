"""A student as a program of another runtime: ONNX, or torch.export, with its model card inside."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.deliver.model import METADATA_KEY, ModelCard, OnnxModel, TorchModel, exported_face
from train.errors import DeliveryError
from train.students.base import Student

# The newest operator set that ONNX Runtime 1.20, the oldest that we allow, reads whole.
OPSET = 20


def write_onnx(
    student: Student, card: ModelCard, path: Path, inputs: NDArray[np.float32], opset: int
) -> dict[str, NDArray[np.float32]]:
    """Write the ONNX file and return its outputs on `inputs` in ONNX Runtime, by name."""
    with quiet():
        program = exporting(
            lambda: torch.onnx.export(
                traced(student, inputs),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=output_names(student, card, inputs),
            ),
            f"{card.student} to ONNX (operator set {opset})",
        )
    assert program is not None  # torch returns None only for the old exporter
    check_opset(program.model_proto, card, opset)
    add_card(program.model_proto, card, path)
    return OnnxModel(path).outputs(inputs)


def output_names(student: Student, card: ModelCard, inputs: NDArray[np.float32]) -> list[str]:
    """Names of what the student returns: `logits`, or those of `Embeddings`."""
    return list(TorchModel(student, card, torch.device("cpu")).outputs(inputs[:1]))


def check_opset(model: Any, card: ModelCard, opset: int) -> None:
    """The exporter answers an operator set that it cannot make with another one, and only logs it."""
    (made,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if made != opset:
        raise DeliveryError(
            f"cannot export {card.student} to ONNX operator set {opset}: the exporter made {made} of it; pass --opset "
            f"{made}, or leave it out for {OPSET}"
        )


def add_card(model: Any, card: ModelCard, path: Path) -> None:
    """Write an ONNX model to `path` with the model card (and the class names, a line each) in its metadata."""
    import onnx

    for name, value in ((METADATA_KEY, card.to_json()), ("class_names", "\n".join(card.class_names))):
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    onnx.save(model, str(path))


def write_torch_export(
    student: Student, card: ModelCard, path: Path, inputs: NDArray[np.float32], opset: int
) -> dict[str, NDArray[np.float32]]:
    """Write a `torch.export` program (the model card in its extra files) and return its outputs on `inputs`, by name."""
    with quiet():
        program = exporting(lambda: traced(student, inputs), f"{card.student} with torch.export")
    with path.open("wb") as file:  # a name without .pt2 would draw a warning
        torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": card.to_json()})
    with path.open("rb") as file:
        loaded = torch.export.load(io.BytesIO(file.read()))
    with torch.inference_mode():
        found = loaded.module()(torch.from_numpy(inputs))
    values = found if isinstance(found, tuple) else (found,)
    names = output_names(student, card, inputs)
    return {name: np.asarray(value.numpy()) for name, value in zip(names, values, strict=True)}


def traced(student: Student, inputs: NDArray[np.float32]) -> torch.export.ExportedProgram:
    """The student as a graph with dynamic batch.

    Traced with three samples: a batch of one, or of a size that occurs elsewhere in the network, could be taken
    for a constant.
    """
    example = torch.from_numpy(np.resize(inputs, (3, *inputs.shape[1:])))
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(exported_face(student), (example,), dynamic_shapes=dynamic)


def exporting(work: Callable[[], Any], what: str) -> Any:
    """Run an exporter; what it cannot do becomes one readable line."""
    try:
        return work()
    except Exception as error:  # exporters raise whatever their passes raise
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise DeliveryError(f"cannot export {what}: {reason[:300]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print their steps on stdout, which belongs to results, and log what ends as our own error."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir", "ultralytics"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
