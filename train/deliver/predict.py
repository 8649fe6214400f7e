"""Predictions on images, videos, folders, globs and clips: one record a file or frame, and pictures that show it.

Detections come from a weights-only checkpoint (no pickled model is opened), or from ONNX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from files.names import printable
from files.writing import check_writable
from imaging.clips import VideoFrame, iterate_frames, read_clip_frames
from imaging.decode import ImageError
from train.deliver.draw import (
    IGNORE_INDEX,
    Box,
    Label,
    draw_boxes,
    draw_label,
    draw_legend,
    draw_mask,
    mask_image,
)
from train.deliver.files import (
    FRAMES,
    BadFile,
    find_clips,
    find_images,
    is_video,
    read_image,
)
from train.deliver.model import ModelCard, TrainedModel, batches, class_name, open_model
from train.errors import DeliveryError
from train.students.offline import prepare_ultralytics

IOU_THRESHOLD = 0.7  # ultralytics' default for predicting
TOP = 5


class Prediction(NamedTuple):
    """`record` is plain JSON; `image` is the file's picture with the prediction drawn on it.

    `embedding` [D] is what a label-free student gives; there is no picture then.
    `video_rate`: frames a second to show the pictures of a video's frames with. None: the picture of an image or clip.
    """

    record: dict[str, Any]
    image: Image.Image | None
    mask: Image.Image | None = None
    video_rate: Fraction | None = None
    embedding: NDArray[np.float32] | None = None


class VideoSummary(NamedTuple):
    """What is said of a whole video after its frames; `record` is plain JSON."""

    record: dict[str, Any]


class Sampling(NamedTuple):
    """Which frames of a video are predicted: every `every`th, or about `frames_per_second`; None: all of them."""

    every: int | None = None
    frames_per_second: float | None = None


def predict_files(
    run: Path,
    inputs: Sequence[str],
    *,
    out: Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
    confidence: float = 0.25,
    sampling: Sampling = Sampling(),
) -> Iterator[Prediction | VideoSummary | BadFile]:
    """Predict every image and video (or clip, for students of clips) that `inputs` name, in their order.

    What is wrong with the arguments is said at once, before the first prediction is asked for.

    Args:
        run: a run folder, its best.pt, or an exported ONNX file.
        inputs: image and video files, folders (searched through), or globs.
        out: the folder that pictures will be written to: must not be one of the inputs'.
        confidence: detections below it are left out.
        sampling: which frames of videos are predicted.
    Raises:
        DeliveryError: unknown run, inputs without any image, inputs that pictures might be written over, or a
            sampling where there is no video.
    """
    if sampling.every is not None and sampling.frames_per_second is not None:
        raise DeliveryError(
            "--every and --fps both say which frames of a video are predicted: pass one of them"
        )
    if out is not None:
        check_writable(out, "--out")
    model = open_model(run, device)
    clips = model.card.takes_clips
    files = find_clips(inputs) if clips else find_images(inputs, videos=True)
    if sampling != Sampling() and (clips or not any(map(is_video, files))):
        option = "--fps" if sampling.every is None else "--every"
        why = "this student takes clips, whose frames it chooses itself" if clips else "no input is a video"
        raise DeliveryError(f"{option}: chooses frames of videos, and {why}: leave it out")
    if out is not None:
        spare_inputs(files, out)
    return predict_found(model, files, batch_size, confidence, sampling)


def spare_inputs(files: Sequence[Path], out: Path) -> None:
    """Refuse a folder that inputs are in (or that is one, of frames): a picture is called like its input."""
    folder = out.resolve()
    for path in files:
        if folder in (path.resolve(), path.resolve().parent, path.parent.resolve()):
            raise DeliveryError(
                f"--out {out}: holds {path}, an input, and pictures are called like their inputs: choose another "
                "folder"
            )


def predict_found(
    model: TrainedModel, found: Sequence[Path], batch_size: int, confidence: float, sampling: Sampling
) -> Iterator[Prediction | VideoSummary | BadFile]:
    """Predict images in batches, clips and videos one by one."""
    if model.card.takes_clips:
        yield from (predict_clip(model, path) for path in found)
        return
    for videos, files in itertools.groupby(found, is_video):
        if videos:
            for path in files:
                yield from predict_video(model, path, batch_size, confidence, sampling)
        else:
            for some in batches(list(files), batch_size):
                yield from predict_batch(model, some, confidence)


def predict_batch(
    model: TrainedModel, files: Sequence[Path], confidence: float
) -> Iterator[Prediction | BadFile]:
    """Predict one batch; unreadable files come out as `BadFile`, in their place."""
    # Boxes and masks are drawn on the picture's own pixels; else a JPEG may be decoded at a fraction of its size.
    target_size = model.card.image_size if model.card.task in ("classification", "features") else None
    images = [read_image(path, target_size, model.card.bit_depth) for path in files]
    results = iter(infer(model, [image for image in images if isinstance(image, Image.Image)], confidence))
    for path, image in zip(files, images, strict=True):
        yield image if isinstance(image, BadFile) else interpret(model.card, path, image, next(results))


def predict_video(
    model: TrainedModel, path: Path, batch_size: int, confidence: float, sampling: Sampling
) -> Iterator[Prediction | VideoSummary | BadFile]:
    """A record for each frame with its time, and for classifiers one for the video: the mean of the probabilities."""
    frames = iterate_frames(path, every=sampling.every or 1, frames_per_second=sampling.frames_per_second)
    total, seen = np.zeros(0, np.float64), 0
    try:
        for some in batched(frames, batch_size):
            results = infer(model, [frame.image for frame in some], confidence)
            for frame, result in zip(some, results, strict=True):
                told = interpret(model.card, path, frame.image, result, whole_legend=True)
                place = {
                    "file": printable(str(path)),
                    "frame": frame.number,
                    "time_s": round(frame.time_s, 3),
                }
                rate = shown_rate(frame.rate, sampling)
                yield told._replace(record={**place, **told.record}, video_rate=rate)
            if model.card.task == "classification":
                probabilities = softmax(np.stack(results)).astype(np.float64).sum(0)
                total, seen = probabilities if not seen else total + probabilities, seen + len(some)
    except ImageError as error:
        yield BadFile(printable(str(path)), error.reason)
    if seen:
        mean = np.log(np.maximum(total / seen, 1e-12)).astype(np.float32)
        yield VideoSummary(
            {"file": printable(str(path)), "frames": seen, "top": top_classes(model.card, mean)}
        )


def shown_rate(rate: Fraction, sampling: Sampling) -> Fraction:
    """Frames a second at which the sampled frames play as long as the video."""
    if sampling.frames_per_second is not None:
        return min(rate, Fraction(sampling.frames_per_second).limit_denominator(1000))
    return rate / (sampling.every or 1)


def batched(items: Iterable[VideoFrame], size: int) -> Iterator[list[VideoFrame]]:
    """Lists of at most `size`. What was collected before an error comes first, then the error."""
    some: list[VideoFrame] = []
    iterator = iter(items)
    while True:
        try:
            some.append(next(iterator))
        except StopIteration:
            break
        except ImageError:
            if some:
                yield some
            raise
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def infer(
    model: TrainedModel, images: Sequence[Image.Image], confidence: float
) -> Sequence[NDArray[np.float32]]:
    """What the student says of each image: logits [C] or [C, S, S], an embedding [D], or boxes [n, 6] in pixels."""
    if not images:
        return []
    if model.card.task == "detection":
        return detect(model, images, confidence)
    return list(model.run(model.card.normalize(np.stack([model.card.render(image) for image in images]))))


def interpret(
    card: ModelCard, path: Path, image: Image.Image, result: NDArray[np.float32], whole_legend: bool = False
) -> Prediction:
    """One image's result as a record and a picture; `whole_legend` names all classes, not only those in it."""
    if card.task == "detection":
        return describe(card, path, image, result)
    if card.task == "features":
        return Prediction({"file": printable(str(path))}, None, embedding=result)
    if card.task == "segmentation":
        return segmentation(card, path, image, result, whole_legend)
    top = top_classes(card, result)
    return Prediction({"file": printable(str(path)), "top": top}, draw_label(image, top_label(top)))


