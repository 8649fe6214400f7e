"""Self-training (`--boxes-from`): a trained detector labels the images that have no boxes, once, before the training.

Only detections are kept that are more confident than the value at which the detector's mean F1 on the validation split is best.
An image without any stays out, since it would count as background. What was found is kept in RUN/boxes.npz: a resumed run, its
other processes and its control read it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from console.output import get_logger
from console.progress import track_progress
from store.reader import Store
from store.summary import unlabeled_rows
from train.config import TrainConfig
from train.data.images import ImageReader
from train.errors import ConfigError
from train.run_folder import BOXES_FOUND

log = get_logger("train")

BATCH = 16


def label_images(config: TrainConfig, store: Store) -> None:
    """Write RUN/boxes.npz, if it is not there.

    Raises ConfigError for a model that is no detector of these classes, and where every image is labeled.
    """
    split = store[config.train_split]
    rows = np.flatnonzero(split.valid & unlabeled_rows(split, "boxes"))
    if not len(rows):
        raise ConfigError(
            f"boxes_from {config.boxes_from}: every image of {split.where} is labeled: leave the option out"
        )
    if (config.out / BOXES_FOUND).exists():
        return
    found = find_boxes(config, store, rows)
    found.write(config.out)
    log.info(
        "boxes_from %s: %d boxes of confidence %.2f or more in %d of %d images without labels",
        *(config.boxes_from, len(found.rows), float(found.confidence)),
        *(len(np.unique(found.rows)), len(rows)),
    )


def find_boxes(config: TrainConfig, store: Store, rows: NDArray[np.int64]) -> Any:
    """What the detector finds in these rows of the training split, as `train.yolo.dataset.FoundBoxes`."""
    from train.deliver.model import TorchModel, choose_device, open_student
    from train.deliver.predict import detect
    from train.yolo.dataset import FoundBoxes, clean_boxes
    from train.yolo.evaluate import check_same_classes

    source = config.boxes_from
    assert source is not None
    student, card = open_student(source)
    if card.task != "detection":
        raise ConfigError(f"boxes_from {source}: its task is {card.task}, expected a run of a YOLOv8 student")
    check_same_classes(tuple(store.manifest.class_names), card.class_names, config.store, source)
    confidence = best_confidence(config, store, student.network, card.class_names, card.image_size)
    model = TorchModel(student, card, choose_device(config.devices[0]))
    root = config.data_root or store.manifest.data_root
    split, preprocessing = store[config.train_split], store.whole.manifest.preprocessing
    reader = ImageReader(split, Path(root) if root else None, preprocessing)
    of_rows: list[int] = []
    boxes, classes = [], []
    with track_progress(len(rows), "labeling images", "images") as progress:
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH].tolist()
            images = [reader.read(row, card.image_size).image.convert("RGB") for row in some]
            for row, image, found in zip(some, images, detect(model, images, confidence), strict=True):
                centered, kept = clean_boxes(found[:, :4].astype(np.float64) / np.tile(image.size, 2))
                of_rows += [row] * len(centered)
                boxes.append(centered)
                classes.append(found[kept, 5].astype(np.int64))
            progress.advance(len(some))
    return FoundBoxes(
        rows=np.array(of_rows, np.int64),
        boxes=np.concatenate(boxes).astype(np.float32),
        classes=np.concatenate(classes),
        confidence=np.array(confidence),
    )


def best_confidence(
    config: TrainConfig, store: Store, network: Any, class_names: tuple[str, ...], image_size: int
) -> float:
    """The confidence at which the mean F1 over the classes is best on the validation split, at an overlap of 0.5."""
    from train.yolo.dataset import open_split
    from train.yolo.evaluate import validate

    ours = config.replace(image_size=image_size)
    val = open_split(store, config.val_split, image_size=image_size, data_root=config.data_root, distil=False)
    with tempfile.TemporaryDirectory() as scratch:
        validator, _ = validate(ours, val, network, dict(enumerate(class_names)), Path(scratch))
    box = validator.metrics.box
    f1 = np.asarray(box.f1_curve).mean(0) if len(box.f1_curve) else np.zeros(1)
    if not f1.max() > 0:
        raise ConfigError(
            f"boxes_from {config.boxes_from}: it finds none of the objects of split {config.val_split}, so it cannot label "
            "images: train it longer"
        )
    return float(box.px[f1.argmax()])
