"""What every data-set layout is turned into: splits of `Sample` records, with stable keys.

Shapes: `M` boxes of an image, `T` frames of a clip. Coordinates are pixels of the upright original image.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
import numpy.typing as npt

from files.names import printable
from imaging.clips import ClipFrame
from imaging.decode import DEFAULT_MAX_PIXELS, FULL_DEPTH, ImageError, read_file
from store.errors import DistillError
from store.format import NO_LABEL

MOST_ERROR_CHARACTERS = 2_000


class SourceError(DistillError):
    """The data set cannot be read as asked; the text names the place and the next step.

    A text that is too long, because it shows a value of the data set, is shortened in its middle.
    """

    def __init__(self, text: str) -> None:
        text = printable(text)
        if len(text) > MOST_ERROR_CHARACTERS:
            end = MOST_ERROR_CHARACTERS // 4
            text = f"{text[: MOST_ERROR_CHARACTERS - end]} … {text[-end:]}"
        super().__init__(text)


class AnnotationError(SourceError):
    """An annotation is wrong; the text names the file and, where it has lines, the line."""


class Boxes(NamedTuple):
    """Objects of one image: `values` float32 [M, 4] (xyxy, pixels of the upright original), `classes` int32 [M]."""

    values: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, values: Any, classes: Any) -> Boxes:
        """From anything array-like; no box at all is [0, 4]."""
        return cls(np.asarray(values, np.float32).reshape(-1, 4), np.asarray(classes, np.int32).reshape(-1))

    @classmethod
    def unlabeled(cls) -> Boxes:
        """An image whose objects are not marked, which is not one without objects (see `store.format.BOX_CLASSES`)."""
        return cls.of([(0, 0, 0, 0)], [NO_LABEL])


@runtime_checkable
class Payload(Protocol):
    """Bytes to be read later, perhaps in another process: small and picklable."""

    def read(self) -> bytes:
        """Raises ImageError when they cannot be read."""
        ...


class LazyBoxes(Protocol):
    """Boxes to be parsed later: some layouts need the image's size for it. Small and picklable."""

    def read(self, size: tuple[int, int]) -> Boxes:
        """Boxes of an image of `size` (width, height), upright. Raises AnnotationError."""
        ...


class LazyMask(Protocol):
    """A mask to be read later. Small and picklable."""

    def read(self, size: tuple[int, int] | None) -> bytes:
        """A gray PNG of class ids. Raises AnnotationError, also for another size (width, height) than `size`."""
        ...


