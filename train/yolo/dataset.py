"""The store's boxes and images as an ultralytics data set, so that its own loader and augmentations run on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from ultralytics.data.dataset import YOLODataset

from train.yolo.geometry import GEOMETRY_KEY, packed_placements, track, whole_image

# Keys of a batch: rows of the store int64 [B, K] (−1: none) and packed placements float32 [B, K, PACKED_WIDTH].
SOURCE_ROWS = "source_rows"
SOURCE_PLACEMENTS = "source_placements"


@dataclass(frozen=True)
class DetectionRecord:
    """One image of a split: where it is in the store, and its boxes.

    `boxes` float32 [M, 4]: normalised centre x, centre y, width, height, inside the image; `classes` int [M].
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
