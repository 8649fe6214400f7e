"""The samples that a run gets most wrong, as pictures, and its per-class results."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from PIL import Image

from console.output import get_logger
from store.errors import DistillError
from store.reader import Split, Store
from train.data.images import ImageReader, Shown
from train.data.views import render_mask
from train.deliver.draw import Box, draw_boxes, draw_mask, draw_true_boxes, mask_color, mask_image
from train.deliver.inputs import pixel_reader, run_options, split_reader, spread
from train.deliver.model import ModelCard, TorchModel, batches, choose_device, class_name, open_student
from train.deliver.predict import detect, drawn, softmax
from train.report import figures
from train.report.page import LegendEntry, Picture, Section
from train.report.runs import FinishedRun

logger = get_logger("report")

# The report looks at this many validation samples at most; pictures are shrunk to so many pixels, and tiny ones
# enlarged.
SAMPLES_LOOKED_AT = 2000
PICTURE_SIDE = 256
WIDE_PICTURE_SIDE = 480  # with boxes, whose labels have to be read
BATCH = 32
IGNORE_INDEX = 255
CLIP_BATCH = 4
CONFIDENCE = 0.25
MATCH_IOU = 0.5
NOTHING = "nothing"


class Subject(NamedTuple):
    """What a scorer looks at: a run's student and the rows of its validation split."""

    run: FinishedRun
    model: Any  # TrainedModel
    reader: Any  # ImageReader; for clips ClipReader
    store: Store
    split_name: str
    rows: NDArray[np.int64]
    classes: int  # of the student's head

    @property
    def card(self) -> ModelCard:
        card: ModelCard = self.model.card
        return card

    @property
    def split(self) -> Split:
        return self.store[self.split_name]


class Scored(NamedTuple):
    """One sample: how bad it is (higher is worse), and how its picture with prediction and truth is drawn."""

    badness: float
    caption: str
    draw: Callable[[], Image.Image]


class Findings(NamedTuple):
    """What a scorer found: the worst samples, worst first, and a text about all of them."""

    worst: list[Scored]
    figures: list[go.Figure]
    text: str
    legend: list[LegendEntry]


def gallery_of(run: FinishedRun, store: Store | None, count: int) -> Section | None:
    """The section on the `count` worst validation samples of `run`; None where it cannot be run again (the log has the reason)."""
    task = str(run.summary.get("task"))
    if store is None or task not in SCORERS:
        return None
    try:
        found = SCORERS[task](subject_of(run, store), count)
        pictures = [Picture(encode(item.draw()), item.caption) for item in found.worst]
    except DistillError as error:
        logger.warning("the report shows no samples of %s: %s", run.name, error)
        return None
    wide = task in ("segmentation", "detection")
    return Section(f"Where {run.name} fails", found.text, found.figures, pictures, wide, found.legend)


def subject_of(run: FinishedRun, store: Store) -> Subject:
    """Raises DistillError when the run's student or data cannot be read."""
    student, card = open_student(run.folder)
    config = run_options(run.folder)
    name = config.val_split
    rows = spread(np.flatnonzero(store[name].valid), SAMPLES_LOOKED_AT)
    reader = split_reader(config, store, name, card)
    model = TorchModel(student, card, choose_device("auto"))
    return Subject(run, model, reader, store, name, rows, student.spec.num_classes)


def keep_worst(worst: list[Scored], more: list[Scored], count: int) -> list[Scored]:
    """The `count` worst of both, worst first: what is drawn later holds its prediction in memory until then."""
    return sorted([*worst, *more], key=lambda item: -item.badness)[:count]


def looked_at(subject: Subject, rows: NDArray[np.int64], what: str = "samples") -> str:
    """How many samples the figures are about, for the reader to judge them by."""
    total = int(subject.split.valid.sum())
    some = f"{len(rows):,}" if len(rows) == total else f"{len(rows):,} of {total:,}"
    return f"{some} validation {what}"


