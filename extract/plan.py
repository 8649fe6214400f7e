"""What a run opens and what it will write: data set, teacher, samples by row, arrays, manifest, sizes of batch and shard."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from console.devices import core_share
from console.output import get_logger, plain_json, redact, redact_values
from extract.config import ConfigError, ExtractConfig
from extract.decode.sample import Encoding
from extract.encode import averages_unevenly
from extract.sources.base import RemovedFile, Sample, Samples, Source
from extract.sources.detect import open_source
from extract.sources.listing import suffix_of
from extract.teachers import Teacher, license_notice, load_teacher
from files.names import printable
from imaging.clips import frame_files
from imaging.decode import FULL_DEPTH, ImageError, largest_gray, read_file
from store import format as names
from store.errors import DistillError
from store.format import NOTES_FOLDER, RANDOM_WEIGHTS_NOTICE, ArraySpec, Manifest
from store.job import features_job, job_folder, keys_folder
from store.keys import KeyTable, open_keys
from store.metadata import ZARR_JSON, write_json
from store.reader import open_store
from store.shards import choose_shard_rows, power_of_two_below

log = get_logger("extract")

LISTING_LOG_S = 5.0  # between two lines about a large data set that is being listed
SOURCE_FILE = "source.json"  # in the store's notes: how its data set was opened
AUTO_GRID = 16
CPU_BATCH = 16
SMALL_SHARE = 0.75  # of the size that a teacher was trained at: below it, an extraction names that size
# On a GPU: patches of 14 px in a forward pass (256 images of 224 px, 64 of 448 px), and bytes of decoded pixels.
CUDA_PATCHES, PATCH_PX = 65_536, 14
DECODED_BYTES = 512 << 20
PARALLEL_SHARDS = 16  # shards that a large data set has at least, so that several devices can share it
MIN_SHARD_ROWS = 1024
AGAIN = "\0again "  # in keys of rows that are encoded for a new version: no file has such a name


class DifferentStore(DistillError):
    """The store was made from other options or other files than are asked for now."""


# -- what an extraction opens ----------------------------------------------------------------------------


def open_data(config: ExtractConfig) -> Source:
    """Open the data set; log its notes, warnings and counts."""
    logged = time.monotonic()

    def listing(found: int) -> None:
        nonlocal logged
        if time.monotonic() - logged >= LISTING_LOG_S:
            logged = time.monotonic()
            log.info("listing the data set: %s files so far", f"{found:,}")

    source = open_source(
        config.data,
        config.source,
        split=config.split or None,
        val_fraction=config.val_fraction,
        group_duplicates=config.group_duplicates,
        recorded=lambda: recorded_splits(config),
        progress=listing,
        **config.source_options,
    )
    for note in source.notes:
        log.info("%s", note)
    for text in source.warnings:
        log.warning("%s", text)
    counts = ", ".join(f"{len(samples):,} {name}" for name, samples in source.splits.items())
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
        pool=config.pool,
        layers=config.layers,
        compile_tower=config.compile,
    )
    log.info("teacher %s on %s, %s", teacher.spec.name, teacher.device, teacher.spec.dtype)
    if notice := license_notice(teacher.license):
        log.warning("%s: weights under %s", teacher.spec.name, notice)
    trained = teacher.trained_size
    if trained is not None and config.image_size < SMALL_SHARE * trained:
        log.info(
            "%s was trained on images of %d pixels and sees %d here: --image-size %d takes longer and usually gives better features",
            teacher.spec.name,
            trained,
            config.image_size,
            trained,
        )
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


# -- how the data set of a store was opened: it is opened in the same way again ---------------------------


def planned_keys(path: Path) -> dict[str, KeyTable]:
    """The keys of every split in row order, those of an unfinished extension included."""
    job = features_job(path)
    appended = keys_folder(job_folder(path, job.name)) if job is not None else path
    splits = list(job.splits) if job is not None else open_store(path).splits
    return {
        split: open_keys(appended / split if (appended / split).exists() else path / split)
        for split in splits
    }


def record_source(path: Path, config: ExtractConfig) -> None:
    """Keep how the data set was opened beside the store's arrays; no password is in it."""
    record: dict[str, Any] = {
        "data": redact(config.data) if "://" in config.data else os.path.abspath(config.data),
        "source": config.source,
        "split": config.split,
        "options": config.source_options,
        "val_fraction": config.val_fraction,
        "group_duplicates": config.group_duplicates,
    }
    record = redact_values(plain_json(record))
    if record != read_source_record(path):
        write_json(path / NOTES_FOLDER / SOURCE_FILE, record)


