"""Predictions on images, videos, folders, globs and clips: one record a file or frame, and pictures that show it."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from console.output import plain_json
from files.names import printable
from files.writing import check_writable, whole_file, writing
from imaging.clips import VideoFrame, iterate_frames
from imaging.decode import ImageError
from train.deliver.clips import find_clips, predict_clip
from train.deliver.detect import describe, detect
from train.deliver.draw import IGNORE_INDEX, Label, draw_label, draw_legend, draw_mask, mask_image
from train.deliver.embedding_files import EmbeddingFiles
from train.deliver.files import find_pictures, is_video
from train.deliver.model import ModelCard, TrainedModel, batches, class_name, open_model
from train.deliver.records import BadFile, Prediction, VideoSummary, read_image
from train.deliver.scores import softmax, top_classes, top_label
from train.deliver.video import VideoOutput
from train.errors import DeliveryError
from train.run_folder import make_folder

RECORDS_FILE = "predictions.jsonl"


class Sampling(NamedTuple):
    """Which frames of a video are predicted: every `every`th, or about `frames_per_second`; None: all of them."""

    every: int | None = None
    frames_per_second: float | None = None

    @property
    def is_default(self) -> bool:
        return self.every is None and self.frames_per_second is None


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
    files = find_clips(inputs) if clips else find_pictures(inputs)
    if not sampling.is_default and (clips or not any(map(is_video, files))):
        option = "--fps" if sampling.every is None else "--every"
        why = "this student takes clips, whose frames it chooses itself" if clips else "no input is a video"
        raise DeliveryError(f"{option}: chooses frames of videos, and {why}: leave it out")
    if out is not None:
        spare_inputs(files, out)
    return predict_found(model, files, batch_size, confidence, sampling)


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


class PredictionWriter:
    """predictions.jsonl, pictures and annotated videos in a folder; the records of an earlier call are replaced.

    Of label-free students: the embeddings as `.npy` and Parquet (see EmbeddingFiles) in the place of pictures.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.folder, self.taken = folder, set[str]()
        self.video: VideoOutput | None = None  # the one whose frames are coming in
        self.embeddings = EmbeddingFiles(folder)
        with writing(folder / RECORDS_FILE):
            self.records = (folder / RECORDS_FILE).open("wb", buffering=0)

    def write(self, prediction: Prediction | VideoSummary) -> None:
        """One line, and the picture (for masks also the bare mask); equal names of different folders stay apart."""
        source = Path(prediction.record["file"])
        if isinstance(prediction, VideoSummary):
            self.append(prediction.record)
        elif prediction.embedding is not None:
            self.append(prediction.record)
            self.embeddings.add(key_of(prediction.record), prediction.embedding)
        elif prediction.video_rate is not None:
            self.write_frame(source, prediction, prediction.video_rate)
        else:
            self.write_picture(source, prediction)

    def write_picture(self, source: Path, prediction: Prediction) -> None:
        self.close_video()
        assert prediction.image is not None
        stem = self.name(source)
        with whole_file(self.folder / f"{stem}.jpg") as partial:
            prediction.image.save(partial, quality=90)
        if prediction.mask is not None:
            with whole_file(self.folder / f"{stem}-mask.png") as partial:
                prediction.mask.save(partial)
        self.append({**prediction.record, "picture": f"{stem}.jpg"})

    def write_frame(self, source: Path, prediction: Prediction, rate: Fraction) -> None:
        """A frame of the annotated video, which begins with the first frame of another file."""
        assert prediction.image is not None
        if self.video is None or self.video.source != source:
            self.close_video()
            path = self.folder / f"{self.name(source)}.mp4"
            self.video = VideoOutput(source, path, rate, prediction.image.size)
        self.video.add(prediction.image)
        self.append({**prediction.record, "video": self.video.path.name})

    def close_video(self) -> None:
        video, self.video = self.video, None
        if video is not None:
            video.close()

    def append(self, record: dict[str, Any]) -> None:
        """A whole line or none."""
        line = (json.dumps(plain_json(record), ensure_ascii=False) + "\n").encode()
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

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.close_video()
            elif self.video is not None:
                self.video.discard()
            self.embeddings.__exit__(kind, *error)
        finally:
            self.records.close()


def key_of(record: dict[str, Any]) -> str:
    """The key of an embedding: the file, of a video with the frame's number."""
    frame = record.get("frame")
    return record["file"] if frame is None else f"{record['file']}#{frame}"
