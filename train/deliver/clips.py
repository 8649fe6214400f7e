"""Predictions on clips: video files, or folders of frames in the order of their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from files.names import printable
from imaging.clips import VIDEO_SUFFIXES, frame_files, read_clip_frames
from imaging.decode import IMAGE_SUFFIXES, ImageError
from train.deliver.draw import draw_label
from train.deliver.files import expand_inputs
from train.deliver.model import ModelCard, TrainedModel
from train.deliver.records import BadFile, Prediction
from train.deliver.scores import top_classes, top_label
from train.errors import DeliveryError

CLIP_SUFFIXES = VIDEO_SUFFIXES | {".gif"}
FRAMES = 16  # of a clip, where the checkpoint does not say


def find_clips(inputs: Sequence[str]) -> list[Path]:
    """Video files and frame folders that `inputs` name; a folder of both is searched through.

    Raises DeliveryError for an input that names nothing.
    """
    return expand_inputs(inputs, clips_below, "video files and no folders of frames", "clips")


def clips_below(folder: Path) -> list[Path]:
    """The folder itself when it holds frames, else the videos and frame folders below it; a file is a clip.

    Raises DeliveryError for a still image, which would be shown as a clip without motion.
    """
    if not folder.is_dir():
        if folder.suffix.lower() in IMAGE_SUFFIXES - CLIP_SUFFIXES:
            raise DeliveryError(
                f"{folder}: a still image, and this student takes clips: name video files or folders of frames"
            )
        return [folder]
    if frame_files(folder):
        return [folder]
    videos = [path for path in folder.rglob("*") if path.suffix.lower() in CLIP_SUFFIXES and path.is_file()]
    images = {path.parent for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    return sorted({*videos, *images})


def clip_pixels(card: ModelCard, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """A clip's frames as the student sees them, uint8 [T, S, S, 3]."""
    return np.stack([card.render(image) for image in images])


def predict_clip(model: TrainedModel, path: Path) -> Prediction | BadFile:
    """One clip's most probable classes (or embedding), of as many frames as the student was trained on.

    The picture is the middle frame.
    """
    card = model.card
    try:
        images = read_clip_frames(
            path, card.frames or FRAMES, pairs=card.frame_pairs, bit_depth=card.bit_depth
        )
    except (ImageError, OSError) as error:
        return BadFile(printable(str(path)), printable(str(error)))
    logits = model.run(card.normalize(clip_pixels(card, images))[None])[0]
    if card.task == "features":
        return Prediction({"file": printable(str(path)), "frames": len(images)}, None, embedding=logits)
    top = top_classes(card, logits)
    picture = draw_label(images[len(images) // 2], top_label(top))
    return Prediction({"file": printable(str(path)), "frames": len(images), "top": top}, picture)
