"""Stored grids follow ultralytics' augmentations: proven with images and grids that hold their own coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from store.reader import open_store
from tests.test_train.yolo_data import GRID, make_store
from train.config import TrainConfig
from train.errors import TrainError

pytest.importorskip("ultralytics")
IMAGE_SIZE = 160
SOURCES = 200
FINE_GRID = 40
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


def coordinate_grid(cells: int) -> Callable[[str, int, np.ndarray], np.ndarray]:
    """The grid of such an image, as a teacher with the squash policy would see it: x, y, blue of each cell's centre."""
    centres = ((np.arange(cells) + 0.5) / cells).astype(np.float32)
    x, y = np.meshgrid(centres, centres)
    return lambda split, row, image: np.stack([x, y, np.full_like(x, code_of(row))], axis=-1)


def make_coordinate_store(path: Path, cells: int, **options: Any) -> Path:
    generator = np.random.default_rng(3)
    box = (np.array([[20, 20, 60, 60]], np.float32), np.zeros(1, np.int32))
    rows = [(coordinate_image(row, generator), *box) for row in range(SOURCES)]
    features = options.pop("grid_features", coordinate_grid(cells))
    return make_store(path, {"train": rows, "val": rows[:20]}, grid_features=features, **options)


@pytest.fixture(scope="module")
def coordinate_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grids of 8 × 8 cells: coarser than the student's maps at P3 and P4, finer than at P5."""
    return make_coordinate_store(tmp_path_factory.mktemp("geometry") / "coarse.zarr", GRID)


@pytest.fixture(scope="module")
def fine_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grids of 40 × 40 cells: each student cell takes the mean of several, and coordinates hold up to the edges."""
    return make_coordinate_store(tmp_path_factory.mktemp("geometry") / "fine.zarr", FINE_GRID)


@pytest.fixture
def make_trainer(coordinate_store: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`make_trainer(settings)`: a trainer that is set up, with targets in true units."""
    from train.students.offline import prepare_ultralytics
    from train.yolo.job import build_job
    from train.yolo.trainer import StoreTrainer

    prepare_ultralytics()
    made = []

    def make(settings: str, workers: int = 2, store: Path = coordinate_store) -> Any:
        config = TrainConfig(
            store=store,
            student="yolov8/n",
            out=tmp_path,
            image_size=IMAGE_SIZE,
            batch_size=20,
            device="cpu",
            workers=workers,
            yolo_settings=f"{COLOURS_STAY},{settings}",
        )
        job = build_job(config, tmp_path, open_store(store), None)
        for split in job.splits.values():
            assert split.targets is not None
            split.targets["P5"].standardizer = nn.Identity()  # stored values are places and pixels
        trainer = StoreTrainer(job)
        trainer._setup_train()
        trainer.epoch = 0
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


