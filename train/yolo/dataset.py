"""The store's boxes and images as an ultralytics data set, so that its own loader and augmentations run on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from ultralytics.data.dataset import YOLODataset

from console.output import get_logger
from files.writing import replacing
from imaging.geometry import resize_view
from store.format import BOX_CLASSES, BOXES, GRID, SIZES, layer_grid, view_array
from store.reader import Split, Store
from store.summary import unlabeled_rows
from train.data.batches import FeatureGatherer
from train.data.images import ImageReader
from train.distill.levels import check_layers
from train.distill.objective import other_teacher
from train.distill.phi_s import rotation_of
from train.distill.projector import TargetStandardizer
from train.errors import TrainError
from train.run_folder import BOXES_FOUND
from train.yolo.geometry import (
    GEOMETRY_KEY,
    SOURCE_PLACEMENTS,
    SOURCE_ROWS,
    packed_placements,
    track,
    whole_image,
)
from train.yolo.targets import BUFFERS, PENDING, LevelTargets, TeacherTargets

log = get_logger("train")
MIN_SIDE = 1e-6  # of a normalized box; ultralytics drops boxes without area as well


@dataclass(frozen=True)
class DetectionRecord:
    """One image of a split: where it is in the store, and its boxes.

    `boxes` float32 [M, 4]: normalized center x, center y, width, height, inside the image; `classes` int [M].
    """

    row: int
    key: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


class StoreDataset(YOLODataset):  # type: ignore[misc]
    """ultralytics' data set over records of a store.

    `read_image(row)` gives uint8 [H, W, 3] RGB, upright, at any resolution not below `imgsz`. With `follow_sources`
    every sample also carries where its pixels come from. ultralytics' label files, caches and path globbing are not
    used.
    """

    def __init__(
        self,
        records: list[DetectionRecord],
        read_image: Callable[[int], NDArray[np.uint8]],
        *,
        follow_sources: bool,
        **settings: Any,
    ) -> None:
        self.records = records
        self.read_image = read_image
        self.follow_sources = follow_sources
        super().__init__(img_path="", task="detect", **settings)

    def get_img_files(self, img_path: Any) -> list[str]:
        """The samples' keys; ultralytics names plots and per-image metrics after them."""
        return [record.key for record in self.records]

    def get_labels(self) -> list[dict[str, Any]]:
        """Labels in the form ultralytics reads from label files, plus the store's row."""
        return [
            {
                "im_file": record.key,
                "shape": (record.height, record.width),
                "cls": record.classes.reshape(-1, 1).astype(np.float32),
                "bboxes": record.boxes.copy(),
                "segments": [],
                "keypoints": None,
                "normalized": True,
                "bbox_format": "xywh",
                "row": record.row,
                "ori_shape": (record.height, record.width),
            }
            for record in self.records
        ]

    # ultralytics fills these lists with what belongs to each image, None where it is not in memory.
    ims: list[Any]
    im_hw0: list[Any]
    im_hw: list[Any]

    def load_image(self, i: int, rect_mode: bool = True, resize_short: bool = False) -> Any:
        """The image BGR with its longer side `imgsz`, its original and new (height, width).

        As in ultralytics' `BaseDataset.load_image`, whose reading from a path cannot be replaced on its own: the
        same resize and the same buffer of images that mosaics draw from.
        """
        if self.ims[i] is not None:
            return self.ims[i], self.im_hw0[i], self.im_hw[i]
        label = self.labels[i]
        height, width = label["ori_shape"]
        image: Any = np.ascontiguousarray(self.read_image(label["row"])[..., ::-1])
        ratio = self.imgsz / max(height, width)
        size = (min(math.ceil(width * ratio), self.imgsz), min(math.ceil(height * ratio), self.imgsz))
        if image.shape[1::-1] != size:
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        if self.augment:
            self.remember(i, image, (height, width))
        return image, (height, width), image.shape[:2]

    def remember(self, i: int, image: NDArray[np.uint8], original: tuple[int, int]) -> None:
        """Keep image `i` for mosaics, and forget the one that has been kept longest."""
        self.ims[i], self.im_hw0[i], self.im_hw[i] = image, original, image.shape[:2]
        self.buffer.append(i)
        if 1 < len(self.buffer) >= self.max_buffer_length:
            oldest = self.buffer.pop(0)
            self.ims[oldest], self.im_hw0[oldest], self.im_hw[oldest] = None, None, None

    def start_epoch(self, seed: int) -> None:
        """Make the coming epoch depend on `seed` alone, not on what was read before.

        The buffer that mosaics draw from starts with random samples (read when first drawn), as it would look
        in the middle of an ordinary epoch; an empty one would repeat the first few images over and over.
        """
        self.ims, self.im_hw0, self.im_hw = [None] * self.ni, [None] * self.ni, [None] * self.ni
        self.buffer = random.Random(seed).sample(range(self.ni), max(0, self.max_buffer_length - 1))

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """ultralytics' label of one image, with its placement."""
        label: dict[str, Any] = super().get_image_and_label(index)
        row = label.pop("row")
        if self.follow_sources:
            height, width = label["img"].shape[:2]
            label[GEOMETRY_KEY] = [whole_image(row, width, height)]
        return label

    def build_transforms(self, hyp: Any) -> Any:
        """ultralytics' chain; its geometric members also move placements."""
        transforms = super().build_transforms(hyp)
        if self.follow_sources:
            track(transforms)
        return transforms

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(index)
        if self.follow_sources:
            height, width = sample["img"].shape[-2:]
            rows, values = packed_placements(sample.pop(GEOMETRY_KEY), width, height)
            sample[SOURCE_ROWS], sample[SOURCE_PLACEMENTS] = torch.from_numpy(rows), torch.from_numpy(values)
        return sample

    @staticmethod
    def collate_fn(batch: list[dict[str, Any]]) -> dict[str, Any]:
        """ultralytics' batch; rows and placements padded to the sample with most sources."""
        rows = [sample.pop(SOURCE_ROWS) for sample in batch if SOURCE_ROWS in sample]
        values = [sample.pop(SOURCE_PLACEMENTS) for sample in batch if SOURCE_PLACEMENTS in sample]
        collated: dict[str, Any] = YOLODataset.collate_fn(batch)
        if rows:
            collated[SOURCE_ROWS] = pad_sequence(rows, batch_first=True, padding_value=-1)
            collated[SOURCE_PLACEMENTS] = pad_sequence(values, batch_first=True)
        return collated