def read_source_record(path: Path) -> dict[str, Any]:
    file = path / NOTES_FOLDER / SOURCE_FILE
    record: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    return record


def recorded_splits(config: ExtractConfig) -> Mapping[str, KeyTable] | None:
    """The keys of `train` and `val` in the store at `--out`, which stay where they are; None: cut by the rule alone.

    Raises:
        DifferentStore: when the store was cut with another `--val-fraction`.
    """
    path = config.base or config.folder
    if not (path / ZARR_JSON).exists() or (config.overwrite and config.base is None):
        return None
    fraction = read_source_record(path).get("val_fraction", config.val_fraction)  # older stores have none
    if fraction != config.val_fraction:
        raise DifferentStore(
            f"{path}: its validation split was cut with --val-fraction {fraction:g}, asked for "
            f"{config.val_fraction:g}. Give --val-fraction {fraction:g}, or --overwrite to extract everything again"
        )
    return cut_splits(path)


def cut_splits(path: Path) -> Mapping[str, KeyTable] | None:
    """The keys of a store's `train` and `val`; None where the data set has other splits, which nothing has cut."""
    keys = planned_keys(path)
    return keys if keys.keys() <= {"train", "val"} else None


# -- the task --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSamples:
    """The samples of a split in the store's row order; `order` int64 [N] is None when that is the source's.

    `keys` are the planned ones of a store that is there. Where `order` is below 0 the data set no longer has the sample.
    """

    samples: Samples
    order: npt.NDArray[np.int64] | None = None
    keys: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.samples) if self.order is None else len(self.order)

    @property
    def row_keys(self) -> Sequence[str]:
        """The keys in row order."""
        return self.samples.keys if self.order is None else self.keys

    @property
    def missing(self) -> int:
        """Samples that the data set no longer has."""
        return 0 if self.order is None else int((self.order < 0).sum())

    def __getitem__(self, row: int) -> Sample:
        index = row if self.order is None else int(self.order[row])
        return self.samples.build(index) if index >= 0 else Sample(self.keys[row], RemovedFile())

    def between(self, first: int, end: int) -> list[Sample]:
        """The samples of rows [first, end)."""
        return [self[row] for row in range(first, min(end, len(self)))]


@dataclass(frozen=True)
class ExtractTask:
    """One store to be filled: where, from what, and how. batch_rows, shard_rows: of a store that is to be made.

    reused, reused_bad: rows, and bad ones among them, that the store keeps beside those of this task.
    """

    path: Path
    splits: Mapping[str, RowSamples]
    encoding: Encoding
    manifest: Manifest
    arrays: Sequence[ArraySpec]
    batch_rows: int
    shard_rows: int
    reused: int = 0
    reused_bad: int = 0

    @property
    def rows(self) -> int:
        return sum(len(samples) for samples in self.splits.values())


