"""Detections of a YOLOv8 student: from our weights-only checkpoint (no pickled model is opened), or from ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from files.names import printable
from train.deliver.draw import Box, Label, draw_boxes
from train.deliver.model import ModelCard, TrainedModel, class_name
from train.deliver.records import Prediction
from train.yolo.offline import prepare_ultralytics

IOU_THRESHOLD = 0.7  # ultralytics' default for predicting


def detect(
    model: TrainedModel, images: Sequence[Image.Image], confidence: float
) -> list[NDArray[np.float32]]:
    """Detections of each image, float32 [n, 6]: x0, y0, x1, y1 in the image's pixels, confidence, class.

    Images are letterboxed to the student's side, as ultralytics does; boxes end at the image's edge.
    """
    prepare_ultralytics()
    from ultralytics.utils.nms import non_max_suppression

    card = model.card
    predictions = torch.from_numpy(
        model.run(card.normalize(np.stack([card.render(image) for image in images])))
    )
    found = non_max_suppression(predictions, confidence, IOU_THRESHOLD, nc=predictions.shape[1] - 4)
    return [to_image(boxes.numpy(), card, image.size) for boxes, image in zip(found, images, strict=True)]


def to_image(boxes: NDArray[np.float32], card: ModelCard, size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes [n, 6] in pixels of the student's input → pixels of the image of `size` (width, height)."""
    view, scale = card.view_of(size), np.asarray(size, dtype=np.float64)
    corners = boxes[:, :4].reshape(-1, 2) / card.image_size
    inside = np.clip(view.apply(corners) * scale, 0, scale)
    return np.concatenate([inside.reshape(-1, 4), boxes[:, 4:6]], axis=1).astype(np.float32)


def describe(card: ModelCard, path: Path, image: Image.Image, found: NDArray[np.float32]) -> Prediction:
    """`boxes`: corners in pixels, class and confidence of each detection, most confident first."""
    boxes = [
        {
            "xyxy": [round(float(value), 2) for value in row[:4]],
            "class": class_name(card, int(row[5])),
            "index": int(row[5]),
            "confidence": float(row[4]),
        }
        for row in found
    ]
    return Prediction({"file": printable(str(path)), "boxes": boxes}, draw_boxes(image, drawn(card, found)))


def drawn(card: ModelCard, found: NDArray[np.float32]) -> list[Box]:
    """What `draw_boxes` takes, labeled with class and confidence."""
    return [
        Box(
            (float(row[0]), float(row[1]), float(row[2]), float(row[3])),
            int(row[5]),
            Label(class_name(card, int(row[5])), int(row[5]), f"{row[4]:.0%}"),
        )
        for row in found
    ]