def segmentation(
    card: ModelCard, path: Path, image: Image.Image, logits: NDArray[np.float32], whole_legend: bool
) -> Prediction:
    """Class map [S, S] carried back to the image's own pixels; shares are of the image's area."""
    classes = mask_image(logits.argmax(0).astype(np.uint8), card.view_of(image.size), image.size)
    counts = np.bincount(np.asarray(classes).ravel(), minlength=256)
    shares = {class_name(card, int(i)): float(counts[i] / counts.sum()) for i in np.flatnonzero(counts)}
    # The frames of a video have one size, so they have one legend.
    named = range(logits.shape[0]) if whole_legend else np.flatnonzero(counts[:IGNORE_INDEX])
    legend = [Label(class_name(card, int(i)), int(i)) for i in named]
    picture = draw_legend(draw_mask(image, classes), legend)
    return Prediction({"file": printable(str(path)), "shares": shares}, picture, classes)


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


def softmax(logits: NDArray[np.float32], axis: int = -1) -> NDArray[np.float32]:
    """Probabilities along `axis`."""
    shifted = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), dtype=np.float32)


def top_classes(card: ModelCard, logits: NDArray[np.float32]) -> list[dict[str, Any]]:
    """The most probable classes of logits [C], best first."""
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [
        {
            "class": class_name(card, int(index)),
            "index": int(index),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def top_label(top: list[dict[str, Any]]) -> Label:
    """The most probable class, to be drawn."""
    return Label(top[0]["class"], top[0]["index"], f"{top[0]['probability']:.0%}")