class Frames(Payload, Protocol):
    """The frames of a clip; `read()` gives the bytes of its file or files, for the content's digest."""

    @property
    def path(self) -> Path: ...

    def stored_bytes(self) -> int:
        """Bytes of its file or files, which are not read. Raises OSError."""
        ...

    def read_clip(self, count: int, *, pairs: bool, max_pixels: int, bit_depth: int) -> list[ClipFrame]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One image or clip with what is known about it. Nothing is read before a `read…` method is called.

    `key` is unique in the data set, stable between runs and machines. `label` indexes the source's class names;
    None: unlabeled. A clip has `frames` and no `image`.
    """

    key: str
    image: Path | bytes | Payload | None = None
    label: int | None = None
    boxes: Boxes | LazyBoxes | None = None
    mask: bytes | LazyMask | None = None
    frames: Frames | None = None

    def read(self) -> bytes:
        """The encoded bytes as stored in the data set. Raises ImageError when unreadable."""
        content = self.frames if self.image is None else self.image
        if isinstance(content, bytes):
            return content
        if isinstance(content, Path):
            return read_file(content)
        if content is None:
            raise ValueError(f"sample {self.key!r} has neither image nor frames")
        return content.read()

    @property
    def file(self) -> Path | None:
        """The one file that holds the sample; None for rows of a file or database and for folders of frames."""
        if self.frames is not None:
            return None if self.frames.path.is_dir() else self.frames.path
        return self.image if isinstance(self.image, Path) else None

    def stored_bytes(self) -> int | None:
        """Bytes of the sample, found without reading them; None where that is impossible. Raises OSError."""
        if self.frames is not None:
            return self.frames.stored_bytes()
        if isinstance(self.image, Path):
            return self.image.stat().st_size
        return len(self.image) if isinstance(self.image, bytes) else None

    def read_boxes(self, size: tuple[int, int]) -> Boxes | None:
        """The boxes, for an upright original of `size` (width, height). Raises AnnotationError."""
        if self.boxes is None or isinstance(self.boxes, Boxes):
            return self.boxes
        return self.boxes.read(size)

    def read_mask(self, size: tuple[int, int] | None = None) -> bytes | None:
        """A gray 8-bit PNG of class ids (255: ignore), upright.

        Raises AnnotationError, also when `size` (width, height of the image) is given and the mask's differs.
        """
        if self.mask is None or isinstance(self.mask, bytes):
            return self.mask
        return self.mask.read(size)

    def read_clip(
        self,
        count: int,
        *,
        pairs: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        bit_depth: int = FULL_DEPTH,
    ) -> list[ClipFrame]:
        """`count` RGB frames spread evenly over the clip, see `sample_frame_indices`; with `pairs` 2 · count
        frames, each chosen one followed by its successor, as Qwen's temporal patch takes them.

        Raises ImageError when a frame cannot be decoded, ValueError for a sample that is not a clip.
        """
        if self.frames is None:
            raise ValueError(f"sample {self.key!r} is not a clip")
        return self.frames.read_clip(count, pairs=pairs, max_pixels=max_pixels, bit_depth=bit_depth)


class Samples(Sequence[Sample], ABC):
    """The samples of one split, made on demand: a million of them cost little more than their keys."""

    # Kinds of targets that every sample has. None: `target_kinds` looks at each sample.
    every_has: frozenset[str] | None = None

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys

    @property
    def keys(self) -> Sequence[str]:
        """The keys of all samples, in order."""
        return self._keys

    @abstractmethod
    def build(self, index: int) -> Sample:
        """The sample at `index`, 0 ≤ index < len."""

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        """Which of `label`, `boxes` and `mask` any sample has, or any sample at `rows`.

        Decided from every sample: few of a million may be labeled. Layouts that know the answer from their
        annotations set `every_has` or override this.
        """
        if self.every_has is not None:
            return self.every_has if (len(self) if rows is None else len(rows)) else frozenset()
        indices = range(len(self)) if rows is None else rows.tolist()
        found: set[str] = set()
        for sample in map(self.build, indices):
            values = {"label": sample.label, "boxes": sample.boxes, "mask": sample.mask}
            found |= {name for name, value in values.items() if value is not None}
            if len(found) == len(values):
                break
        return frozenset(found)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.build(i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.build(position)

    def __iter__(self) -> Iterator[Sample]:
        return (self.build(index) for index in range(len(self)))


def label_of(labels: npt.NDArray[np.int32] | None, index: int) -> int | None:
    """One of `labels` (int32 [N], -1: none)."""
    return None if labels is None or labels[index] < 0 else int(labels[index])


def kinds_of_labels(
    labels: npt.NDArray[np.int32] | None, rows: npt.NDArray[np.int64] | None
) -> frozenset[str]:
    """`target_kinds` of samples whose only targets are `labels`, see `label_of`."""
    if labels is None:
        return frozenset()
    chosen = labels if rows is None else labels[rows]
    return frozenset(["label"] if bool((chosen >= 0).any()) else [])


class Selection(Samples):
    """Some samples of another sequence, in the order of `rows` (int64).

    `prefix` goes before each key; `classes` (int32 [C]) maps their class numbers to other ones.
    """

    def __init__(
        self,
        samples: Samples,
        rows: npt.NDArray[np.int64],
        prefix: str = "",
        classes: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.samples, self.rows = samples, rows
        # The last one is reached by -1, the mark of boxes that are not labeled.
        self.classes = None if classes is None else np.append(classes, np.int32(NO_LABEL))
        names = samples.keys
        super().__init__([prefix + names[row] for row in rows] if prefix else [names[row] for row in rows])

    def target_kinds(self, rows: npt.NDArray[np.int64] | None = None) -> frozenset[str]:
        return self.samples.target_kinds(self.rows if rows is None else self.rows[rows])

    def build(self, index: int) -> Sample:
        sample = replace(self.samples.build(int(self.rows[index])), key=self._keys[index])
        if self.classes is None:
            return sample
        label = None if sample.label is None else int(self.classes[sample.label])
        boxes = sample.boxes
        if isinstance(boxes, Boxes):
            boxes = Boxes(boxes.values, self.classes[boxes.classes])
        return replace(sample, label=label, boxes=boxes)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened data set. `task` is a hint: classification, detection, segmentation, sequence or features.

    `class_names` are those of all splits together. `root` is where the data came from, without passwords.
    `notes` are for the log: decisions the user may want to know of. `warnings` are what is probably wrong.
    """

    kind: str
    root: str
    task: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Samples]  # `train`, `val`, `test`, …: the samples in an order that does not change
    notes: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return sum(len(samples) for samples in self.splits.values())


REMOVED = "no longer in the data set"


@dataclass(frozen=True, slots=True)
class RemovedFile:
    """In the place of a file that left the data set after it was planned: its row becomes a bad one."""

    def read(self) -> bytes:
        raise ImageError(REMOVED)


def content_digest(data: bytes) -> bytes:
    """The 16 bytes by which the store knows a file's content: blake2b-128."""
    return hashlib.blake2b(data, digest_size=16).digest()