@dataclass(frozen=True)
class DetectionSplit:
    """What the trainer needs of one split: `records`, and `read_image(row)` → uint8 [H, W, 3] RGB.

    `raw`: the images are what the teacher saw, so all of them have its size.
    """

    records: list[DetectionRecord]
    read_image: Callable[[int], NDArray[np.uint8]]
    targets: LevelTargets | None = None
    raw: bool = False


class SourceImages:
    """Reads the pixels of rows; picklable, for loader workers that are spawned."""

    def __init__(self, reader: ImageReader, image_size: int) -> None:
        self.reader, self.image_size = reader, image_size

    def __call__(self, row: int) -> NDArray[np.uint8]:
        return np.asarray(self.reader.read(row, self.image_size).image.convert("RGB"))


#: P5 learns the teacher's last layer.
DEEPEST_ALONE: Mapping[str, int | None] = {"P5": None}


def open_split(
    store: Store,
    name: str,
    *,
    image_size: int,
    data_root: Path | None,
    distil: bool,
    statistics_of: str | None = None,
    sources_per_cell: int = 1,
    layers: Mapping[str, int | None] = DEEPEST_ALONE,
    others: Sequence[tuple[Store, Mapping[str, int | None]]] = (),
    rotations: Path | None = None,
) -> DetectionSplit:
    """Records, images and, with `distil`, targets of a split, standardized by the statistics of `statistics_of`.

    That is the training split, for the validation split too: both distances are to the same targets. None: `name`.
    `layers`: the teacher's layer (None: the last) that each level of the student learns. `others`: the store as further
    teachers show it, each with the same for its layers. `rotations`: see `build_standardizer`.
    Raises TrainError when the split, its boxes, its images or (with `distil`) its grid are missing.
    """
    if name not in store:
        raise TrainError(f"{store.location}: no split {name!r}, it has {', '.join(store.splits)}")
    split = store[name]
    if BOXES not in split.names:
        raise TrainError(
            f"{store.location}: the store has no boxes: YOLO students need a detection data set (cli extract --source "
            "yolo, coco or voc), or --task features to learn from the teacher alone"
        )
    root = data_root or store.manifest.data_root
    # Stored raw images are what the first teacher saw, whichever is learned from.
    reader = ImageReader(split, Path(root) if root else None, store.whole.manifest.preprocessing)
    valid = np.logical_and.reduce([split.valid, *(other[name].valid for other, _ in others)])
    records = detection_records(store.whole, split, valid, raw=reader.kind == "raw")
    if not records and unlabeled_rows(split, "boxes").any():
        raise TrainError(
            f"{store.location}: no image of split {name!r} is labeled: use --task features to learn from the teacher alone, "
            "or extract a data set that has boxes"
        )
    if not records:
        raise TrainError(f"{store.location}: split {name!r} has no valid images")
    targets = None
    if distil:
        wanted = {level: (store, layer, "") for level, layer in layers.items()} | {
            f"{prefix}{level}": (other, layer, prefix)
            for number, (other, its_layers) in enumerate(others)
            for prefix in [other_teacher(number)]
            for level, layer in its_layers.items()
        }
        found = {
            (prefix, layer): teacher_targets(
                teacher,
                name,
                statistics_of or name,
                layer,
                raw=reader.kind == "raw",
                sources_per_cell=sources_per_cell,
                pending=f"{PENDING}/{prefix}{'last' if layer is None else layer}",
                rotations=rotations,
            )
            for teacher, layer, prefix in wanted.values()
        }
        targets = LevelTargets({level: found[prefix, layer] for level, (_, layer, prefix) in wanted.items()})
    return DetectionSplit(records, SourceImages(reader, image_size), targets, reader.kind == "raw")


