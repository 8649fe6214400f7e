"""Clips for training: the frames that the teacher saw, and its rows spread over them.

`B` clips, `T` the longest clip's frames, `S` the student's image size, `D` the teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imaging.clips import clip_content, read_clip_frames, sample_frame_indices
from imaging.decode import FULL_DEPTH, MOST_PIXELS, ImageError, decode_image
from imaging.geometry import resize_view
from store.format import CONTENT, FRAMES, IMAGES_ENCODED, IMAGES_FRAMES, Manifest
from store.reader import Split
from train.data.batches import Item, collate_views
from train.data.images import DataError, Views, ViewSettings, path_of
from train.data.views import draw_color, draw_view, render_image, sample_generator


class ClipReader:
    """Reads the frames of a clip as the extraction chose them, from the store or from the data set; picklable.

    `places`: stored rows of each clip, int64 [N]; `frames_per_row`: frames that the teacher saw for each row
    (2 for Qwen2.5-VL, whose rows stand for frame pairs). `bit_depth`: of frames that are 16-bit gray images.
    """

    def __init__(
        self,
        split: Split,
        data_root: Path | str | None,
        places: NDArray[np.int64],
        frames_per_row: int,
        bit_depth: int = FULL_DEPTH,
    ) -> None:
        self.split, self.data_root, self.bit_depth = split, data_root, bit_depth
        self.places, self.frames_per_row = places, frames_per_row
        self.checked: set[int] = set()
        self.stored = IMAGES_FRAMES in split.names

    def read(self, row: int) -> list[Image.Image]:
        """`places[row] · frames_per_row` frames. Raises DataError naming the key."""
        key = self.key(row)
        if self.stored:
            return self.read_stored(row)
        path = path_of(key, self.data_root)
        try:
            self.check_content(row, path)
            return read_clip_frames(
                path, int(self.places[row]), pairs=self.frames_per_row == 2, bit_depth=self.bit_depth
            )
        except ImageError as error:
            raise DataError(
                f"clip {key}: {error.reason} (looked at {path}): pass --data-root, or extract with --images jpeg so that the "
                "store is enough"
            ) from None

    def read_stored(self, row: int) -> list[Image.Image]:
        """The frames that the store holds; evenly spread ones where fewer are asked for than it has."""
        data = bytes(self.split.ragged(np.array([row]), IMAGES_ENCODED)[0])
        spans = self.split.gather(np.array([row]), [IMAGES_FRAMES])[IMAGES_FRAMES][0]
        places, step = int(self.places[row]), self.frames_per_row
        held = len(spans) // step if data else 0
        if places > held:
            raise DataError(
                f"clip {self.key(row)}: {places * step} frames are wanted, the store holds {held * step}: extract again "
                "with --images jpeg and as many --frames"
            )
        chosen = sample_frame_indices(held, places)
        wanted = spans[: held * step].reshape(held, step, 2)[chosen].reshape(-1, 2).tolist()
        try:
            images = {
                start: decode_image(data[start : start + length], max_pixels=MOST_PIXELS)
                for start, length in dict.fromkeys(map(tuple, wanted))
            }
        except ImageError as error:
            raise DataError(f"clip {self.key(row)}: a stored frame: {error.reason}") from None
        return [images[start] for start, _ in wanted]

    def check_content(self, row: int, path: Path) -> None:
        """Compare with the stored hash, once in each process: a clip's frames may be many files."""
        if row in self.checked:
            return
        expected = self.split.gather(np.array([row]), [CONTENT])[CONTENT][0].tobytes()
        try:
            found = blake2b(clip_content(path), digest_size=16).digest() if any(expected) else expected
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        if found != expected:
            raise ImageError("changed since the store was made (content hash differs): extract again")
        self.checked.add(row)

    def key(self, row: int) -> str:
        return str(self.split.keys[row])


class ClipViews(Views):
    """Items of a plan → clips; all frames of a clip share one view and one change of colors."""

    def __init__(self, reader: ClipReader, settings: ViewSettings) -> None:
        self.reader, self.settings = reader, settings

    def show(self, item: Item) -> dict[str, Any]:
        settings = self.settings
        frames = self.reader.read(item.row)
        generator = sample_generator(settings.seed, item.showing, self.reader.key(item.row))
        view = draw_view(
            settings.augmentation,
            generator,
            resize_view(settings.policy, frames[0].size, settings.image_size),
        )
        color = draw_color(settings.augmentation, generator)
        pixels = np.stack([render_image(frame, view, settings.image_size, color) for frame in frames])
        return {"row": item.row, "weight": item.weight, "image": pixels, "view": view.matrix, "recorded": -1}


def collate_clips(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad clips to the longest, uint8 [B, T, S, S, 3], with `lengths` int64 [B]."""
    lengths = [len(sample["image"]) for sample in samples]
    longest = max(lengths)
    padded = [
        {**sample, "image": np.pad(sample["image"], [(0, longest - length), *[(0, 0)] * 3])}
        for sample, length in zip(samples, lengths, strict=True)
    ]
    return {**collate_views(padded), "lengths": torch.tensor(lengths, dtype=torch.int64)}


def gather_teachers_frames(
    teachers: Mapping[str, Split], rows: NDArray[np.int64], lengths: Tensor
) -> dict[str, Tensor]:
    """`gather_frames` of each teacher, under names with its prefix."""
    return {
        f"{prefix}{name}": values
        for prefix, split in teachers.items()
        for name, values in gather_frames(split, rows, lengths).items()
    }


def gather_frames(split: Split, rows: NDArray[np.int64], lengths: Tensor) -> dict[str, Tensor]:
    """`frames` float16 [B, T, D], one teacher row per frame (a pair's row repeats), and `frame_mask` [B, T]."""
    stored = split.ragged(rows, FRAMES)
    longest = int(lengths.max())
    frames = np.zeros((len(rows), longest, stored[0].shape[-1]), dtype=stored[0].dtype)
    for target, values, length in zip(frames, stored, lengths.tolist(), strict=True):
        target[:length] = np.repeat(values, length // len(values), axis=0)
    mask = torch.arange(longest)[None] < lengths[:, None]
    return {"frames": torch.from_numpy(frames), "frame_mask": mask.float()}


def clip_places(split: Split, manifest: Manifest) -> tuple[NDArray[np.int64], int]:
    """Stored rows of each clip int64 [N], and how many frames each row stands for.

    Raises DataError for a store that was not made from clips.
    """
    per_row = int(manifest.options.get("frames_per_row", 1))
    if FRAMES in split.names:
        offsets = split.read(split.specs[FRAMES].offsets_name)
        return np.diff(offsets).astype(np.int64), per_row
    if "frames" not in manifest.options:
        raise DataError(
            f"{split.path}: holds single images, a clip student needs clips: extract with --source clips"
        )
    return np.full(len(split), int(manifest.options["frames"]), dtype=np.int64), per_row
