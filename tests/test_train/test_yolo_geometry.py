"""Stored grids follow ultralytics' augmentations: proven with images and grids that hold their own coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from store import open_store
from tests.test_train.yolo_data import GRID, make_store
from train.config import TrainConfig
from train.errors import TrainError
from train.projector import TargetStandardizer

pytest.importorskip("ultralytics")
IMAGE_SIZE = 160
SOURCES = 200
FILL = 114
# A source is at most 1.5 times the training image wide (scale 0.5): one pixel is at least this much of it.
SOURCE_PER_PIXEL = 1 / (1.5 * IMAGE_SIZE)
EVERYTHING = "degrees=30,shear=10,perspective=0.0005,translate=0.2,scale=0.5,flipud=0.3,fliplr=0.5"
COLOURS_STAY = "hsv_h=0,hsv_s=0,hsv_v=0,plots=false"


def code_of(row: Tensor | int) -> Any:
    """The blue value that tells the source: its row, leaving out the fill colour."""
    return row + (row >= FILL)


def coordinate_image(row: int, generator: np.random.Generator) -> np.ndarray:
    """An image whose red and green are x and y of the pixel, and whose blue is its row in the store."""
    width, height = generator.integers(90, 220, 2)
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    image[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    image[..., 2] = code_of(row)
    return image


def coordinate_grid(split: str, row: int, image: np.ndarray) -> np.ndarray:
    """The grid of such an image, as a teacher with the squash policy would see it: x, y, row."""
    centres = ((np.arange(GRID) + 0.5) / GRID).astype(np.float32)
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y, np.full_like(x, row)], axis=-1)


@pytest.fixture(scope="module")
def coordinate_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(3)
    box = (np.array([[20, 20, 60, 60]], np.float32), np.zeros(1, np.int32))
    rows = [(coordinate_image(row, generator), *box) for row in range(SOURCES)]
    path = tmp_path_factory.mktemp("geometry") / "coordinates.zarr"
    return make_store(path, {"train": rows, "val": rows[:20]}, grid_features=coordinate_grid)


@pytest.fixture
def make_trainer(coordinate_store: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`make_trainer(settings)`: a trainer that is set up, with targets in true units."""
    from train.engine.yolo.assemble import build_job
    from train.engine.yolo.offline import prepare_ultralytics
    from train.engine.yolo.trainer import StoreTrainer

    prepare_ultralytics()
    made = []

    def make(settings: str, workers: int = 2, epoch: int = 0) -> Any:
        config = TrainConfig(
            store=coordinate_store,
            student="yolov8/n",
            out=tmp_path,
            image_size=IMAGE_SIZE,
            batch_size=20,
            device="cpu",
            workers=workers,
            yolo_settings=f"{COLOURS_STAY},{settings}",
        )
        job = build_job(config, tmp_path, open_store(coordinate_store), None)
        for split in job.splits.values():
            assert split.targets is not None
            split.targets.standardizer = TargetStandardizer(np.zeros(3), np.ones(3), np.ones(3))
        trainer = StoreTrainer(job)
        trainer._setup_train()
        trainer.epoch = epoch
        trainer._model_train()
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.train_loader.close()
        trainer.test_loader.close()


