"""Small stores of synthetic images whose teacher features really say what is in the picture."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imaging.geometry import View
from store.create import create_store
from store.finalize import finalize_store
from store.format import (
    EXACT_VIEW,
    FLIP,
    Manifest,
    Preprocessing,
    TeacherSpec,
    feature_arrays,
    image_arrays,
    logits_array,
    map_array,
    target_arrays,
)
from store.keys import Plan
from store.reader import open_store
from store.writer import StoreWriter

WIDTH = 24
MIRROR_SHIFT = np.linspace(0.5, 30.0, WIDTH)
CLASSES = ("red", "green", "blue")
COLOURS = np.array([[210, 60, 60], [60, 210, 60], [60, 60, 210]])
MEMORY_DISK = Path("/dev/shm")

MakeStore = Callable[..., Path]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder on a memory disk where there is room: stores and checkpoints sync many files."""
    if not MEMORY_DISK.is_dir() or shutil.disk_usage(MEMORY_DISK).free < 500_000_000:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def draw_image(rng: np.random.Generator, label: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with a square of the class's colour, uint8 [side, side, 3], and its mask [side, side]."""
    pixels = rng.integers(0, 120, size=(side, side, 3))
    size = int(rng.integers(side // 3, side // 2 + 1))
    y, x = rng.integers(0, side - size, size=2)
    pixels[y : y + size, x : x + size] = np.clip(COLOURS[label] + rng.integers(-30, 30, size=3), 0, 255)
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[y : y + size, x : x + size] = label + 1
    return pixels.astype(np.uint8), mask


def teacher_grid(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Features [grid, grid, WIDTH]: fixed random functions of each patch's mean colour."""
    patches = pixels.reshape(grid, pixels.shape[0] // grid, grid, -1, 3).mean(axis=(1, 3)) / 255
    mix = np.random.default_rng(7).normal(size=(3, WIDTH))
    return np.tanh(patches @ mix) * np.linspace(0.1, 20, WIDTH)


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(path: Path, split: str, count: int, settings: dict[str, Any], root: Path | None) -> None:
    rng = np.random.default_rng([settings["seed"], len(split), count])
    keys = open_store(path, allow_incomplete=True)[split].keys
    with StoreWriter(path, split) as writer:
        for start, stop in writer.batches():
            writer.append(make_rows(keys[start:stop], rng, settings, root))


def make_rows(
    keys: list[str], rng: np.random.Generator, settings: dict[str, Any], root: Path | None
) -> dict[str, Any]:
    side, grid = settings["side"], settings["grid"] or 4
    rows: dict[str, list[Any]] = {}

    def put(name: str, value: Any) -> None:
        rows.setdefault(name, []).append(value)

    for number, key in enumerate(keys):
        label = (
            settings["one_class"] or int(rng.integers(len(CLASSES))) if settings["one_class"] is None else 0
        )
        pixels, mask = draw_image(rng, label, side)
        data = png_bytes(np.repeat(pixels, settings["aspect"], axis=1))
        features = teacher_grid(pixels, grid)
        put("features/pooled", features.mean(axis=(0, 1)))
        put("sizes", [side * settings["aspect"], side])
        if settings["exact_flip"]:
            put_mirror(put, features, settings)
        elif settings["views"]:
            put_views(put, pixels, grid, settings)
        put("content", np.frombuffer(blake2b(data, digest_size=16).digest(), np.uint8))
        if settings["grid"]:
            put("features/grid", features)
        for layer, (cells, width) in (settings.get("layers") or {}).items():
            noise = np.random.default_rng([layer, number])
            put(f"features/grid@{layer}", noise.normal(size=(cells, cells, width)))
            if settings["views"]:
                put(f"views/grid@{layer}", noise.normal(size=(settings["views"], cells, cells, width)))
        if settings["labels"]:
            put("targets/label", -1 if number in settings["unlabelled"] else label)
        if settings["masks"]:
            data_of_mask = b"" if key in settings["unmasked"] else png_bytes(mask)
            put("targets/mask/values", np.frombuffer(data_of_mask, np.uint8))
        if settings["maps"]:
            put("maps/probe", map_of(mask, 8))
        if settings["logits"]:
            put("logits/probe", 3.0 * np.eye(len(CLASSES))[label] + rng.normal(scale=0.3, size=len(CLASSES)))
        if settings["images"] == "jpeg":
            put("images/encoded/values", np.frombuffer(data, np.uint8))
        elif settings["images"] == "raw":
            put("images/raw", pixels)
        if root is not None:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(data)
    ragged = ("targets/mask/values", "images/encoded/values")
    types = {"targets/label": np.int32, "sizes": np.int32, "images/raw": np.uint8, "content": np.uint8}
    types["maps/probe"] = np.uint8
    return {
        name: values
        if name in ragged
        else np.asarray(values, types.get(name, np.float16 if "logits" in name else None))
        for name, values in rows.items()
    }


def map_of(mask: np.ndarray, side: int) -> np.ndarray:
    """The soft class map of an exact teacher: uint8 [side, side, 1 + classes], as `store.format.MAP_STEPS` says."""
    cells = mask.reshape(side, mask.shape[0] // side, side, -1)
    shares = np.stack([(cells == number).mean(axis=(1, 3)) for number in range(1 + len(CLASSES))], axis=-1)
    return np.clip(np.round(-16 * np.log(np.maximum(shares, 1e-9))), 0, 255)


def put_views(
    put: Callable[[str, Any], None], pixels: np.ndarray, grid: int, settings: dict[str, Any]
) -> None:
    """Quarter crops, the second mirrored: the teacher's features of exactly what each shows."""
    half = pixels.shape[0] // 2
    crops = [pixels[:half, :half], pixels[half:, half:, :][:, ::-1]]
    grids = [teacher_grid(np.kron(crop, np.ones((2, 2, 1))), grid) for crop in crops]
    put("views/geometry", [[[0.5, 0, 0], [0, 0.5, 0]], [[-0.5, 0, 1], [0, 0.5, 0.5]]])
    put("views/pooled", np.stack([features.mean(axis=(0, 1)) for features in grids]))
    if settings["grid"]:
        put("views/grid", np.stack(grids))


def put_mirror(put: Callable[[str, Any], None], features: np.ndarray, settings: dict[str, Any]) -> None:
    """A teacher that sees mirror images otherwise: `MIRROR_SHIFT` more than the plain grid, mirrored."""
    mirrored = features[:, ::-1] + MIRROR_SHIFT
    put("views/geometry", View.flip().matrix[None])
    put("views/pooled", mirrored.mean(axis=(0, 1))[None])
    if settings["grid"]:
        put("views/grid", mirrored[None])


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """make_store(train=24, val=8, grid=4, labels=True, masks=False, logits=False, images="jpeg") → path."""

    def make(
        name: str = "store.zarr",
        *,
        train: int = 24,
        val: int = 8,
        side: int = 32,
        grid: int = 4,
        labels: bool = True,
        masks: bool = False,
        maps: bool = False,
        unmasked: Collection[str] = (),
        logits: bool = False,
        images: str = "jpeg",
        one_class: bool | None = None,
        unlabelled: tuple[int, ...] = (),  # places in each batch of 8 rows
        views: int = 0,
        exact_flip: bool = False,
        scales: dict[str, np.ndarray] | None = None,
        layers: dict[int, tuple[int, int]] | None = None,
        seed: int = 0,
        random_teacher: bool = False,
        resize: str = "squash",
        aspect: int = 1,
    ) -> Path:
        views = 1 if exact_flip else views
        settings = locals() | {}
        path, root = tmp_path / name, tmp_path / f"{name}.images" if images == "none" else None
        arrays = feature_arrays(WIDTH, grid=grid or None, views=views, layers=layers) + target_arrays(
            label=labels, mask=masks
        )
        arrays += image_arrays(images, side) + ([logits_array("probe", len(CLASSES))] if logits else [])
        arrays += [map_array("probe", 8, 1 + len(CLASSES))] if maps else []
        manifest = Manifest(
            teacher=TeacherSpec(
                name="synthetic",
                fingerprint="0",
                layer="colours",
                width=WIDTH,
                random_weights=random_teacher,
            ),
            preprocessing=Preprocessing(image_size=side, resize=resize),
            class_names=("background", *CLASSES) if masks else CLASSES if labels else (),
            data_root=str(root) if root else None,
            grid=grid or None,
            views=views,
            images=images,
            options={EXACT_VIEW: FLIP} if exact_flip else {},
        )
        counts = {"train": train, "val": val}
        keys = {
            split: [f"{split}/{row:04d}.png" for row in range(count)]
            for split, count in counts.items()
            if count
        }
        create_store(path, manifest, Plan(keys, batch_rows=8, shard_rows=64), arrays, scales=scales)
        for split in keys:
            write_split(path, split, counts[split], settings, root)
        finalize_store(path)
        return path

    return make


@pytest.fixture
def clip_store(tmp_path: Path) -> Path:
    """Clips of 3 to 9 frames (folders of images), two or three teacher rows each, a row for every two frames."""
    from imaging.clips import clip_content

    path, root = tmp_path / "clips.zarr", tmp_path / "clips"
    manifest = Manifest(
        teacher=TeacherSpec(name="synthetic", fingerprint="0", layer="colours", width=WIDTH),
        preprocessing=Preprocessing(image_size=32),
        class_names=CLASSES,
        data_root=str(root),
        options={"frames": 3, "frames_per_row": 2},
    )
    keys = {split: [f"{split}/clip{row}" for row in range(6)] for split in ("train", "val")}
    arrays = feature_arrays(WIDTH, frames=True) + target_arrays(label=True)
    create_store(path, manifest, Plan(keys, batch_rows=8, shard_rows=64), arrays)
    rng = np.random.default_rng(0)
    for split, names in keys.items():
        rows: dict[str, list[Any]] = {name: [] for name in ("frames", "pooled", "content", "label")}
        for number, key in enumerate(names):
            (root / key).mkdir(parents=True)
            for frame in range(3 + number):
                (root / key / f"{frame}.png").write_bytes(png_bytes(draw_image(rng, number % 3, 32)[0]))
            features = rng.normal(size=(2 + number % 2, WIDTH)) + number % 3
            rows["frames"].append(features)
            rows["pooled"].append(features.mean(axis=0))
            rows["content"].append(
                np.frombuffer(blake2b(clip_content(root / key), digest_size=16).digest(), np.uint8)
            )
            rows["label"].append(number % 3)
        with StoreWriter(path, split) as writer:
            writer.append(
                {
                    "features/frames/values": rows["frames"],
                    "features/pooled": np.stack(rows["pooled"]),
                    "content": np.stack(rows["content"]),
                    "sizes": np.full((6, 2), 32, np.int32),
                    "targets/label": np.array(rows["label"], np.int32),
                }
            )
    finalize_store(path)
    return path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    """make_config(store, epochs=2, …) → a small CPU configuration."""
    from train.config import load_config

    def make(store: Path, **options: Any) -> Any:
        defaults = {
            "store": store,
            "out": tmp_path / "run",
            "student": "timm:test_resnet",
            "epochs": 2,
            "batch_size": 8,
            "image_size": 32,
            "learning_rate": 1e-3,
            "device": "cpu",
            "workers": 0,
        }
        return load_config({**defaults, **options})

    return make


@pytest.fixture(scope="session")
def yolo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detection store of ten training and four validation images."""
    from tests.test_train.yolo_data import make_store as make_detection_store
    from tests.test_train.yolo_data import scenes

    path = tmp_path_factory.mktemp("yolo") / "store.zarr"
    return make_detection_store(path, {"train": scenes(10, 0), "val": scenes(4, 1)})


@pytest.fixture(scope="session")
def yolo_run(yolo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished training that distils at two levels, with its control, and what an observer heard of it."""
    pytest.importorskip("ultralytics")
    from tests.test_train.yolo_runs import RUN_OPTIONS, Listener, make_config
    from train.run import run_training

    out = tmp_path_factory.mktemp("run") / "out"
    listener = Listener()
    run_training(make_config(yolo_store, out, control=True, **RUN_OPTIONS), [listener])
    return out, listener


@pytest.fixture
def train_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What a user of `cli train` reads on stderr, whether or not an earlier test has configured logging."""
    from console.output import get_logger

    logger = get_logger("train")
    logger.addHandler(caplog.handler)
    with caplog.at_level("INFO", logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def run_folder(make_store: Any, tmp_path: Path) -> Path:
    from tests.test_train.runs import trained

    return trained(make_store(), tmp_path / "run")