def detection_records(
    store: Store, split: Split, valid: NDArray[np.bool_] | None = None, *, raw: bool
) -> list[DetectionRecord]:
    """The valid, labeled rows of a split, in row order: an image that is not labeled would count as background.

    `valid` bool [N]: which rows are valid, where it is not for the split alone to say. With `raw` the images are what the
    teacher saw, so boxes and sizes are those of its view. Boxes are clipped to the image, those without area and
    repetitions dropped (the log says how many), images without boxes kept as background.

    Raises TrainError for a class without a name.
    """
    unlabeled = unlabeled_rows(split, "boxes")
    rows = np.flatnonzero((split.valid if valid is None else valid) & ~unlabeled)
    if unlabeled.any():
        log.info(
            "%s: %d of %d images have no labels and are left out", split.where, unlabeled.sum(), len(split)
        )
    sizes = split.read(SIZES)
    boxes, classes = split.ragged(rows, BOXES), split.ragged(rows, BOX_CLASSES)
    side = store.manifest.preprocessing.image_size
    records, dropped, repeated = [], 0, 0
    for row, box, label in zip(rows.tolist(), boxes, classes, strict=True):
        key = str(split.keys[row])
        check_classes(label, store.manifest.class_names, key)
        width, height = int(sizes[row][0]), int(sizes[row][1])
        normalized = box.astype(np.float64).reshape(-1, 4) / (width, height, width, height)
        if raw:
            view = resize_view(store.manifest.preprocessing.resize, (width, height), side)
            normalized = view.boxes_to_view(normalized)
            width = height = side
        centered, kept = clean_boxes(normalized)
        dropped += int(len(kept) - kept.sum())
        label = label[kept].astype(np.int64)
        first = first_of_each(centered, label)
        repeated += len(label) - len(first)
        records.append(DetectionRecord(row, key, width, height, centered[first], label[first]))
    if not any(len(record.boxes) for record in records):
        log.warning("%s: no image has a box: nothing to learn or to measure", split.where)
    if dropped:
        log.warning("%s: %d boxes without area inside their image are ignored", split.where, dropped)
    if repeated:
        log.warning("%s: %d boxes that repeat another one of their image are ignored", split.where, repeated)
    return records