@dataclass
class Found:
    """What the comparison of targets with pixels found; `worst` in cells of the student's map."""

    cells: int = 0
    worst: float = 0.0
    wrong_source: int = 0
    masked: int = 0
    wrongly_masked: int = 0
    partly: int = 0

    def add(self, batch: dict[str, Any], targets: Any, stride: int, cells: int) -> None:
        """Compare a batch at one level; `cells` is the side of the teacher's grid."""
        height, width = (side // stride for side in batch["img"].shape[2:])
        target, weight = targets.at(batch, height, width)
        colour, one, blue = shown_cells(batch["img"], stride)
        whole = one & (weight > 0.999)
        error = (target[..., :2] - colour[..., :2] / 255).abs()[whole] / SOURCE_PER_PIXEL / stride
        # A grid holds its cells' centres: beyond the outermost ones its coordinates stay the same.
        inner = (colour[..., :2][whole] / 255 - 0.5).abs().amax(-1) < 0.5 - 0.5 / cells
        self.worst = max(self.worst, float(error[inner].amax()))
        self.cells += int(whole.sum())
        # A blend of two images is rounded down to whole numbers of blue.
        tolerance = 1.0 if targets.sources_per_cell > 1 else 0.01
        self.wrong_source += int(((target[..., 2] - blue)[whole].abs() > tolerance).sum())
        nothing = one & (weight == 0)
        self.masked += int(nothing.sum())
        self.wrongly_masked += int(((blue[nothing] - FILL).abs() > tolerance).sum())
        self.partly += int(((weight > 0.01) & (weight < 0.99)).sum())


def compare(trainer: Any, loader: Any, targets: Any, cells: int = GRID) -> Found:
    """Targets against pixels, over all batches of a loader and all levels."""
    found = Found()
    for batch in loader:
        for stride in (8, 16, 32):
            found.add(batch, targets, stride, cells)
    return found


def check(found: Found, cells: int) -> None:
    assert found.cells > cells
    assert found.worst < 0.5
    assert found.wrong_source == 0
    assert found.wrongly_masked == 0


def test_200_samples_of_the_trainers_loader_with_workers(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(f"mosaic=1,{EVERYTHING}")
    assert trainer.train_loader.num_workers == 2
    found = compare(trainer, trainer.train_loader, trainer.job.splits["train"].targets["P5"])
    check(found, cells=20_000)
    assert found.masked > 500


@pytest.mark.slow
def test_200_samples_after_the_trainer_has_closed_mosaic(make_trainer: Callable[..., Any]) -> None:
    """As in the last epochs of a training: letterbox and perspective of single images."""
    trainer = make_trainer(f"mosaic=1,{EVERYTHING}")
    trainer._close_dataloader_mosaic()
    trainer.train_loader.reset()
    assert {int((batch["source_rows"] >= 0).sum(1).max()) for batch in trainer.train_loader} == {1}
    found = compare(trainer, trainer.train_loader, trainer.job.splits["train"].targets["P5"])
    check(found, cells=10_000)
    assert found.masked > 500


@pytest.mark.slow
@pytest.mark.parametrize("mosaic", [0, 1])
def test_200_samples_of_mixup_with_workers(
    make_trainer: Callable[..., Any], fine_store: Path, mosaic: int
) -> None:
    """Where two images overlap, colour and target are the same mixture of both sources' coordinates."""
    trainer = make_trainer(f"mixup=1,mosaic={mosaic},{EVERYTHING}", store=fine_store)
    targets = trainer.job.splits["train"].targets["P5"]
    assert targets.sources_per_cell == 2
    found = compare(trainer, trainer.train_loader, targets, FINE_GRID)
    check(found, cells=2_000)
    assert found.partly > 500


def mean_step(color: Tensor, axis: int) -> Tensor:
    """By how much a color [B, H, W] grows from pixel to pixel along an axis: the mean in cells of 16 pixels."""
    padding = (0, 1) if axis == 2 else (0, 0, 0, 1)
    return functional.avg_pool2d(functional.pad(color.diff(dim=axis), padding), 16)


MARK = 3  # the channel that is 1 in the grids of mirror images


@pytest.mark.parametrize(
    "settings",
    ["fliplr=0.5,translate=0.2,scale=0.5", pytest.param(EVERYTHING, marks=pytest.mark.slow)],
)
def test_sources_that_are_shown_flipped_get_the_mirror_images_grid(
    make_trainer: Callable[..., Any], tmp_path: Path, settings: str
) -> None:
    """Where they belong, and no others: a cell is flipped where the color that is x falls from left to right."""
    plain = coordinate_grid(GRID)

    def marked(split: str, row: int, image: np.ndarray) -> np.ndarray:
        grid = plain(split, row, image)
        return np.concatenate([grid, np.zeros_like(grid[..., :1])], axis=-1)

    def mirror(grid: np.ndarray) -> np.ndarray:
        mirrored = grid[:, ::-1].copy()
        mirrored[..., MARK] = 1
        return mirrored

    store = make_coordinate_store(tmp_path / "store.zarr", GRID, grid_features=marked, mirror=mirror)
    trainer = make_trainer(f"mosaic=1,{settings}", workers=0, store=store)
    targets = trainer.job.splits["train"].targets["P5"]
    found, marks = Found(), {True: 0, False: 0}
    for batch in trainer.train_loader:
        found.add(batch, targets, 16, GRID)
        target, weight = targets.at(batch, IMAGE_SIZE // 16, IMAGE_SIZE // 16)
        _, one, _ = shown_cells(batch["img"], 16)
        red, green = batch["img"][:, 0].float(), batch["img"][:, 1].float()
        rx, gx = (mean_step(color, 2) for color in (red, green))
        ry, gy = (mean_step(color, 1) for color in (red, green))
        flipped = (rx * gy - ry * gx < 0) & (rx < 0)
        turned = rx.abs() < 0.2  # upright or lying is not told from the pixels' rounded colors
        whole = one & (weight > 0.999) & ~turned
        assert torch.equal(target[..., MARK][whole] > 0.5, flipped[whole])
        for value in marks:
            marks[value] += int((flipped[whole] == value).sum())
    assert min(marks.values()) > 500
    check(found, cells=3_000)


@pytest.mark.slow
def test_200_samples_of_cutmix_with_workers(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(f"cutmix=1,mosaic=1,{EVERYTHING}")
    found = compare(trainer, trainer.train_loader, trainer.job.splits["train"].targets["P5"])
    check(found, cells=15_000)


def test_validation_letterbox_in_rectangular_batches(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("mosaic=1", workers=0)
    found = compare(trainer, trainer.test_loader, trainer.job.splits["val"].targets["P5"])
    check(found, cells=2_000)


def test_a_transform_that_did_not_move_its_placements_would_be_seen(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.data import augment

    from train.yolo import geometry

    monkeypatch.setattr(geometry, "TRACKED", {**geometry.TRACKED, augment.RandomFlip: augment.RandomFlip})
    trainer = make_trainer(f"mosaic=1,{EVERYTHING}", workers=0)
    found = compare(trainer, trainer.train_loader, trainer.job.splits["train"].targets["P5"])
    assert found.worst > 2


def test_mixup_blends_targets_as_it_blends_pixels(make_trainer: Callable[..., Any], fine_store: Path) -> None:
    trainer = make_trainer("mosaic=0,mixup=1,fliplr=0.5,degrees=10", workers=0, store=fine_store)
    targets = trainer.job.splits["train"].targets["P5"]
    found = Found()
    for stride in (8, 16):
        found.add(next(iter(trainer.train_loader)), targets, stride, FINE_GRID)
    check(found, cells=200)
    assert found.partly > 100


def test_a_teacher_with_letterbox_has_its_padding_left_out() -> None:
    from train.yolo.geometry import packed_placements, whole_image
    from train.yolo.targets import TeacherTargets

    wide = np.arange(GRID * GRID, dtype=np.float32).reshape(1, GRID, GRID, 1)
    for policy, first, last in (("letterbox", 2, 5), ("center-crop", 0, GRID - 1), ("squash", 0, GRID - 1)):
        targets = TeacherTargets(
            lambda rows, _flipped, _device: torch.from_numpy(wide),
            np.array([[200, 100]]),
            nn.Identity(),
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

    from train.yolo.geometry import track

    class Swirl(augment.BaseTransform):  # type: ignore[misc]
        pass

    with pytest.raises(TrainError, match="Swirl: the teacher's features cannot follow"):
        track(augment.Compose([Swirl()]))


def test_foreground_cells_weigh_more() -> None:
    from train.yolo.targets import foreground_weights

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

    from train.yolo.dataset import DetectionRecord, StoreDataset

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
