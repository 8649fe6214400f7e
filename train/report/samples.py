"""The samples that a run gets most wrong, as pictures, and its per-class results."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from PIL import Image

from console.log import get_logger
from store import Store
from store.errors import DistillError
from store.format import BOX_CLASSES, BOXES
from train.delivery.clips import clip_pixels
from train.delivery.detect import detect, drawn
from train.delivery.draw import Box, draw_boxes, draw_mask, mask_image
from train.delivery.inputs import clip_reader, image_reader, run_options, spread
from train.delivery.model import ModelCard, TorchModel, batches, choose_device, class_name, open_student
from train.delivery.scores import softmax
from train.report import figures
from train.report.collect import Run
from train.report.page import Picture
from train.views import render_mask

logger = get_logger("report")

# The report looks at this many validation samples at most; pictures are shrunk to this many pixels a side.
SAMPLES_LOOKED_AT = 2000
PICTURE_SIDE = 256
BATCH = 32
IGNORE_INDEX = 255
CLIP_BATCH = 4
CONFIDENCE = 0.25
MATCH_IOU = 0.5
NOTHING = "nothing"
TRUTH_COLOUR = (0, 158, 115)


class Gallery(NamedTuple):
    """What a report says about one run's mistakes."""

    run_name: str
    text: str
    figures: list[go.Figure]
    pictures: list[Picture]


class Subject(NamedTuple):
    """What a scorer looks at: a run's student and the rows of its validation split."""

    run: Run
    model: TorchModel
    reader: Any  # ImageReader; for clips ClipReader
    split: Any
    rows: NDArray[np.int64]

    @property
    def card(self) -> ModelCard:
        return self.model.card

    @property
    def classes(self) -> int:
        return self.model.student.spec.num_classes


class Scored(NamedTuple):
    """One sample: how bad it is (higher is worse), and its picture with the prediction and the truth."""

    badness: float
    caption: str
    image: Image.Image


def gallery_of(run: Run, store: Store | None, count: int) -> Gallery | None:
    """The `count` worst validation samples of `run`; None where it cannot be run again, which the log says."""
    task = str(run.summary.get("task"))
    if store is None or task not in SCORERS:
        return None
    try:
        scored, drawings, text = SCORERS[task](subject_of(run, store))
    except DistillError as error:
        logger.warning("the report shows no samples of %s: %s", run.name, error)
        return None
    worst = sorted(scored, key=lambda item: -item.badness)[:count]
    return Gallery(run.name, text, drawings, [Picture(encode(item.image), item.caption) for item in worst])


def subject_of(run: Run, store: Store) -> Subject:
    """Raises DistillError when the run's student or data cannot be read."""
    student, card = open_student(run.folder)
    config = run_options(run.folder)
    split = store[config.val_split]
    rows = spread(np.flatnonzero(split.valid), SAMPLES_LOOKED_AT)
    clips = card.task == "sequence"
    reader: Any = (
        clip_reader(config, store, config.val_split, card)
        if clips
        else image_reader(config, store, config.val_split)
    )
    return Subject(run, TorchModel(student, card, choose_device("auto")), reader, split, rows)