def make_task(config: ExtractConfig, source: Source, teacher: Teacher) -> ExtractTask:
    """The task of a new store; resuming puts its rows in the stored order, see `adopt_rows`.

    Raises:
        ConfigError: for options that this data set or teacher cannot follow.
    """
    clips = source.task == "sequence" or source.kind == "clips"
    check_options(config, source, clips)
    # Which of label, boxes and mask any sample of any split has.
    targets = frozenset().union(*(samples.target_kinds() for samples in source.splits.values()))
    manifest = make_manifest(config, source, teacher, clips, grid_side(config, teacher, targets))
    encoding = replace(encoding_of(manifest), max_pixels=config.max_pixels)
    arrays = [
        *names.feature_arrays(
            teacher.spec.width,
            grid=manifest.grid,
            views=manifest.views,
            frames=encoding.frames > 0,
            layers={
                layer.number: (dict(encoding.layers)[layer.number], layer.width) for layer in teacher.layers
            },
        ),
        *names.target_arrays(label="label" in targets, boxes="boxes" in targets, mask="mask" in targets),
        *names.image_arrays(config.images, config.image_size, frames=encoding.clip_frames),
    ]
    return ExtractTask(
        path=config.folder,
        splits={name: RowSamples(samples) for name, samples in source.splits.items()},
        encoding=encoding,
        manifest=manifest,
        arrays=arrays,
        batch_rows=batch_rows(config, encoding, teacher),
        shard_rows=shard_rows(config, arrays, len(source)),
    )


def check_options(config: ExtractConfig, source: Source, clips: bool) -> None:
    problems = []
    if clips and config.views:
        problems.append("--views needs images, this data set has clips")
    if clips and config.images == "raw":
        problems.append(
            "--images raw needs images, this data set has clips: --images jpeg stores their frames"
        )
    if config.logits != "none" and not source.class_names:
        problems.append(f"--logits {config.logits} needs class labels, this data set has none")
    if config.logits == "probe" and source.task == "detection":
        problems.append(
            "--logits probe needs class labels or masks, this data set has boxes: `cli probe STORE` measures its features"
        )
    if config.logits.startswith("zero-shot") and (config.teacher != "qwen2.5-vl" or clips):
        problems.append(f"--logits {config.logits} needs Qwen2.5-VL's language model and images")
    if problems:
        raise ConfigError("; ".join(problems))
    if config.logits.startswith("zero-shot"):
        from extract.teachers.qwen_transformers import check_zero_shot

        check_zero_shot(str(config.teacher_path))  # before hours of encoding, not after


def grid_side(config: ExtractConfig, teacher: Teacher, targets: frozenset[str]) -> int:
    """Side of the stored grid, 0 for none."""
    native = teacher.grid_size(config.image_size, config.image_size)[0]
    if config.grid == "native":
        return native
    if config.grid == "auto":
        return min(AUTO_GRID, native) if targets & {"boxes", "mask"} or teacher.layers else 0
    side = int(config.grid)
    if not side and teacher.layers:
        raise ConfigError("--layers stores grids: use --grid native, a side, or auto instead of 0")
    if side > native:
        log.warning(
            "grid %d: the teacher sees %d×%d cells at %d pixels, a larger grid is interpolated and adds no information: "
            "--grid native, or a larger --image-size",
            side,
            native,
            native,
            config.image_size,
        )
    return side


def make_manifest(
    config: ExtractConfig, source: Source, teacher: Teacher, clips: bool, grid: int
) -> Manifest:
    changes: dict[str, Any] = {"exact": True} if config.exact_preprocessing else {}
    bit_depth = choose_bit_depth(config, source)
    if bit_depth != FULL_DEPTH:
        changes["bit_depth"] = bit_depth
    preprocessing = teacher.preprocessing
    options: dict[str, Any] = {}
    if config.views == names.FLIP:
        options[names.EXACT_VIEW] = names.FLIP
    elif config.views:
        options["seed"] = config.seed
    if teacher.layers:
        # As many times the side of the last layer's stored grid as the teacher's own is of its last.
        native = teacher.grid_size(config.image_size, config.image_size)[0]
        sizes = teacher.layer_sizes(config.image_size, config.image_size)
        options[names.LAYERS] = {
            str(number): max(1, round(grid * size[0] / native)) for number, size in sizes.items()
        }
    if clips:
        options |= {"frames": config.frames, "frames_per_row": teacher.temporal_patch_size}
    # Only where the rule makes a difference: stores that were begun before it can be resumed otherwise.
    if averages_unevenly(grid, *teacher.grid_size(config.image_size, config.image_size)):
        options[names.GRID_RULE] = names.AREA
    return Manifest(
        teacher=teacher.spec,
        preprocessing=preprocessing.model_copy(update={"options": {**preprocessing.options, **changes}}),
        class_names=source.class_names,
        task=source.task,
        source=source.kind,
        data_root=printable(source.root),
        grid=grid or None,
        views=config.views if isinstance(config.views, int) else 1,
        images=config.images,
        software=software_versions(),
        license=teacher.license,
        options=options,
    )