def classification(subject: Subject, count: int) -> Findings:
    """Worst by cross-entropy; the confusion matrix beside them. A clip is shown by its middle frame."""
    model, card, reader = subject.model, subject.card, subject.reader
    clips, read = card.takes_clips, pixel_reader(card, reader)
    labels = subject.split.read("targets/label")
    rows = subject.rows[labels[subject.rows] >= 0]
    confusion = np.zeros((subject.classes,) * 2, dtype=np.int64)
    worst: list[Scored] = []
    for chunk in batches(rows, CLIP_BATCH if clips else BATCH):
        pixels = np.stack([read(int(row)) for row in chunk])
        probabilities = softmax(model.run(card.normalize(pixels)))
        found = []
        for row, shares in zip(chunk.tolist(), probabilities, strict=True):
            true, got = int(labels[row]), int(shares.argmax())
            confusion[true, got] += 1
            caption = f"{reader.key(row)}: {class_name(card, true)}, predicted {class_name(card, got)} {shares[got]:.0%}"
            loss = -float(np.log(max(shares[true], 1e-12)))
            found.append(Scored(loss, caption, partial(sample_picture, reader, row, clips)))
        worst = keep_worst(worst, found, count)
    what = "clips" if clips else "samples"
    text = (
        f"The confusion of the classes, and the {what} with the largest loss{' (their middle frames)' if clips else ''}, "
        f"of {looked_at(subject, rows, what)}."
    )
    return Findings(worst, class_figures(confusion, card), text, [])


