"""Real inputs for checks, calibration and timing: from the run's store, or from a folder of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.clips import read_clip_frames
from imaging.decode import ImageError, decode
from store.reader import Store, open_store
from train.config import TrainConfig
from train.data.clips import ClipReader
from train.data.images import ImageReader
from train.deliver.files import FRAMES, find_clips, find_images
from train.deliver.model import ModelCard
from train.deliver.predict import clip_pixels
from train.errors import DeliveryError
from train.run_folder import CONFIG


def sample_inputs(run: Path, card: ModelCard, count: int, folder: Path | None = None) -> NDArray[np.float32]:
    """`count` normalized inputs float32 [B, 3, S, S] (clips [B, T, 3, S, S]) of the run's validation split.

    With `folder`, of the images or clips in it. Raises DeliveryError when there are none, or the run's store is gone.
    """
    pixels = split_pixels(run, card, count) if folder is None else folder_pixels(folder, card, count)
    return card.normalize(np.stack(pixels))


def folder_pixels(folder: Path, card: ModelCard, count: int) -> list[NDArray[np.uint8]]:
    """Rendered images or clips below a folder. Raises DeliveryError naming the one that cannot be read."""
    clips = card.takes_clips
    files = find_clips([str(folder)]) if clips else find_images([str(folder)])
    pixels = []
    for path in files[:count]:
        try:
            if clips:
                frames = read_clip_frames(
                    path, card.frames or FRAMES, pairs=card.frame_pairs, bit_depth=card.bit_depth
                )
                pixels.append(clip_pixels(card, frames))
            else:
                image = decode(path, target_size=card.image_size, bit_depth=card.bit_depth).image
                pixels.append(card.render(image))
        except ImageError as error:
            raise DeliveryError(f"--images: {path}: {error}; remove it or name another folder") from None
    return pixels


def split_pixels(run: Path, card: ModelCard, count: int) -> list[NDArray[np.uint8]]:
    """Rendered images or clips of the split that the run was validated on."""
    config = run_options(run)
    store = open_store(config.store)
    read = pixel_reader(card, split_reader(config, store, config.val_split, card))
    return [read(int(row)) for row in spread(np.flatnonzero(store[config.val_split].valid), count)]


def split_reader(config: TrainConfig, store: Store, split: str, card: ModelCard) -> Any:
    """Reads the images of a split (ImageReader), or equally many frames of each clip (ClipReader).

    From the store, or from the data set's root.
    """
    named = config.data_root or store.manifest.data_root
    root = Path(named) if named else None
    if not card.takes_clips:
        return ImageReader(store[split], root, store.manifest.preprocessing, card.bit_depth)
    places = np.full(len(store[split]), card.frames or FRAMES, dtype=np.int64)
    return ClipReader(store[split], root, places, 2 if card.frame_pairs else 1, card.bit_depth)


def pixel_reader(card: ModelCard, reader: Any) -> Callable[[int], NDArray[np.uint8]]:
    """The pixels of a row as the student is shown them, uint8 [S, S, 3]; of a clip [T, S, S, 3]."""
    if card.takes_clips:
        return lambda row: clip_pixels(card, reader.read(row))
    return lambda row: card.show(reader.read(row, card.image_size))


def run_options(run: Path) -> TrainConfig:
    """The options that a run was trained with."""
    return TrainConfig(**run_content(run)["options"])


def run_folder(run: Path) -> Path:
    """The folder of a run that is named by itself or by its checkpoint."""
    return run if run.is_dir() else run.parent


def run_content(run: Path) -> dict[str, Any]:
    """What config.json says in the run's folder (or beside its checkpoint): `options`, `store` and more.

    Raises DeliveryError when it cannot be read.
    """
    path = run_folder(run) / CONFIG
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"options", "store"} - content.keys():
            raise KeyError(f"no {' and no '.join(sorted(missing))} in it")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DeliveryError(f"{path}: the run's configuration cannot be read: {reason}") from None
    return content


def spread(rows: Sequence[int] | NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of `rows`, evenly spread."""
    rows = np.asarray(rows)
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
