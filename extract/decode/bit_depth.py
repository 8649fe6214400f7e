"""How many bits of 16-bit gray images are used: one rule for a whole data set, chosen before the first row.

A 16-bit file does not record how much of its range the camera filled: of microscopy whose largest value is 235, divided
by 65,535, nothing but black is left. `auto` looks at a fixed sample of the data set and takes the smallest of
`DEPTHS` that holds its largest value. The manifest records it, and everything that reads these images follows it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from console.log import get_logger
from extract.config import ExtractConfig
from extract.sources.base import Sample, Source
from extract.sources.listing import suffix_of
from imaging.clips import frame_files
from imaging.decode import FULL_DEPTH, ImageError, largest_gray, read_file
from store.metadata import ZARR_JSON
from store.reader import open_store

log = get_logger("extract")

DEPTHS = (8, 10, 12, 14, 16)
SAMPLED = 64
# Formats without 16-bit gray, by the suffix of the key: such samples are not looked at.
NARROW = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".mp4", ".avi", ".mov", ".mkv"]
)


def choose_bit_depth(config: ExtractConfig, source: Source) -> int:
    """Bits that are used of 16-bit gray images: as asked, else as the store at `--out` has it, else by a sample."""
    if config.bit_depth == "full":
        return FULL_DEPTH
    if config.bit_depth != "auto":
        return int(config.bit_depth)
    if not config.overwrite and (config.out / ZARR_JSON).exists():
        return open_store(config.out, allow_incomplete=True).manifest.preprocessing.bit_depth
    largest = [value for sample in sampled(source) for value in largest_values(sample, config.max_pixels)]
    if not largest:
        return FULL_DEPTH
    depth = next(depth for depth in DEPTHS if max(largest) < 2**depth)
    text = "16-bit gray images: the largest value of %d sampled ones is %d: --bit-depth %d, %d is white"
    if depth == FULL_DEPTH:
        log.info(text, len(largest), max(largest), depth, 2**depth - 1)
    else:
        log.warning(
            text + " (give the option if that is wrong)", len(largest), max(largest), depth, 2**depth - 1
        )
    return depth


def sampled(source: Source) -> Iterator[Sample]:
    """At most `SAMPLED` samples, evenly spread over those that may be 16-bit gray: the same ones every time."""
    places = [
        (name, row)
        for name, samples in source.splits().items()
        for row, key in enumerate(samples.keys)
        if suffix_of(key) not in NARROW
    ]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(SAMPLED, len(places))).astype(np.int64))
    for place in chosen.tolist():
        name, row = places[place]
        yield source.splits()[name][row]


def largest_values(sample: Sample, max_pixels: int) -> list[int]:
    """The largest value of a sample that is a 16-bit gray image, or of a clip's middle frame; else nothing."""
    try:
        if sample.frames is None:
            data = sample.read()
        else:
            if not sample.frames.path.is_dir() or not (files := frame_files(sample.frames.path)):
                return []
            data = read_file(files[len(files) // 2])
        value = largest_gray(data, max_pixels=max_pixels)
    except ImageError:
        return []  # the extraction itself puts it into the ledger
    return [] if value is None else [value]