def shown_cells(images: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean colour [B, h, w, 3] of each cell's pixels, whether they are one surface, and their lowest blue.

    One surface: blue is constant over the cell and a pixel around it, and x and y vary less than two pastes of one
    source would make them.
    """
    images = images.float()
    high = functional.max_pool2d(images, stride + 2, stride, padding=1)
    low = -functional.max_pool2d(-images, stride + 2, stride, padding=1)
    smooth = (high - low)[:, :2].amax(1) < 255 * 2 * (stride + 2) / 90
    one = ((high - low)[:, 2] == 0) & smooth
    return functional.avg_pool2d(images, stride).permute(0, 2, 3, 1), one, low[:, 2]


def compare(trainer: Any, loader: Any, targets: Any) -> dict[str, float]:
    """Counts and the largest error, in cells, over all batches of a loader and all levels."""
    found = {"cells": 0.0, "worst": 0.0, "wrong_source": 0.0, "masked": 0.0, "wrongly_masked": 0.0}
    for batch in loader:
        for stride in (8, 16, 32):
            height, width = (side // stride for side in batch["img"].shape[2:])
            target, weight = targets.at(batch, height, width)
            colour, one, blue = shown_cells(batch["img"], stride)
            whole = one & (weight > 0.999)
            error = (target[..., :2] - colour[..., :2] / 255).abs()[whole] / SOURCE_PER_PIXEL / stride
            # The grid holds its cells' centres: beyond the outermost ones its coordinates stay the same.
            inner = (colour[..., :2][whole] / 255 - 0.5).abs().amax(-1) < 0.5 - 0.5 / GRID
            found["worst"] = max(found["worst"], float(error[inner].amax()))
            found["cells"] += int(whole.sum())
            found["wrong_source"] += int((code_of(target[..., 2].round())[whole] != blue[whole]).sum())
            nothing = one & (weight == 0)
            found["masked"] += int(nothing.sum())
            found["wrongly_masked"] += int((blue[nothing] != FILL).sum())
    return found


def check(found: dict[str, float], cells: int) -> None:
    assert found["cells"] > cells
    assert found["worst"] < 0.5
    assert found["wrong_source"] == 0
    assert found["wrongly_masked"] == 0


@pytest.mark.parametrize(
    "settings",
    [f"mosaic=1,{EVERYTHING}", pytest.param(f"mosaic=0,{EVERYTHING}", marks=pytest.mark.slow)],
    ids=["mosaic", "closed mosaic"],
)
def test_200_samples_of_the_trainers_loader_with_workers(
    make_trainer: Callable[..., Any], settings: str
) -> None:
    trainer = make_trainer(settings)
    assert trainer.train_loader.num_workers == 2
    found = compare(trainer, trainer.train_loader, trainer.job.splits["train"].targets)
    check(found, cells=20_000)
    assert found["masked"] > 500


def test_validation_letterbox_in_rectangular_batches(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("mosaic=1", workers=0)
    found = compare(trainer, trainer.test_loader, trainer.job.splits["val"].targets)
    check(found, cells=2_000)


def test_a_transform_that_did_not_move_its_placements_would_be_seen(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.data import augment

    from train.engine.yolo import geometry

    monkeypatch.setattr(geometry, "TRACKED", {**geometry.TRACKED, augment.RandomFlip: augment.RandomFlip})
    trainer = make_trainer(f"mosaic=1,{EVERYTHING}", workers=0)
    found = compare(trainer, trainer.train_loader, trainer.job.splits["train"].targets)
    assert found["worst"] > 2


def test_mixup_blends_targets_as_it_blends_pixels(make_trainer: Callable[..., Any]) -> None:
    """Where two images overlap, colour and target are the same mixture of both sources' coordinates."""
    trainer = make_trainer("mosaic=0,mixup=1,fliplr=0.5,degrees=10", workers=0)
    targets = trainer.job.splits["train"].targets
    assert targets.sources_per_cell == 2
    batch = next(iter(trainer.train_loader))
    target, weight = targets.at(batch, 5, 5)
    colour = functional.avg_pool2d(batch["img"].float(), 32).permute(0, 2, 3, 1) / 255
    blend = colour[..., :2][weight > 0.999]
    error = (blend - target[weight > 0.999][..., :2]).abs()
    assert len(error) > 100
    assert float(error.median()) < 0.01
    assert float((error < 0.05).float().mean()) > 0.9
    partly = (weight > 0.01) & (weight < 0.99)
    assert int(partly.sum()) > 10


def test_a_teacher_with_letterbox_has_its_padding_left_out() -> None:
    from train.engine.yolo.geometry import packed_placements, whole_image
    from train.engine.yolo.targets import TeacherTargets

    wide = np.arange(GRID * GRID, dtype=np.float32).reshape(1, GRID, GRID, 1)
    for policy, first, last in (("letterbox", 2, 5), ("center-crop", 0, GRID - 1), ("squash", 0, GRID - 1)):
        targets = TeacherTargets(
            lambda rows: wide,
            np.array([[200, 100]]),
            TargetStandardizer(np.zeros(1), np.ones(1)),
            resize=policy,
            teacher_size=(112, 112),
        )
        rows, values = packed_placements([whole_image(0, 200, 100)], 200, 100)
        batch = {
            "source_rows": torch.from_numpy(rows)[None],
            "source_placements": torch.from_numpy(values)[None],
        }
        found, weight = targets.at(batch, 4, 8)
        grid_rows = (found[0, ..., 0] // GRID)[weight[0] > 0]
        assert (int(grid_rows.min()), int(grid_rows.max())) == (first, last)
        outside = int((weight == 0).sum())
        # The centre crop shows the middle half of a 2:1 image: 4 of 8 columns.
        assert outside == (16 if policy == "center-crop" else 0)


def test_an_unknown_augmentation_is_refused() -> None:
    from ultralytics.data import augment

    from train.engine.yolo.geometry import track

    class Swirl(augment.BaseTransform):  # type: ignore[misc]
        pass

    with pytest.raises(TrainError, match="Swirl: the teacher's features cannot follow"):
        track(augment.Compose([Swirl()]))


def test_foreground_cells_weigh_more() -> None:
    from train.engine.yolo.targets import foreground_weights

    batch = {
        "img": torch.zeros(2, 3, 64, 64),
        "bboxes": torch.tensor([[0.5, 0.5, 0.1, 0.1], [0.125, 0.125, 0.2, 0.2]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    weights = foreground_weights(batch, 4, 4, 3.0)
    middle = torch.ones(4, 4)
    middle[1:3, 1:3] = 3
    corner = torch.ones(4, 4)
    corner[0, 0] = 3
    assert torch.equal(weights, torch.stack([middle, corner]))
    assert torch.equal(foreground_weights(batch, 4, 4, 1.0), torch.ones(2, 4, 4))


def test_images_are_sized_as_ultralytics_sizes_them(coordinate_store: Path, tmp_path: Path) -> None:
    """Our `load_image` reads from the store; shapes and pixels equal those of ultralytics' own for a file."""
    from PIL import Image
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    from train.engine.yolo.dataset import DetectionRecord, StoreDataset

    image = coordinate_image(5, np.random.default_rng(1))
    height, width = image.shape[:2]
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    settings = {
        "imgsz": 160,
        "augment": False,
        "hyp": get_cfg(),
        "data": {"names": {0: "a"}, "nc": 1, "channels": 3},
    }
    theirs = YOLODataset(img_path=str(tmp_path / "images"), task="detect", **settings)
    box = np.array([[0.5, 0.5, 0.2, 0.2]], np.float32)
    record = DetectionRecord(0, "a", width, height, box, np.zeros(1, np.int64))
    ours = StoreDataset([record], lambda row: image, follow_sources=False, **settings)
    for mine, other in zip(ours.load_image(0), theirs.load_image(0), strict=True):
        assert np.array_equal(mine, other)
    assert np.array_equal(ours.labels[0]["bboxes"], theirs.labels[0]["bboxes"])
