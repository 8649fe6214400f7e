"""What an extraction opens: the data set, the teacher, and how many processes decode for it."""

from __future__ import annotations

import time

from console.cores import core_share
from console.log import get_logger
from extract.config import ExtractConfig
from extract.resume import recorded_splits
from extract.sources.base import Source
from extract.sources.detect import open_source
from extract.teachers import Teacher, load_teacher
from store.format import RANDOM_WEIGHTS_NOTICE

log = get_logger("extract")

LISTING_LOG_S = 5.0


class ListingLog:
    """Says every few seconds how many files a large data set has shown so far."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, found: int) -> None:
        if time.monotonic() - self.last >= LISTING_LOG_S:
            self.last = time.monotonic()
            log.info("listing the data set: %s files so far", f"{found:,}")


def open_data(config: ExtractConfig) -> Source:
    """Open the data set; log its notes, warnings and counts."""
    source = open_source(
        config.data,
        config.source,
        split=config.split or None,
        val_fraction=config.val_fraction,
        group_duplicates=config.group_duplicates,
        recorded=lambda: recorded_splits(config),
        progress=ListingLog(),
        **config.source_options,
    )
    for note in source.notes:
        log.info("%s", note)
    for text in source.warnings:
        log.warning("%s", text)
    counts = ", ".join(f"{len(samples):,} {name}" for name, samples in source.splits().items())
    log.info("%s: %s data set, %s, %d classes", source.root, source.kind, counts, len(source.class_names))
    return source


def open_teacher(config: ExtractConfig) -> Teacher:
    """The teacher on the first device."""
    teacher = load_teacher(
        config.teacher,
        config.teacher_path,
        device=config.devices[0],
        dtype=config.dtype,
        image_size=config.image_size,
        resize=config.resize,
        compile_tower=config.compile,
    )
    log.info("teacher %s on %s, %s", teacher.spec.name, teacher.device, teacher.spec.dtype)
    if teacher.spec.random_weights:
        log.warning("%s", RANDOM_WEIGHTS_NOTICE)
    return teacher


def decode_workers(config: ExtractConfig, share: int = 1) -> int:
    """Decoding processes of one of `share` devices: as asked, or its part of the cores, 16 at most.

    A fifth of the cores, one at least, is left to the threads that launch, copy, checksum and write.
    """
    if config.workers is not None:
        return config.workers
    cores = core_share()
    return max(1, min(16, (cores - max(1, cores // 5)) // share))
