"""`from train import load_student`: a trained student as a plain module with its preprocessing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imaging.decode import upright_rgb
from train.deliver.model import ModelCard, exported_face, open_student
from train.errors import DeliveryError


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