def classification(subject: Subject) -> tuple[list[Scored], list[go.Figure], str]:
    """Worst by cross-entropy; the confusion matrix beside them. A clip is shown by its middle frame."""
    model, card, reader = subject.model, subject.card, subject.reader
    clips = card.task == "sequence"
    labels = subject.split.read("targets/label")
    rows = subject.rows[labels[subject.rows] >= 0]
    confusion = np.zeros((subject.classes,) * 2, dtype=np.int64)
    scored = []
    for chunk in batches(rows, CLIP_BATCH if clips else BATCH):
        if clips:
            frames = [reader.read(int(row)) for row in chunk]
            images = [clip[len(clip) // 2] for clip in frames]
            pixels = np.stack([clip_pixels(card, clip) for clip in frames])
        else:
            images = [reader.read(int(row), PICTURE_SIDE).image for row in chunk]
            pixels = np.stack([card.render(image) for image in images])
        probabilities = softmax(model.run(card.normalize(pixels)))
        for row, image, shares in zip(chunk, images, probabilities, strict=True):
            true, got = int(labels[row]), int(shares.argmax())
            confusion[true, got] += 1
            caption = f"{reader.key(row)}: {class_name(card, true)}, predicted {class_name(card, got)} {shares[got]:.0%}"
            scored.append(Scored(-float(np.log(max(shares[true], 1e-12))), caption, image))
    what = "clips (their middle frames)" if clips else "samples"
    return (
        scored,
        class_figures(confusion, card),
        f"The validation {what} with the largest loss, and the confusion of classes.",
    )


def class_figures(confusion: NDArray[np.int64], card: ModelCard) -> list[go.Figure]:
    """Confusion matrix and recall of each class that occurs."""
    used = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    names = [class_name(card, int(index)) for index in used]
    matrix = confusion[np.ix_(used, used)]
    recall = matrix.diagonal() / np.maximum(matrix.sum(1), 1)
    return [
        figures.confusion(matrix.tolist(), names, "Confusion"),
        figures.class_bars(names, recall.tolist(), "recall"),
    ]


def segmentation(subject: Subject) -> tuple[list[Scored], list[go.Figure], str]:
    """Worst by the mean IoU of the classes in the picture; prediction left, truth right."""
    model, card, reader = subject.model, subject.card, subject.reader
    confusion = np.zeros((subject.classes,) * 2, dtype=np.int64)
    scored = []
    for chunk in batches(subject.rows, BATCH):
        images = [reader.read(int(row), PICTURE_SIDE).image for row in chunk]
        logits = model.run(card.normalize(np.stack([card.render(image) for image in images])))
        for row, image, scores in zip(chunk, images, logits, strict=True):
            truth = render_mask(reader.read_mask(int(row)), card.view_of(image.size), card.image_size)
            counts = pixel_confusion(scores.argmax(0), truth, subject.classes)
            confusion += counts
            iou = mean_iou(counts)
            parts = [
                draw_mask(image, mask_image(m.astype(np.uint8), card.view_of(image.size), image.size))
                for m in (scores.argmax(0), truth)
            ]
            scored.append(
                Scored(1 - iou, f"{reader.key(row)}: mIoU {iou:.0%}; predicted, true", side_by_side(parts))
            )
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    used = np.flatnonzero(union)
    names = [class_name(card, int(index)) for index in used]
    values = (confusion.diagonal()[used] / union[used]).tolist()
    return (
        scored,
        [
            figures.confusion(confusion[np.ix_(used, used)].tolist(), names, "Confusion of pixels"),
            figures.class_bars(names, values, "IoU"),
        ],
        "The validation pictures with the lowest mean IoU: predicted mask left, true mask right.",
    )


def pixel_confusion(
    predicted: NDArray[np.int64], truth: NDArray[np.uint8], classes: int
) -> NDArray[np.int64]:
    """Counts [C, C] of true against predicted class over the pixels that count."""
    counted = truth != IGNORE_INDEX
    pairs = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_iou(confusion: NDArray[np.int64]) -> float:
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    used = union > 0
    return float((confusion.diagonal()[used] / union[used]).mean()) if used.any() else 1.0


def side_by_side(images: list[Image.Image]) -> Image.Image:
    joined = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for index, image in enumerate(images):
        joined.paste(image, (sum(other.width for other in images[:index]), 0))
    return joined


def detection(subject: Subject) -> tuple[list[Scored], list[go.Figure], str]:
    """Worst by missed and invented boxes; truth in green without a label."""
    card, split = subject.card, subject.split
    confusion = np.zeros((subject.classes + 1,) * 2, dtype=np.int64)
    scored = []
    for chunk in batches(subject.rows, BATCH):
        shown = [subject.reader.read(int(row), 4 * PICTURE_SIDE) for row in chunk]
        truths = zip(split.ragged(chunk, BOXES), split.ragged(chunk, BOX_CLASSES), strict=True)
        found = detect(subject.model, [item.image for item in shown], CONFIDENCE)
        for row, item, boxes, (corners, kinds) in zip(chunk, shown, found, truths, strict=True):
            scale = np.tile(np.asarray(item.image.size) / np.maximum(item.size, 1), 2)
            truth, classes = np.asarray(corners, dtype=np.float64) * scale, np.asarray(kinds)
            confusion += box_confusion(boxes, truth, classes, subject.classes)
            hits = count_hits(boxes, truth, classes)
            missed, invented = len(truth) - hits, len(boxes) - hits
            score = 2 * hits / (len(truth) + len(boxes)) if len(truth) + len(boxes) else 1.0
            caption = f"{subject.reader.key(row)}: {missed} missed, {invented} too many"
            picture = draw_boxes(
                draw_boxes(item.image, unlabelled(truth, classes), TRUTH_COLOUR), drawn(card, boxes)
            )
            scored.append(Scored(1 - score, caption, picture))
    names = [*(class_name(card, index) for index in range(subject.classes)), NOTHING]
    per_class = subject.run.summary.get("per_class") or {}
    bars = {name: float(value) for name, value in per_class.items() if value is not None}
    drawings = [figures.confusion(confusion.tolist(), names, "Confusion of boxes")]
    if bars:
        drawings.append(figures.class_bars(list(bars), list(bars.values()), "AP50-95"))
    return (
        scored,
        drawings,
        f"The validation pictures with the lowest F1 at IoU {MATCH_IOU} and confidence {CONFIDENCE}; true boxes in green, "
        f"without a label. In the confusion, `{NOTHING}` predicted is missed, true is invented.",
    )


def unlabelled(boxes: NDArray[np.float64], classes: NDArray[np.int32]) -> list[Box]:
    """True boxes [n, 4], to be drawn without words."""
    corners = [tuple(float(value) for value in box) for box in boxes]
    return [
        Box((x0, y0, x1, y1), "", int(kind)) for (x0, y0, x1, y1), kind in zip(corners, classes, strict=True)
    ]


def box_confusion(
    found: NDArray[np.float32], boxes: NDArray[np.float64], classes: NDArray[np.int32], count: int
) -> NDArray[np.int64]:
    """Counts [C + 1, C + 1] of true against predicted class, the last being nothing.

    Detections, most confident first, each meet the free true box that they cover best, of whatever class.
    """
    confusion, free = np.zeros((count + 1,) * 2, dtype=np.int64), np.ones(len(boxes), dtype=bool)
    for row in found:
        overlaps = box_iou(row[:4].astype(np.float64), boxes) * free if len(boxes) else np.zeros(1)
        best = int(overlaps.argmax())
        matched = bool(overlaps[best] >= MATCH_IOU)
        confusion[classes[best] if matched else count, int(row[5])] += 1
        if matched:
            free[best] = False
    confusion[:, count] += np.bincount(classes[free], minlength=count + 1)
    return confusion


def count_hits(found: NDArray[np.float32], boxes: NDArray[np.float64], classes: NDArray[np.int32]) -> int:
    """Detections [n, 6], most confident first, each matched to the free true box of its class that it covers best."""
    free, hits = np.ones(len(boxes), dtype=bool), 0
    for row in found:
        candidates = np.flatnonzero(free & (classes == int(row[5])))
        if not len(candidates):
            continue
        overlaps = box_iou(row[:4].astype(np.float64), boxes[candidates])
        if overlaps.max() >= MATCH_IOU:
            free[candidates[int(overlaps.argmax())]] = False
            hits += 1
    return hits


def box_iou(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of one box [4] and others [n, 4], all x0, y0, x1, y1."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = np.clip(high - low, 0, None).prod(1)
    area = (box[2] - box[0]) * (box[3] - box[1])
    union = area + (others[:, 2:] - others[:, :2]).prod(1) - inside
    return np.asarray(inside / np.maximum(union, 1e-9))


SCORERS: dict[str, Any] = {
    "classification": classification,
    "sequence": classification,
    "segmentation": segmentation,
    "detection": detection,
}


def encode(image: Image.Image) -> bytes:
    """The picture as JPEG bytes, at most PICTURE_SIDE high; one of a few pixels enlarged without blurring."""
    shown = image.copy()
    shown.thumbnail((2 * PICTURE_SIDE, PICTURE_SIDE))
    if (times := PICTURE_SIDE // (2 * max(shown.size))) > 1:
        shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    shown.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
