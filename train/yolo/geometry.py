"""Where every point of an augmented training image comes from.

ultralytics composes a training image from up to eight source images. A `Placement` follows one of them: four
corner points of the source travel through the same transform objects as the boxes do, moved by ultralytics' own
methods (`Mosaic._update_labels`, `RandomPerspective.apply_keypoints`, `Instances.fliplr` …), so that nothing of
its mathematics is repeated here. At the end of the chain the four corners give the homography from the training
image back to the source.

Coordinates are normalized as in `imaging.geometry` (x, y; edges at 0 and 1). OpenCV's warp counts from pixel
centers and ultralytics' boxes from pixel edges; placements follow the boxes, so they lie within one pixel of
the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from ultralytics.data import augment
from ultralytics.utils.instance import Instances

from train.errors import TrainError

GEOMETRY_KEY = "placements"
# Keys of a batch: rows of the store int64 [B, K] (−1: none) and packed placements float32 [B, K, PACKED_WIDTH].
SOURCE_ROWS, SOURCE_PLACEMENTS = "source_rows", "source_placements"
Floats = NDArray[np.float64]
Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2
WHOLE: Rectangle = (0.0, 0.0, 1.0, 1.0)
UNIT_SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float64)

# One row of `packed_placements`: homography (9, row-major), visible rectangle of the source (4), region of the
# training image (4), region's sense (+1 shown inside, −1 hidden inside), weight.
PACKED_WIDTH = 19


@dataclass(frozen=True)
class Placement:
    """One source image inside the image being made.

    `row`: of the store. `corners` [4, 2]: pixels of the current canvas where the source's corners (clockwise from
    the top left) lie. `visible`: the part of the source that was pasted, in normalized source coordinates.
    `region`, `region_sense`: a rectangle of the canvas in which alone (+1), or outside which (−1), it shows
    (CutMix). `weight`: its share of the pixels' values (MixUp).
    """

    row: int
    corners: Floats
    visible: Rectangle = WHOLE
    region: Floats | None = None
    region_sense: int = 1
    weight: float = 1.0

    def moved(self, move: Callable[[Instances], Instances]) -> Placement:
        """The placement after `move`, which gets its points as the keypoints of an ultralytics instance."""
        points = self.corners if self.region is None else np.concatenate([self.corners, self.region])
        keypoints = np.ones((1, len(points), 3))
        keypoints[0, :, :2] = points
        box = np.zeros((1, 4))
        after = move(Instances(box, keypoints=keypoints, bbox_format="xyxy", normalized=False))
        where = np.asarray(after.keypoints, dtype=np.float64)[0, :, :2]
        return replace(self, corners=where[:4], region=None if self.region is None else where[4:])


def whole_image(row: int, width: int, height: int) -> Placement:
    """The placement of an untouched image on its own canvas of `width` × `height` pixels."""
    return Placement(row, UNIT_SQUARE * (width, height))


class TrackedMosaic(augment.Mosaic):  # type: ignore[misc]
    """ultralytics' Mosaic; the placements of its patches move with their boxes."""

    def apply_instances(self, labels: Any, params: Any = None) -> Any:
        placements = [placement for item in params["layout"] for placement in self.placed(item)]
        labels = super().apply_instances(labels, params)
        labels[GEOMETRY_KEY] = placements
        return labels

    def placed(self, item: dict[str, Any]) -> list[Placement]:
        """The placements of one patch of the layout, cut to what of it is pasted."""
        height, width = item["img_shape"]
        visible = (item["x1b"] / width, item["y1b"] / height, item["x2b"] / width, item["y2b"] / height)

        def move(instances: Instances) -> Instances:
            patch = {"instances": instances}
            moved = self._update_labels(patch, item["padw"], item["padh"], (height, width))
            return moved["instances"]

        return [replace(p.moved(move), visible=visible) for p in item["labels_patch"][GEOMETRY_KEY]]


class TrackedPerspective(augment.RandomPerspective):  # type: ignore[misc]
    """ultralytics' RandomPerspective; placements move as its keypoints do."""

    def apply_instances(self, labels: Any, params: Any = None) -> Any:
        labels = super().apply_instances(labels, params)

        def move(instances: Instances) -> Instances:
            keypoints = np.asarray(instances.keypoints)
            instances.keypoints = self.apply_keypoints(keypoints, params["M"], params["size"])
            return instances

        return move_placements(labels, move)


class TrackedFlip(augment.RandomFlip):  # type: ignore[misc]
    """ultralytics' RandomFlip; placements flip with the boxes."""

    def apply_instances(self, labels: Any, params: Any = None) -> Any:
        labels = super().apply_instances(labels, params)
        height, width = labels["img"].shape[:2]
        in_pixels = {**params, "h": height, "w": width, "flip_idx": None}
        flip = super().apply_instances
        return move_placements(labels, lambda i: flip({"instances": i}, in_pixels)["instances"])


