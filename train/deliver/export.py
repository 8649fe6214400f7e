"""Export a student: ONNX with dynamic batch, torch.export, or a folder of timm; each checked against PyTorch on real inputs.

The model card is in the file. Detectors as ONNX go through ultralytics' own exporter, whose tools then read the file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from files.writing import check_writable, whole_file
from train.deliver.inputs import run_folder, sample_inputs
from train.deliver.model import METADATA_KEY, ModelCard, OnnxModel, TorchModel, exported_face, open_student
from train.deliver.timm_folder import check_timm_student, publish_folder, scratch_beside, write_timm_folder
from train.errors import DeliveryError
from train.run_folder import make_folder
from train.students.base import Student
from train.students.offline import prepare_ultralytics

Format = Literal["onnx", "torch-export", "timm"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2", "timm": "-timm"}  # timm: a folder

# The newest operator set that ONNX Runtime 1.20, the oldest that we allow, supports completely.
OPSET = 20
OPSETS = range(
    11, 21
)  # that torch's older exporter, which ultralytics uses, and ONNX Runtime 1.20 both support

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
        out: the file (timm: folder) to write; None names it after the student, in the run folder.
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
    if path.is_dir() and format != "timm":
        raise DeliveryError(f"--out {path}: is a folder, expected a file: name one in it, {path / default}")
    if format == "timm":
        check_timm_student(student)
    make_folder(path.parent)
    inputs = sample_inputs(run, card, CHECK_IMAGES, images)
    expected = TorchModel(student, card, torch.device("cpu")).outputs(inputs)

    def checked(got: Mapping[str, NDArray[np.float32]]) -> tuple[float, float]:
        difference, tolerance = worst_difference(card, got, expected)
        if not difference <= tolerance:
            raise DeliveryError(
                f"{path.name}: outputs differ by {difference:.3g} from PyTorch on {len(inputs)} real images, allowed "
                f"{tolerance:.3g}: not written; please report the student {card.student}"
            )
        return difference, tolerance

    if format == "timm":
        with scratch_beside(path) as scratch:
            logits = write_timm_folder(student, card, Path(scratch), inputs)
            difference, tolerance = checked({"logits": logits})
            size = sum(file.stat().st_size for file in Path(scratch).iterdir())
            publish_folder(Path(scratch), path)
    else:
        with whole_file(path) as partial:
            difference, tolerance = checked(writer_of(format, card)(student, card, partial, inputs, opset))
        size = path.stat().st_size
    return Exported(path, format, size, len(inputs), difference, tolerance)


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