def first_of_each(boxes: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices, in order, of the boxes [M, 4] that no earlier box with the same class equals."""
    labels = np.column_stack([classes, boxes])
    return np.sort(np.unique(labels, axis=0, return_index=True)[1])


def check_classes(label: NDArray[np.int32], names: tuple[str, ...], key: str) -> None:
    bad = label[(label < 0) | (label >= len(names))]
    if len(bad):
        raise TrainError(
            f"boxes of {key}: class {int(bad[0])}, but the store names {len(names)} classes (0 to {len(names) - 1}): "
            "correct the labels or the list of names, then extract again"
        )


def clean_boxes(boxes: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Normalized xyxy [M, 4] → clipped center, size float32 [m, 4], and which of the M have area and are finite."""
    clipped = np.clip(np.nan_to_num(boxes, nan=0.0), 0.0, 1.0)
    size = clipped[:, 2:] - clipped[:, :2]
    kept: NDArray[np.bool_] = np.all(size > MIN_SIDE, axis=1)
    centered = np.concatenate([clipped[:, :2] + size / 2, size], axis=1)
    return centered[kept].astype(np.float32), kept


def teacher_targets(
    store: Store,
    of: str,
    statistics_of: str,
    layer: int | None,
    *,
    raw: bool,
    sources_per_cell: int,
    pending: str,
    rotations: Path | None,
) -> TeacherTargets:
    """Targets from the stored grid of a layer (None: the last) of split `of`, with the statistics of another one.

    Raises TrainError when there is no such grid, or no statistics of it.
    """
    name, split, learned = layer_grid(layer), store[of], store[statistics_of]
    if GRID not in split.names:
        raise TrainError(
            f"{store.location}: the store has no grid, which YOLO students learn from: extract with --grid 16 (or train "
            "with --distillation-type none)"
        )
    check_layers(store.location, [layer], split.names)
    exact_flip = store.manifest.exact_flip and view_array(name) in split.names
    statistics = learned.statistics.get(name)
    if statistics is None:
        raise TrainError(f"{store.location}: no statistics of {name}: run the extraction to its end")
    preprocessing = store.manifest.preprocessing
    side = preprocessing.image_size
    shown = store.whole.manifest.preprocessing.resize
    if raw and preprocessing.resize != shown:
        raise TrainError(
            f"{store.location}: raw images are as --resize {shown} shows them, teacher {store.teacher_name} saw "
            f"{preprocessing.resize}: choose another teacher, or a store with --images jpeg"
        )
    rotation = None if rotations is None else rotation_of(learned, name, rotations)
    standardizer = TargetStandardizer(
        statistics.mean, statistics.std, split.scale.get(name), rotation=rotation
    )
    # Raw images are the teacher's view already: its grid covers the whole image.
    sizes = np.full((len(split), 2), side) if raw else split.read(SIZES)
    return TeacherTargets(
        GridReader(split, name, exact_flip=exact_flip),
        sizes,
        standardizer,
        resize="squash" if raw else preprocessing.resize,
        teacher_size=(side, side),
        sources_per_cell=sources_per_cell,
        exact_flip=exact_flip,
        pending=pending,
    )


class GridReader:
    """Gathers stored grids by row: for a GPU into pinned buffers that are used in turn, and copied from directly."""

    def __init__(self, split: Split, name: str = GRID, *, exact_flip: bool = False) -> None:
        self.split, self.name, self.exact_flip = split, name, exact_flip
        self.gatherer: FeatureGatherer | None = None

    def __call__(self, rows: NDArray[np.int64], flipped: NDArray[np.bool_], device: torch.device) -> Tensor:
        """Grids [U, g, g, D] of rows int64 [U], of the mirror images where `flipped`; valid until `BUFFERS` more calls."""
        if self.gatherer is None or self.gatherer.device != device:
            self.gatherer = FeatureGatherer(
                self.split, [self.name], BUFFERS, device, exact_flip=self.exact_flip
            )
        return self.gatherer.gather(rows, flipped=flipped if self.exact_flip else None)[self.name]


@dataclass(frozen=True)
class FoundBoxes:
    """`rows` int64 [M] ascending, a row for each box; `boxes` float32 [M, 4]: normalized center and size; `classes` int64 [M].

    `confidence`: what all boxes have at least.
    """

    rows: NDArray[np.int64]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def records(self, split: Split, side: int | None) -> list[DetectionRecord]:
        """One record for each image. `side`: of all images, where it is not that of the stored sizes."""
        sizes, found = split.read(SIZES), []
        for row in np.unique(self.rows).tolist():
            width, height = (side, side) if side else sizes[row].tolist()
            chosen = self.rows == row
            boxes, classes = self.boxes[chosen], self.classes[chosen]
            found.append(DetectionRecord(row, str(split.keys[row]), width, height, boxes, classes))
        return found

    def write(self, run: Path) -> None:
        with replacing(run / BOXES_FOUND) as partial, partial.open("wb") as stream:
            np.savez(stream, **vars(self))

    @classmethod
    def read(cls, run: Path) -> FoundBoxes:
        with np.load(run / BOXES_FOUND, allow_pickle=False) as stored:
            return cls(**stored)


def add_found_boxes(run: Path, store: Store, name: str, train: DetectionSplit) -> DetectionSplit:
    """The training split `name` with the images in which boxes were found, in row order."""
    side = store.whole.manifest.preprocessing.image_size if train.raw else None
    records = FoundBoxes.read(run).records(store[name], side)
    together = sorted([*train.records, *records], key=lambda record: record.row)
    return replace(train, records=together)