class TrackedLetterBox(augment.LetterBox):  # type: ignore[misc]
    """ultralytics' LetterBox; placements move with the boxes."""

    def apply_instances(self, labels: Any, params: Any = None) -> Any:
        labels = super().apply_instances(labels, params)
        ratio, left, top, shape = (params[name] for name in ("ratio", "left", "top", "orig_shape"))

        def move(instances: Instances) -> Instances:
            return self._update_labels({"instances": instances}, ratio, left, top, shape)["instances"]

        return move_placements(labels, move)


class TrackedMixUp(augment.MixUp):  # type: ignore[misc]
    """ultralytics' MixUp; both images' placements stay, with the shares of the blend."""

    def apply_instances(self, labels: Any, params: Any = None) -> Any:
        share = float(params["r"])
        other = labels["mix_labels"][0][GEOMETRY_KEY]
        mixed = scaled(labels[GEOMETRY_KEY], share) + scaled(other, 1.0 - share)
        labels = super().apply_instances(labels, params)
        labels[GEOMETRY_KEY] = mixed
        return labels


class TrackedCutMix(augment.CutMix):  # type: ignore[misc]
    """ultralytics' CutMix; inside the pasted rectangle the other image's placements hold."""

    def apply_instances(self, labels: Any, params: Any = None) -> Any:
        if not params.get("skip"):
            x1, y1, x2, y2 = params["area"].astype(np.int32).tolist()
            area = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], dtype=np.float64)
            inside = [replace(p, region=area) for p in labels["mix_labels"][0][GEOMETRY_KEY]]
            outside = [replace(p, region=area, region_sense=-1) for p in labels[GEOMETRY_KEY]]
            labels[GEOMETRY_KEY] = outside + inside
        return super().apply_instances(labels, params)


TRACKED: dict[type, type] = {
    augment.Mosaic: TrackedMosaic,
    augment.RandomPerspective: TrackedPerspective,
    augment.RandomFlip: TrackedFlip,
    augment.LetterBox: TrackedLetterBox,
    augment.MixUp: TrackedMixUp,
    augment.CutMix: TrackedCutMix,
}
# CopyPaste needs segments, which detection data does not have.
PHOTOMETRIC = (augment.RandomHSV, augment.Format, augment.CopyPaste)


def track(transform: Any) -> None:
    """Make every geometric transform of a chain move placements too; in place, nested chains included.

    The objects stay those that ultralytics built, with its settings and random draws; they only change to a
    sub-class that adds the placements.

    Raises:
        TrainError: for a transform whose geometry is not known here.
    """
    if isinstance(transform, augment.Compose):
        for member in transform.transforms:
            track(member)
        return
    kind = type(transform)
    if kind in TRACKED:
        transform.__class__ = TRACKED[kind]
    elif kind not in TRACKED.values() and not isinstance(transform, PHOTOMETRIC) and moves_points(transform):
        raise TrainError(
            f"augmentation {kind.__name__}: the teacher's features cannot follow it; known are "
            + ", ".join(sorted(known.__name__ for known in TRACKED))
        )
    if isinstance(transform, augment.BaseMixTransform) and transform.pre_transform is not None:
        track(transform.pre_transform)


def moves_points(transform: Any) -> bool:
    """False for albumentations pipelines that only change colors (ultralytics' default one)."""
    if isinstance(transform, augment.Albumentations):
        return transform.transform is not None and bool(transform.contains_spatial)
    return True


def move_placements(labels: dict[str, Any], move: Callable[[Instances], Instances]) -> dict[str, Any]:
    labels[GEOMETRY_KEY] = [placement.moved(move) for placement in labels[GEOMETRY_KEY]]
    return labels


def scaled(placements: Iterable[Placement], share: float) -> list[Placement]:
    return [replace(p, weight=p.weight * share) for p in placements]


def packed_placements(
    placements: list[Placement], width: int, height: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows [K] and values [K, PACKED_WIDTH] of the placements on a finished image of `width` × `height` pixels.

    The homography maps normalized coordinates of the training image to those of the source.
    """
    rows = np.array([p.row for p in placements], dtype=np.int64)
    values = np.empty((len(placements), PACKED_WIDTH), dtype=np.float32)
    for value, placement in zip(values, placements, strict=True):
        value[:9] = to_source(placement.corners / (width, height)).reshape(-1)
        value[9:13] = placement.visible
        value[13:17] = bounds(placement.region, width, height)
        value[17:] = placement.region_sense, placement.weight
    return rows, values


def to_source(corners: Floats) -> Floats:
    """The homography float64 [3, 3] that takes `corners` [4, 2] to the unit square."""
    # getPerspectiveTransform wants float32 points but solves in float64.
    found = cv2.getPerspectiveTransform(corners.astype(np.float32), UNIT_SQUARE.astype(np.float32))
    return np.asarray(found, dtype=np.float64)


def bounds(region: Floats | None, width: int, height: int) -> Rectangle:
    """A region's rectangle in normalized coordinates; without a region one that holds everything."""
    if region is None:
        return (-np.inf, -np.inf, np.inf, np.inf)
    (x1, y1), (x2, y2) = region.min(0) / (width, height), region.max(0) / (width, height)
    return (float(x1), float(y1), float(x2), float(y2))