def sample_picture(reader: Any, row: int, clips: bool) -> Image.Image:
    if clips:
        frames = reader.read(row)
        return fit(frames[len(frames) // 2])
    return fit(reader.read(row, PICTURE_SIDE).image)


def class_figures(confusion: NDArray[np.int64], card: ModelCard) -> list[go.Figure]:
    """Confusion matrix and recall of each class that occurs."""
    used = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    names = [class_name(card, int(index)) for index in used]
    matrix = confusion[np.ix_(used, used)]
    true = np.flatnonzero(matrix.sum(1))  # a class without samples has no recall
    recall = matrix.diagonal()[true] / matrix.sum(1)[true]
    return [
        figures.confusion(matrix.tolist(), names, "Confusion"),
        figures.class_bars([names[index] for index in true], recall.tolist(), "recall"),
    ]


def segmentation(subject: Subject, count: int) -> Findings:
    """Worst by the mean IoU of the classes in the picture; prediction left, truth right."""
    model, card, reader = subject.model, subject.card, subject.reader
    confusion = np.zeros((subject.classes,) * 2, dtype=np.int64)
    worst: list[Scored] = []
    for chunk in batches(subject.rows, BATCH):
        images = [reader.read(int(row), card.image_size) for row in chunk]
        logits = model.run(card.normalize(np.stack([card.show(image) for image in images])))
        found = []
        for row, image, scores in zip(chunk.tolist(), images, logits, strict=True):
            predicted = scores.argmax(0).astype(np.uint8)
            mask = reader.read_mask(row)
            if mask is None:
                continue  # a row without a mask: nothing to compare with
            truth = render_mask(mask, card.view_of(image.size), card.image_size)
            counts = pixel_confusion(predicted, truth, subject.classes)
            confusion += counts
            iou = mean_iou(counts)
            draw = masks_drawer(card, reader, row, (predicted, truth))
            found.append(Scored(1 - iou, f"{reader.key(row)}: mIoU {iou:.0%}; predicted, true", draw))
        worst = keep_worst(worst, found, count)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    used = np.flatnonzero(union)
    names = [class_name(card, int(index)) for index in used]
    values = (confusion.diagonal()[used] / union[used]).tolist()
    return Findings(
        worst,
        [
            figures.confusion(confusion[np.ix_(used, used)].tolist(), names, "Confusion of pixels"),
            figures.class_bars(names, values, "IoU"),
        ],
        f"The pictures with the lowest mean IoU of {looked_at(subject, subject.rows, 'pictures')}: predicted mask left, "
        "true mask right.",
        [
            LegendEntry(name, mask_color(int(index)) if index else None)
            for index, name in zip(used, names, strict=True)
        ],
    )


def masks_drawer(
    card: ModelCard, reader: ImageReader, row: int, masks: tuple[NDArray[np.uint8], ...]
) -> Callable[[], Image.Image]:
    """Draws class maps [S, S] of the student's input on the stored picture, side by side."""

    def draw() -> Image.Image:
        shown = reader.read(row, PICTURE_SIDE)
        picture = fit(shown.image)
        return side_by_side([draw_mask(picture, mask_on(card, shown, mask, picture.size)) for mask in masks])

    return draw


def mask_on(card: ModelCard, shown: Shown, classes: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """A class map [S, S] of the student's input on the stored picture, drawn at `size` (width, height)."""
    return mask_image(classes, shown.into_image(card.view_of(shown.size)), size)


def pixel_confusion(
    predicted: NDArray[np.uint8], truth: NDArray[np.uint8], classes: int
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


def detection(subject: Subject, count: int) -> Findings:
    """Worst by missed and invented boxes; true boxes in white, without a label."""
    from train.yolo.dataset import detection_records

    card, reader = subject.card, subject.reader
    records = {
        record.row: record
        for record in detection_records(subject.store, subject.split, raw=reader.kind == "raw")
    }
    confusion = np.zeros((subject.classes + 1,) * 2, dtype=np.int64)
    worst: list[Scored] = []
    for chunk in batches(subject.rows, BATCH):
        images = [reader.read(int(row), card.image_size).image for row in chunk]
        scored = []
        for row, image, boxes in zip(
            chunk.tolist(), images, detect(subject.model, images, CONFIDENCE), strict=True
        ):
            relative = np.asarray(boxes, dtype=np.float64)
            relative[:, :4] /= np.array([*image.size, *image.size])
            record = records[row]
            truth, classes = corners_of(record.boxes), record.classes.astype(np.int32)
            # Overlaps are measured in pixels, as the evaluation does: sides of unequal length weigh differently.
            scale = np.array([record.width, record.height] * 2, dtype=np.float64)
            measured = np.concatenate([relative[:, :4] * scale, relative[:, 4:]], axis=1).astype(np.float32)
            confusion += box_confusion(measured, truth * scale, classes, subject.classes)
            hits = count_hits(measured, truth * scale, classes)
            missed, invented = len(truth) - hits, len(boxes) - hits
            score = 2 * hits / (len(truth) + len(boxes)) if len(truth) + len(boxes) else 1.0
            caption = f"{reader.key(row)}: {missed} missed, {invented} too many"
            draw = boxes_drawer(card, reader, row, relative, truth, classes)
            scored.append(Scored(1 - score, caption, draw))
        worst = keep_worst(worst, scored, count)
    names = [*(class_name(card, index) for index in range(subject.classes)), NOTHING]
    per_class = subject.run.summary.get("per_class") or {}
    bars = {name: float(value) for name, value in per_class.items() if value is not None}
    drawings = [figures.confusion(confusion.tolist(), names, "Confusion of boxes")]
    if bars:
        drawings.append(figures.class_bars(list(bars), list(bars.values()), "AP50-95"))
    return Findings(
        worst,
        drawings,
        f"The pictures with the lowest F1, at IoU {MATCH_IOU} and confidence {CONFIDENCE}, of "
        f"{looked_at(subject, subject.rows, 'pictures')}. True boxes are white with a black edge; detections have the color of their class and a label. "
        f"In the confusion, “{NOTHING}” as the predicted class means missed, as the true class invented.",
        [],
    )


def corners_of(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Center and size [n, 4] → corners [n, 4], both normalized."""
    center, half = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) / 2
    return np.concatenate([center - half, center + half], axis=1)


def boxes_drawer(
    card: ModelCard,
    reader: ImageReader,
    row: int,
    found: NDArray[np.float64],
    truth: NDArray[np.float64],
    classes: NDArray[np.int32],
) -> Callable[[], Image.Image]:
    """Draws detections [n, 6] and true boxes [m, 4], both normalized to the stored picture, on it."""

    def draw() -> Image.Image:
        picture = fit(reader.read(row, WIDE_PICTURE_SIDE).image, WIDE_PICTURE_SIDE)
        scale = np.array([*picture.size, *picture.size], dtype=np.float64)
        pixels = np.concatenate([found[:, :4] * scale, found[:, 4:]], axis=1).astype(np.float32)
        return draw_boxes(draw_true_boxes(picture, unlabeled(truth * scale, classes)), drawn(card, pixels))

    return draw


def unlabeled(boxes: NDArray[np.float64], classes: NDArray[np.int32]) -> list[Box]:
    """True boxes [n, 4] in pixels, to be drawn without words."""
    corners = [tuple(float(value) for value in box) for box in boxes]
    return [Box((x0, y0, x1, y1), int(kind)) for (x0, y0, x1, y1), kind in zip(corners, classes, strict=True)]


def match_boxes(
    found: NDArray[np.float32], boxes: NDArray[np.float64], classes: NDArray[np.int32], same_class: bool
) -> list[int | None]:
    """For each of the detections [n, 6], most confident first, the free true box that it covers best, or None.

    same_class: only boxes of the detection's class count.
    """
    free, matched = np.ones(len(boxes), dtype=bool), list[int | None]()
    for row in found:
        allowed = free & (classes == int(row[5])) if same_class else free
        overlaps = np.where(allowed, box_iou(row[:4].astype(np.float64), boxes), 0.0)
        best = int(overlaps.argmax()) if len(boxes) else 0
        hit = len(boxes) > 0 and overlaps[best] >= MATCH_IOU
        if hit:
            free[best] = False
        matched.append(best if hit else None)
    return matched


def box_confusion(
    found: NDArray[np.float32], boxes: NDArray[np.float64], classes: NDArray[np.int32], count: int
) -> NDArray[np.int64]:
    """Counts [C + 1, C + 1] of true against predicted class, the last being nothing."""
    confusion, matched = np.zeros((count + 1,) * 2, dtype=np.int64), match_boxes(found, boxes, classes, False)
    for row, best in zip(found, matched, strict=True):
        confusion[count if best is None else classes[best], int(row[5])] += 1
    missed = np.delete(classes, [best for best in matched if best is not None])
    confusion[:, count] += np.bincount(missed, minlength=count + 1)
    return confusion


def count_hits(found: NDArray[np.float32], boxes: NDArray[np.float64], classes: NDArray[np.int32]) -> int:
    """How many detections [n, 6] meet a true box of their class."""
    return sum(best is not None for best in match_boxes(found, boxes, classes, True))


def box_iou(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of one box [4] and others [n, 4], all x0, y0, x1, y1."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = np.clip(high - low, 0, None).prod(1)
    area = (box[2] - box[0]) * (box[3] - box[1])
    union = area + (others[:, 2:] - others[:, :2]).prod(1) - inside
    return np.asarray(inside / np.maximum(union, 1e-9))


SCORERS: dict[str, Callable[[Subject, int], Findings]] = {
    "classification": classification,
    "sequence": classification,
    "segmentation": segmentation,
    "detection": detection,
}


def fit(image: Image.Image, side: int = PICTURE_SIDE) -> Image.Image:
    """The picture as it is shown, at most `side` high and twice as wide; tiny ones enlarged without blurring.

    Done before anything is drawn on it, so that lines and letters keep their size.
    """
    shown = image.convert("RGB")
    shown.thumbnail((2 * side, side))
    if (times := side // max(shown.size)) > 1:
        shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
    return shown


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