def encoding_of(manifest: Manifest) -> Encoding:
    """How the samples of a store are encoded: `cli verify` encodes some of them again."""
    preprocessing, options = manifest.preprocessing, manifest.options
    return Encoding(
        image_size=preprocessing.image_size,
        resize=preprocessing.resize,
        interpolation=preprocessing.interpolation,
        exact=bool(preprocessing.options.get("exact", False)),
        bit_depth=preprocessing.bit_depth,
        views=manifest.views,
        flip=manifest.exact_flip,
        seed=int(options.get("seed", 0)),
        frames=int(options.get("frames", 0)),
        pair=int(options.get("frames_per_row", 1)),
        images=manifest.images,
        grid=manifest.grid or 0,
        area=options.get(names.GRID_RULE) == names.AREA,
        layers=tuple((int(number), side) for number, side in options.get(names.LAYERS, {}).items()),
    )


def software_versions() -> dict[str, str]:
    """Versions of what computes the features."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "pillow", "timm", "qwen-distill"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def batch_rows(config: ExtractConfig, encoding: Encoding, teacher: Teacher) -> int:
    """Samples of a batch: as asked, or as many as keep the device busy without filling its memory."""
    if isinstance(config.batch_size, int):
        return config.batch_size
    if teacher.device.type != "cuda":
        return CPU_BATCH
    size = encoding.image_size
    by_patches = CUDA_PATCHES * PATCH_PX**2 // size**2
    by_pixels = DECODED_BYTES // (encoding.planes * 3 * size**2)
    return max(1, min(by_patches, by_pixels))


def shard_rows(config: ExtractConfig, arrays: list[ArraySpec], rows: int) -> int:
    """Rows of a shard: the store's own choice, less for a large data set that several devices may share.

    A function of the data set alone, so that one device and many make the same store.
    """
    if config.shard_rows is not None:
        return config.shard_rows
    share = max(MIN_SHARD_ROWS, power_of_two_below(rows // PARALLEL_SHARDS))
    return min(choose_shard_rows(arrays), share)


def spread(count: int, total: int) -> list[int]:
    """At most `count` of `total` places, evenly spread: the same ones every time."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64)).tolist()


def calibration_samples(task: ExtractTask, count: int) -> list[Sample]:
    """`count` samples spread evenly over the largest split: scales are taken from them."""
    samples = max(task.splits.values(), key=len)
    return [samples[row] for row in spread(count, len(samples))]


def sample_key(key: str) -> str:
    """The sample's key for that of its row, which differs where a sample was encoded twice for one new version."""
    start, again, number = key.rpartition(AGAIN)
    return start if again and number.isdigit() else key


# -- how many bits of 16-bit gray images are used: one rule for a whole data set, chosen before the first row -----
#
# A 16-bit file does not record how much of its range the camera filled: of microscopy whose largest value is 235,
# divided by 65,535, nothing but black is left. `auto` looks at a fixed sample of the data set and takes the smallest of
# `DEPTHS` that holds its largest value. The manifest records it, and everything that reads these images follows it.

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
    if not config.overwrite and (config.folder / ZARR_JSON).exists():
        return open_store(config.folder, allow_incomplete=True).manifest.preprocessing.bit_depth
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
        for name, samples in source.splits.items()
        for row, key in enumerate(samples.keys)
        if suffix_of(key) not in NARROW
    ]
    for place in spread(SAMPLED, len(places)):
        name, row = places[place]
        yield source.splits[name][row]


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
