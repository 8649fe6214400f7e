"""Predictions on images, folders, globs and clips: one record a file, and pictures that show it."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imaging.decode import IMAGE_SUFFIXES
from train.delivery.clips import find_clips, predict_clip
from train.delivery.detect import detect_files
from train.delivery.draw import draw_label, draw_mask, mask_image
from train.delivery.model import (
    ModelCard,
    TrainedModel,
    batches,
    choose_device,
    class_name,
    open_model,
    open_student,
)
from train.delivery.records import BadFile, Prediction, read_image
from train.delivery.scores import top_classes
from train.errors import DeliveryError

RECORDS_FILE = "predictions.jsonl"


def predict_files(
    run: Path, inputs: Sequence[str], *, device: str = "auto", batch_size: int = 16, confidence: float = 0.25
) -> Iterator[Prediction | BadFile]:
    """Predict every image (or clip, for students of clips) that `inputs` name, in their order.

    Args:
        run: a run folder, its best.pt, or an exported ONNX file.
        inputs: image files, folders (searched through), or globs.
        confidence: detections below it are left out.
    Raises:
        DeliveryError: unknown run, or inputs without any image.
    """
    if is_detector(run):
        student, card = open_student(run)
        yield from detect_files(
            student, card, find_files(inputs, IMAGE_SUFFIXES), batch_size, confidence, choose_device(device)
        )
        return
    model = open_model(run, device)
    if model.card.task == "sequence":
        yield from (predict_clip(model, path) for path in find_clips(list(inputs)))
        return
    for files in batches(find_files(inputs, IMAGE_SUFFIXES), batch_size):
        yield from predict_batch(model, files)


def is_detector(run: Path) -> bool:
    """A detector's run folder also holds what ultralytics opens."""
    return (run / "ultralytics" / "best.pt").exists()


def find_files(inputs: Sequence[str], suffixes: frozenset[str]) -> list[Path]:
    """The files that `inputs` name, each once, in order; folders are searched through and sorted.

    Raises DeliveryError for an input that names nothing.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise DeliveryError(
                    f"{path}: no files to predict in it (looked for {', '.join(sorted(suffixes))})"
                )
            found |= dict.fromkeys(inside)
        elif path.exists():
            found[path] = None
        elif glob.has_magic(text) and (matches := sorted(glob.glob(text, recursive=True))):
            found |= dict.fromkeys(Path(match) for match in matches if Path(match).is_file())
        else:
            raise DeliveryError(
                f"{text}: no such file, folder or match; name images, folders or a quoted glob"
            )
    return list(found)


def predict_batch(model: TrainedModel, files: Sequence[Path]) -> Iterator[Prediction | BadFile]:
    """Predict one batch; unreadable files come out as `BadFile`, in their place."""
    # A mask is drawn on the picture's own pixels; for a label, a JPEG may be decoded at a fraction of its size.
    target_size = None if model.card.task == "segmentation" else model.card.image_size
    images = [read_image(path, target_size) for path in files]
    good = [image for image in images if isinstance(image, Image.Image)]
    pixels = [model.card.render(image) for image in good]
    logits = iter(model.run(model.card.normalize(np.stack(pixels))) if good else ())
    for path, image in zip(files, images, strict=True):
        yield image if isinstance(image, BadFile) else interpret(model.card, path, image, next(logits))


def interpret(card: ModelCard, path: Path, image: Image.Image, logits: NDArray[np.float32]) -> Prediction:
    """One image's logits as a record and a picture."""
    if card.task == "segmentation":
        return segmentation(card, path, image, logits)
    top = top_classes(card, logits)
    best = top[0]
    return Prediction(
        {"file": str(path), "top": top}, draw_label(image, f"{best['class']} {best['probability']:.0%}")
    )


def segmentation(card: ModelCard, path: Path, image: Image.Image, logits: NDArray[np.float32]) -> Prediction:
    """Class map [S, S] carried back to the image's own pixels; shares are of the image's area."""
    classes = mask_image(logits.argmax(0).astype(np.uint8), card.view_of(image.size), image.size)
    counts = np.bincount(np.asarray(classes).ravel(), minlength=256)
    shares = {class_name(card, int(i)): float(counts[i] / counts.sum()) for i in np.flatnonzero(counts)}
    return Prediction({"file": str(path), "shares": shares}, draw_mask(image, classes), classes)


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """Append to predictions.jsonl and write the pictures; equal names of different folders stay apart."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RECORDS_FILE).open("a", encoding="utf-8") as file:
        for prediction in predictions:
            stem = picture_name(folder, Path(prediction.record["file"]))
            prediction.image.save(folder / f"{stem}.jpg", quality=90)
            if prediction.mask is not None:
                prediction.mask.save(folder / f"{stem}-mask.png")
            file.write(json.dumps({**prediction.record, "picture": f"{stem}.jpg"}, ensure_ascii=False) + "\n")


def picture_name(folder: Path, source: Path) -> str:
    """The source's name, with its folders' where that is taken."""
    stem = source.stem
    if (folder / f"{stem}.jpg").exists():
        stem = "-".join(
            [*(part for part in source.parent.parts if part not in ("/", "..", ".")), source.stem]
        )
    number, name = 1, stem
    while (folder / f"{name}.jpg").exists():
        number += 1
        name = f"{stem}-{number}"
    return name
