"""The report's sample pictures: a perfect predictor is perfect there too, and what it draws is in the right place."""

from __future__ import annotations

import io
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imaging.geometry import PADDING_COLOR, View, resize_view
from store.create import create_store
from store.finalize import finalize_store
from store.format import Manifest, Preprocessing, TeacherSpec, feature_arrays, image_arrays, target_arrays
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter
from train.data.batches import Item
from train.data.images import ImageReader, ImageViews, ViewSettings
from train.data.views import AUGMENTATIONS
from train.deliver.model import ModelCard
from train.report.runs import FinishedRun
from train.report.samples import Subject, detection, mask_on, pixel_confusion, segmentation

SIDE = 64  # of the teacher's input and of the student's
COLORS = np.array([[30, 30, 30], [220, 40, 40], [40, 60, 220]])
POLICIES = ("squash", "letterbox", "center-crop")
SIZES = ((120, 80), (80, 150), (100, 100), (70, 160))


def scene(row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
    """One rectangle a class on a dark ground: pixels [H, W, 3], mask [H, W], boxes [2, 4], classes [2]."""
    width, height = SIZES[row % len(SIZES)]
    mask = np.zeros((height, width), np.uint8)
    boxes = []
    for index, (x, y) in enumerate(((0.3, 0.3), (0.55, 0.52))):
        x0, y0 = round(x * width), round(y * height)
        x1, y1 = x0 + width // 6, y0 + height // 6
        mask[y0:y1, x0:x1] = index + 1
        boxes.append([x0, y0, x1, y1])
    return COLORS[mask].astype(np.uint8), mask, np.array(boxes, np.float32), np.array([0, 1], np.int32)


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def scene_store(path: Path, resize: str, images: str, count: int = 8) -> Path:
    """A store of scenes with masks and boxes, images as `--images` says."""
    root = path.parent / "files"
    manifest = Manifest(
        teacher=TeacherSpec(name="none", fingerprint="0", layer="0", width=4),
        preprocessing=Preprocessing(image_size=SIDE, resize=resize),  # type: ignore[arg-type]
        class_names=("background", "red", "blue"),
        data_root=str(root) if images == "none" else None,
        images=images,  # type: ignore[arg-type]
    )
    arrays = feature_arrays(4) + target_arrays(mask=True, boxes=True) + image_arrays(images, SIDE)  # type: ignore[arg-type]
    create_store(path, manifest, Plan({"val": [f"{row}.png" for row in range(count)]}), arrays)
    rows = [scene(row) for row in range(count)]
    files = [encoded(pixels) for pixels, *_ in rows]
    block: dict[str, Any] = {
        "features/pooled": np.zeros((count, 4), np.float16),
        "sizes": np.array([(pixels.shape[1], pixels.shape[0]) for pixels, *_ in rows], np.int32),
        "content": np.array([np.frombuffer(blake2b(f, digest_size=16).digest(), np.uint8) for f in files]),
        "targets/mask/values": [np.frombuffer(encoded(mask), np.uint8) for _, mask, _, _ in rows],
        "targets/boxes/values": [boxes for _, _, boxes, _ in rows],
        "targets/boxes/classes": [classes for _, _, _, classes in rows],
    }
    if images == "jpeg":
        block["images/encoded/values"] = [np.frombuffer(data, np.uint8) for data in files]
    if images == "raw":
        pictures = [Image.fromarray(pixels) for pixels, *_ in rows]
        block["images/raw"] = np.stack(
            [
                np.asarray(resize_view(resize, picture.size, SIDE).render(picture, SIDE))
                for picture in pictures
            ]
        )
    if images == "none":
        root.mkdir()
        for row, data in enumerate(files):
            (root / f"{row}.png").write_bytes(data)
    with StoreWriter(path, "val") as writer:
        assert list(writer.batches()) == [(0, count)]
        writer.append(block)
    finalize_store(path)
    return path


def scores_of(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Scores [..., C] of colors [..., 3]; padding is ground."""
    scores = -np.square(pixels[..., None, :].astype(np.float64) - COLORS).sum(-1)
    scores[np.abs(pixels - np.array(PADDING_COLOR)).max(-1) < 12] = (0, -1, -1)
    return np.asarray(scores)


class PerfectModel:
    """Reads classes off the colors of its input: masks [B, C, S, S], or YOLO's boxes [B, 4 + C, A]."""

    def __init__(self, task: str, resize: str) -> None:
        self.card = ModelCard(
            student="perfect",
            task=task,
            class_names=("background", "red", "blue") if task == "segmentation" else ("red", "blue"),
            image_size=SIDE,
            resize="letterbox" if task == "detection" else resize,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        scores = scores_of(np.moveaxis(batch, 1, -1) * 255)
        if self.card.task == "segmentation":
            return np.moveaxis(scores, -1, 1).astype(np.float32)
        return np.stack([self.boxes(image.argmax(-1)) for image in scores])

    def boxes(self, classes: NDArray[np.int64]) -> NDArray[np.float32]:
        anchors = np.zeros((6, 2), np.float32)
        for index in (0, 1):
            rows, columns = np.nonzero(classes == index + 1)
            x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            anchors[:4, index] = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
            anchors[4 + index, index] = 0.99
        return anchors


def subject(path: Path, task: str, resize: str) -> Subject:
    store = open_store(path)
    root = store.manifest.data_root
    reader = ImageReader(store["val"], Path(root) if root else None, store.manifest.preprocessing)
    run = FinishedRun("", "run", path, {}, {}, [], False, {})
    model = PerfectModel(task, resize)
    return Subject(
        run, model, reader, store, "val", np.arange(len(store["val"])), len(model.card.class_names)
    )


@pytest.mark.parametrize("images", ["none", "jpeg", "raw"])
@pytest.mark.parametrize("resize", POLICIES)
def test_masks_of_a_perfect_predictor_are_as_right_as_in_the_evaluation(
    tmp_path: Path, resize: str, images: str
) -> None:
    seen = subject(scene_store(tmp_path / "s.zarr", resize, images), "segmentation", resize)
    settings = ViewSettings(
        image_size=SIDE, policy=resize, augmentation=AUGMENTATIONS["none"], seed=0, masks=True
    )
    expected = np.zeros((3, 3), np.int64)
    dataset = ImageViews(seen.reader, settings)
    for row in range(8):
        sample = dataset.show(Item(0, row, 1.0))
        predicted = seen.model.run(seen.card.normalize(sample["image"][None]))[0].argmax(0)
        expected += pixel_confusion(predicted.astype(np.uint8), sample["mask"], 3)
        picture = seen.reader.read(row, SIDE)
        drawn = np.asarray(mask_on(seen.card, picture, sample["mask"], picture.image.size))
        visible = scores_of(np.asarray(picture.image, float)).argmax(-1)
        for index in (1, 2):
            overlap, union = (drawn == index) & (visible == index), (drawn == index) | (visible == index)
            assert overlap.sum() > 0.7 * union.sum(), (row, index)
    found = segmentation(seen, 3)
    figure = found.figures[0]
    assert np.asarray(figure.data[0].customdata, np.int64).tolist() == expected.tolist()
    iou = expected.diagonal() / (expected.sum(0) + expected.sum(1) - expected.diagonal())
    assert iou.min() > 0.85
    assert [entry.name for entry in found.legend] == ["background", "red", "blue"]
    assert len(found.worst) == 3
    assert all(item.draw().mode == "RGB" for item in found.worst)


@pytest.mark.parametrize("images", ["none", "jpeg", "raw"])
@pytest.mark.parametrize("resize", POLICIES)
def test_boxes_of_a_perfect_predictor_are_all_hits(tmp_path: Path, resize: str, images: str) -> None:
    seen = subject(scene_store(tmp_path / "s.zarr", resize, images), "detection", resize)
    found = detection(seen, 8)
    counts = np.asarray(found.figures[0].data[0].customdata, np.int64)
    assert counts.tolist() == [[8, 0, 0], [0, 8, 0], [0, 0, 0]]
    assert {item.caption.partition(": ")[2] for item in found.worst} == {"0 missed, 0 too many"}
    for item in found.worst:
        pixels = np.asarray(item.draw()).astype(int)
        assert (pixels == 255).all(-1).any()  # the true boxes


def test_a_stored_picture_shows_the_part_that_its_view_says() -> None:
    from train.data.images import Shown

    whole = Shown(Image.new("RGB", (8, 8)), (16, 8))
    assert whole.into_image(View.identity()) == View.identity()
    crop = resize_view("center-crop", (16, 8), 8)
    part = Shown(Image.new("RGB", (8, 8)), (16, 8), crop)
    assert np.allclose(part.into_image(crop).matrix, View.identity().matrix)
