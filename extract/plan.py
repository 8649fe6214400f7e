"""What a run will write, decided before the first row: samples by row, arrays, manifest, scales."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from console.log import get_logger
from extract.config import ConfigError, ExtractConfig
from extract.decode.bit_depth import choose_bit_depth
from extract.decode.sample import Encoding
from extract.encode import averages_unevenly
from extract.sources.base import RemovedFile, Sample, Samples, Source
from extract.teachers import Teacher
from files.names import printable
from imaging.decode import FULL_DEPTH
from store import format as names
from store.format import ArraySpec, Manifest
from store.keys import KeyTable
from store.shards import choose_shard_rows, power_of_two_below

log = get_logger("extract")

AUTO_GRID = 16
CPU_BATCH = 16
# On a GPU: patches of 14 px in a forward pass (256 images of 224 px, 64 of 448 px), and bytes of decoded pixels.
CUDA_PATCHES, PATCH_PX = 65_536, 14
DECODED_BYTES = 512 << 20
PARALLEL_SHARDS = 16  # shards that a large data set has at least, so that several devices can share it
MIN_SHARD_ROWS = 1024
AGAIN = "\0again "  # in keys of rows that are encoded for a new version: no file has such a name


class NoSamples(Samples):
    """A split that the data set does not have."""

    def build(self, index: int) -> Sample:
        raise IndexError(index)


NO_SAMPLES = NoSamples(())


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
    def missing(self) -> int:
        """Samples that the data set no longer has."""
        return 0 if self.order is None else int((self.order < 0).sum())

    def between(self, first: int, end: int) -> list[Sample]:
        """The samples of rows [first, end)."""
        if self.order is None:
            return self.samples[first:end]
        return [
            self.samples.build(index) if index >= 0 else Sample(self.keys[row], RemovedFile())
            for row, index in enumerate(self.order[first:end].tolist(), start=first)
        ]


@dataclass(frozen=True)
class ExtractTask:
    """One store to be filled: where, from what, and how.

    reused, reused_bad: rows, and bad ones among them, that the store keeps beside those of this task.
    """

    path: Path
    splits: Mapping[str, RowSamples]
    encoding: Encoding
    manifest: Manifest
    arrays: Sequence[ArraySpec]
    reused: int = 0
    reused_bad: int = 0

    @property
    def rows(self) -> int:
        return sum(len(samples) for samples in self.splits.values())


def make_task(config: ExtractConfig, source: Source, teacher: Teacher) -> ExtractTask:
    """The task of a new store; resuming puts its rows in the stored order, see `resume.py`.

    Raises:
        ConfigError: for options that this data set or teacher cannot follow.
    """
    clips = source.task == "sequence" or source.kind == "clips"
    check_options(config, source, clips)
    targets = found_targets(source)
    manifest = make_manifest(config, source, teacher, clips, grid_side(config, teacher, targets))
    encoding = replace(encoding_of(manifest), max_pixels=config.max_pixels)
    return ExtractTask(
        path=config.out,
        splits={name: RowSamples(samples) for name, samples in source.splits().items()},
        encoding=encoding,
        manifest=manifest,
        arrays=[
            *names.feature_arrays(
                teacher.spec.width, grid=manifest.grid, views=manifest.views, frames=encoding.frames > 0
            ),
            *names.target_arrays(label="label" in targets, boxes="boxes" in targets, mask="mask" in targets),
            *names.image_arrays(config.images, config.image_size, frames=encoding.clip_frames),
        ],
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
    if config.logits.startswith("zero-shot") and (config.teacher != "qwen2.5-vl" or clips):
        problems.append(f"--logits {config.logits} needs Qwen2.5-VL's language model and images")
    if problems:
        raise ConfigError("; ".join(problems))
    if config.logits.startswith("zero-shot"):
        from extract.teachers.qwen_vl import check_zero_shot

        check_zero_shot(str(config.teacher_path))  # before hours of encoding, not after


def found_targets(source: Source) -> frozenset[str]:
    """Which of label, boxes and mask any sample of any split has."""
    return frozenset().union(*(samples.target_kinds() for samples in source.splits().values()))


def grid_side(config: ExtractConfig, teacher: Teacher, targets: frozenset[str]) -> int:
    """Side of the stored grid, 0 for none."""
    native = teacher.grid_size(config.image_size, config.image_size)[0]
    if config.grid == "native":
        return native
    if config.grid == "auto":
        return min(AUTO_GRID, native) if targets & {"boxes", "mask"} else 0
    side = int(config.grid)
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
    options: dict[str, int | str] = {"seed": config.seed} if config.views else {}
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
        views=config.views,
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
        seed=int(options.get("seed", 0)),
        frames=int(options.get("frames", 0)),
        pair=int(options.get("frames_per_row", 1)),
        images=manifest.images,
        grid=manifest.grid or 0,
        area=options.get(names.GRID_RULE) == names.AREA,
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


def batch_rows(config: ExtractConfig, task: ExtractTask, teacher: Teacher) -> int:
    """Samples of a batch: as asked, or as many as keep the device busy without filling its memory."""
    if isinstance(config.batch_size, int):
        return config.batch_size
    if teacher.device.type != "cuda":
        return CPU_BATCH
    size = task.encoding.image_size
    by_patches = CUDA_PATCHES * PATCH_PX**2 // size**2
    by_pixels = DECODED_BYTES // (task.encoding.planes * 3 * size**2)
    return max(1, min(by_patches, by_pixels))


def shard_rows(config: ExtractConfig, task: ExtractTask) -> int:
    """Rows of a shard: the store's own choice, less for a large data set that several devices may share.

    A function of the data set alone, so that one device and many make the same store.
    """
    if config.shard_rows is not None:
        return config.shard_rows
    share = max(MIN_SHARD_ROWS, power_of_two_below(task.rows // PARALLEL_SHARDS))
    return min(choose_shard_rows(list(task.arrays)), share)


def calibration_samples(task: ExtractTask, count: int) -> list[Sample]:
    """`count` samples spread evenly over the largest split: scales are taken from them."""
    samples = max(task.splits.values(), key=len)
    rows = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64))
    return list(itertools.chain.from_iterable(samples.between(row, row + 1) for row in rows.tolist()))


def sample_key(key: str) -> str:
    """The sample's key for that of its row, which differs where a sample was encoded twice for one new version."""
    start, again, number = key.rpartition(AGAIN)
    return start if again and number.isdigit() else key


def in_stored_order(samples: Samples, table: KeyTable) -> RowSamples:
    """The samples in the order of a store's keys."""
    if len(samples) == len(table) and all(a == b for a, b in zip(samples.keys, table, strict=True)):
        return RowSamples(samples, keys=table)
    index = {key: number for number, key in enumerate(samples.keys)}
    order = np.fromiter((index.get(sample_key(key), -1) for key in table), np.int64, len(table))
    return RowSamples(samples, order, table)
