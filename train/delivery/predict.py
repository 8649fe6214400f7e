"""Predictions on images, folders, globs and clips: one record a file, and pictures that show it."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from console.files import whole_file, writing
from train.delivery.clips import find_clips, predict_clip
from train.delivery.detect import detect_batch
from train.delivery.draw import IGNORE_INDEX, Label, draw_label, draw_legend, draw_mask, mask_image
from train.delivery.files import find_images
from train.delivery.model import ModelCard, TrainedModel, batches, class_name, open_model
from train.delivery.records import BadFile, Prediction, read_image
from train.delivery.scores import top_classes, top_label
from train.errors import DeliveryError
from train.rundir import make_folder

RECORDS_FILE = "predictions.jsonl"


def predict_files(
    run: Path,
    inputs: Sequence[str],
    *,
    out: Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
    confidence: float = 0.25,
) -> Iterator[Prediction | BadFile]:
    """Predict every image (or clip, for students of clips) that `inputs` name, in their order.

    What is wrong with the arguments is said at once, before the first prediction is asked for.

    Args:
        run: a run folder, its best.pt, or an exported ONNX file.
        inputs: image files, folders (searched through), or globs.
        out: the folder that pictures will be written to: must not be one of the inputs'.
        confidence: detections below it are left out.
    Raises:
        DeliveryError: unknown run, inputs without any image, or inputs that pictures might be written over.
    """
    model = open_model(run, device)
    files = find_clips(inputs) if model.card.task == "sequence" else find_images(inputs)
    if out is not None:
        spare_inputs(files, out)
    return predict_found(model, files, batch_size, confidence)


def spare_inputs(files: Sequence[Path], out: Path) -> None:
    """Refuse a folder that inputs lie in (or that is one, of frames): a picture is called like its input."""
    folder = out.resolve()
    for path in files:
        if folder in (path.resolve(), path.resolve().parent, path.parent.resolve()):
            raise DeliveryError(
                f"--out {out}: holds {path}, an input, and pictures are called like their inputs: choose another "
                "folder"
            )


def predict_found(
    model: TrainedModel, found: Sequence[Path], batch_size: int, confidence: float
) -> Iterator[Prediction | BadFile]:
    """Predict files in batches, and clips one by one."""
    if model.card.task == "sequence":
        yield from (predict_clip(model, path) for path in found)
        return
    for files in batches(found, batch_size):
        if model.card.task == "detection":
            yield from detect_batch(model, files, confidence)
        else:
            yield from predict_batch(model, files)


def predict_batch(model: TrainedModel, files: Sequence[Path]) -> Iterator[Prediction | BadFile]:
    """Predict one batch; unreadable files come out as `BadFile`, in their place."""
    # A mask is drawn on the picture's own pixels; for a label, a JPEG may be decoded at a fraction of its size.
    target_size = None if model.card.task == "segmentation" else model.card.image_size
    images = [read_image(path, target_size, model.card.bit_depth) for path in files]
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
    return Prediction({"file": str(path), "top": top}, draw_label(image, top_label(top)))


def segmentation(card: ModelCard, path: Path, image: Image.Image, logits: NDArray[np.float32]) -> Prediction:
    """Class map [S, S] carried back to the image's own pixels; shares are of the image's area."""
    classes = mask_image(logits.argmax(0).astype(np.uint8), card.view_of(image.size), image.size)
    counts = np.bincount(np.asarray(classes).ravel(), minlength=256)
    shares = {class_name(card, int(i)): float(counts[i] / counts.sum()) for i in np.flatnonzero(counts)}
    legend = [Label(class_name(card, int(i)), int(i)) for i in np.flatnonzero(counts[:IGNORE_INDEX])]
    picture = draw_legend(draw_mask(image, classes), legend)
    return Prediction({"file": str(path), "shares": shares}, picture, classes)


class PredictionWriter:
    """predictions.jsonl and pictures in a folder; the records of an earlier call are replaced."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.folder, self.taken = folder, set[str]()
        with writing(folder / RECORDS_FILE):
            self.records = (folder / RECORDS_FILE).open("wb", buffering=0)

    def write(self, prediction: Prediction) -> None:
        """One line, and the picture (for masks also the bare mask); equal names of different folders stay apart."""
        stem = self.name(Path(prediction.record["file"]))
        with whole_file(self.folder / f"{stem}.jpg") as partial:
            prediction.image.save(partial, quality=90)
        if prediction.mask is not None:
            with whole_file(self.folder / f"{stem}-mask.png") as partial:
                prediction.mask.save(partial)
        record = {**prediction.record, "picture": f"{stem}.jpg"}
        self.append((json.dumps(record, ensure_ascii=False) + "\n").encode())

    def append(self, line: bytes) -> None:
        """A whole line or none."""
        end = self.records.tell()
        with writing(self.folder / RECORDS_FILE):
            if self.records.write(line) != len(line):  # the disk is full
                self.records.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def name(self, source: Path) -> str:
        """The source's name, with its folders' where that is taken."""
        folders = [part for part in source.parent.parts if part not in (source.anchor, "..", ".")]
        long = "-".join([*folders, source.stem])
        names = itertools.chain([source.stem, long], (f"{long}-{n}" for n in itertools.count(2)))
        free = next(name for name in names if name not in self.taken)
        self.taken.add(free)
        return free

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.records.close()
