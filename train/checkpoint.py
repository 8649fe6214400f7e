"""Checkpoints: plain types and tensors, written atomically, read with weights-only loading.

`best.pt` holds a student: enough to build, run and export it. `last.pt` holds the same and, under `training`,
all that a run needs to resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from files.weights import WeightsError, read_weights
from files.writing import replacing
from store.format import Manifest
from train.errors import TrainError
from train.students.base import Student

FORMAT = 1
BEST, LAST, ADAPTERS = "best.pt", "last.pt", "adapters.pt"

# The statistics that timm's published weights were trained with.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class CheckpointError(TrainError):
    """A checkpoint cannot be written, or a file is no checkpoint of ours."""


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (plain types and tensors) to `path`: complete, or not at all.

    Raises CheckpointError when it cannot be written; what was at `path` before is then untouched.
    """
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:
        # torch's own text hides the reason of the operating system.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or " ".join(str(error).split())[:200]
        kept = f"; the previous {path.name} is intact" if path.exists() else ""
        raise CheckpointError(
            f"{path}: cannot be saved: {reason}{kept}. Free some space, then pass --resume"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it can run code.

    Raises CheckpointError for a missing, damaged or foreign file.
    """
    try:
        content = read_weights(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such checkpoint: expected {BEST} or {LAST} of a run folder"
        ) from None
    except WeightsError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from None
    if not isinstance(content, dict) or "model_state_dict" not in content or "student" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no student in it)")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {content.get('format')}, this program reads {FORMAT}"
        )
    return content


def describe_student(
    student: Student, manifest: Manifest, config: Mapping[str, Any], task: str
) -> dict[str, Any]:
    """Everything about a student but its weights; the same in every checkpoint of a run."""
    return {
        "format": FORMAT,
        "student": student.spec.to_dict(),
        "task": task,
        "class_names": list(manifest.class_names),
        "teacher": manifest.teacher.fingerprint,
        "preprocessing": {
            "image_size": student.spec.image_size,
            "resize": manifest.preprocessing.resize,
            "mean": list(normalization(student)[0]),
            "std": list(normalization(student)[1]),
            "bit_depth": manifest.preprocessing.bit_depth,
            **clip_sampling(manifest),
        },
        "config": dict(config),
    }


def clip_sampling(manifest: Manifest) -> dict[str, Any]:
    """How many frames (or, with `frame_pairs`, pairs of neighbors) of each clip were shown; empty for images."""
    if "frames" not in manifest.options:
        return {}
    pairs = int(manifest.options.get("frames_per_row", 1)) == 2
    return {"frames": int(manifest.options["frames"]), "frame_pairs": pairs}


def normalization(student: Student) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the student's input, RGB in [0, 1]: those of its published weights."""
    if student.spec.type == "yolov8":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for holder in ("model", "encoder"):
        published = getattr(getattr(student, holder, None), "pretrained_cfg", None) or {}
        if published.get("mean") and published.get("std"):
            return tuple(published["mean"]), tuple(published["std"])
    return IMAGE_MEAN, IMAGE_STD


def load_student_from_run(run: Path, name: str = BEST) -> tuple[Student, dict[str, Any]]:
    """The trained student of a run folder (or of a checkpoint file), in evaluation mode, and the checkpoint.

    LoRA adapters are applied again as they were trained.
    Raises CheckpointError for a folder without a finished epoch, or a file that is no checkpoint.
    """
    from train.students.build import rebuild_student

    path = run / name if run.is_dir() else run
    if run.is_dir() and not path.exists():
        raise CheckpointError(f"{run}: no {name}: not a run folder, or its first epoch has not finished")
    content = load_checkpoint(path)
    student = rebuild_student(content["student"])
    if content["config"].get("lora_rank"):
        from train.lora import apply_lora_options

        # Where the run had them, so that its state dict fits.
        apply_lora_options(student, content["config"])
    student.load_state_dict(content["model_state_dict"])
    return student.eval(), content
