"""Predictions on clips: video files, or folders of frames in the order of their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imaging.clips import frame_files, read_clip_frames
from imaging.decode import IMAGE_SUFFIXES
from imaging.errors import ImageError
from train.delivery.draw import draw_label
from train.delivery.model import TrainedModel
from train.delivery.records import BadFile, Prediction
from train.delivery.scores import top_classes
from train.errors import DeliveryError

CLIP_SUFFIXES = frozenset([".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"])
FRAMES = 16


def find_clips(inputs: list[str]) -> list[Path]:
    """Video files and frame folders that `inputs` name; a folder of both is searched through.

    Raises DeliveryError for an input that names nothing.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if not path.exists():
            raise DeliveryError(f"{path}: no such clip; name video files or folders of frames")
        inside = clips_below(path) if path.is_dir() else [path]
        if not inside:
            raise DeliveryError(f"{path}: no video files and no folders of frames in it")
        found |= dict.fromkeys(inside)
    return list(found)


def clips_below(folder: Path) -> list[Path]:
    """The folder itself when it holds frames, else the videos and frame folders below it."""
    if frame_files(folder):
        return [folder]
    videos = [path for path in folder.rglob("*") if path.suffix.lower() in CLIP_SUFFIXES and path.is_file()]
    images = {path.parent for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    return sorted({*videos, *images})


def predict_clip(model: TrainedModel, path: Path, frames: int = FRAMES) -> Prediction | BadFile:
    """One clip's most probable classes; the picture is its middle frame."""
    try:
        images = read_clip_frames(path, frames)
    except (ImageError, OSError) as error:
        return BadFile(str(path), str(error))
    pixels = np.stack([model.card.render(image) for image in images])
    logits = model.run(model.card.normalize(pixels)[None])[0]
    top = top_classes(model.card, logits)
    label = f"{top[0]['class']} {top[0]['probability']:.0%}"
    return Prediction(
        {"file": str(path), "frames": len(images), "top": top}, draw_label(images[len(images) // 2], label)
    )
